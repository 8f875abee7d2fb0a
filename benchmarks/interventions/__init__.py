"""Benchmarks of interventions."""
