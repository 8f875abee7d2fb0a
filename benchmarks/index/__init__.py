"""Benchmarks of building and querying an index."""
