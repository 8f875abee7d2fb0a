"""Benchmarks of the choices that an index is made of."""
