"""How good a model is: metrics, reconstructions with their page, models side by side, curves.

May import: config, survival, autoencoder, diffusion, data, exchange.
"""
