"""Benchmark of training, index, queries and generation on one GPU."""
