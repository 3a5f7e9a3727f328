"""`make bench`: a training step beside the textbook's, loading beside others', in one run."""
