"""Benchmarks of training: throughput, and memory of the prototype layer."""
