"""`make bench`: a training step beside the textbook's, loading beside others', in one run.

May import: config, survival, autoencoder, data, algorithms, callbacks, training, plan.
"""
