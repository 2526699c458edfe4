"""Reading shards: the order of samples, ranges of local or remote tars, and batches from worker processes."""
