"""Benchmarks of the speed of generation with interventions."""
