"""Sweeps: grids of runs, planned, run and collected. Every trial is a `fit` and some `evaluate` that one could type."""
