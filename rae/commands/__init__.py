"""`python -m rae COMMAND`, a file each: parsing and printing; the demo.

May import: config, survival, autoencoder, data, exchange, evaluation, plan, bench; most of it when they run.
"""
