"""Images: found, decoded, written as MDS shards, checked, streamed and batched.

May import: config, survival.
"""
