"""Benchmarks of the choices behind an index."""
