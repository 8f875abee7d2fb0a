"""Benchmarks of the speed of evaluation."""
