"""Stage 2, the method: flow, networks, samplers, guidance, and the generator that joins them to an autoencoder.

May import: config, autoencoder. Plain PyTorch, but for ``model``, which hands it to Composer.
"""
