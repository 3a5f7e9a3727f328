"""Models in and out: opened from whatever holds one, exported, imported, inspected; latents of a data set.

May import: config, survival, autoencoder, data, algorithms.
"""
