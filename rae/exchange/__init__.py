"""Models in and out: opened from what holds one, exported, imported, inspected; precomputed latents.

May import: config, survival, autoencoder, diffusion, data, algorithms.
"""
