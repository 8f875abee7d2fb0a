"""Building an index: a pass over the training blocks, shard by shard."""
