"""What lies in a folder or file, read from headers alone: a run, a checkpoint, an export, weights, a data set.

May import: what exchange may.
"""
