"""From a configuration to a Trainer that fits: checks, parts, parallelism, compilation, resuming.

May import: config, survival, autoencoder, exchange, data, algorithms, callbacks, evaluation.
"""
