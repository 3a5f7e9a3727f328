"""What a run needs to survive: processes that die, buckets, sealed checkpoints.

May import: adapters, config.
"""
