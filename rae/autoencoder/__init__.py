"""Stage 1, the method: encoders, decoder, discriminator, losses, and what joins them.

May import: config. Plain PyTorch, but for ``model``, which hands it to Composer.
"""
