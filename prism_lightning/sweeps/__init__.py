"""Sweeps: grids of runs that are planned, run and collected.

A trial is one run of a sweep: a `fit` command and possibly an `evaluate` command.
"""
