"""From a configuration to a Trainer that fits: checks, parts, parallelism, compilation, resuming.

May import: config, survival, data, algorithms, callbacks, evaluation.
"""
