"""`python -m rae COMMAND`, a file each: parsing and printing; the demo.

May import: config, survival, autoencoder, diffusion, data, exchange, evaluation, plan; most of it when they run.
"""
