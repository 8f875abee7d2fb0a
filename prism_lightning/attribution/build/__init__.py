"""Building an index in one pass over the training blocks, shard by shard."""
