"""``make bench``: how fast a training step is, beside the textbook's and beside what the machine can do.

Everything is compared side by side in one run, because a machine's speed drifts: the sides take turns on the same
batches, and their medians are divided. ``python -m rae.bench --help`` says what there is.
"""
