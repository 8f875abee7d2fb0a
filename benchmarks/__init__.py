"""Benchmarks, each a module that is run with `python -m`; its `--help` says what it needs and how long it takes.

Every benchmark prints a table and writes a JSON file with its results, the commit, the versions of the packages, the
command's arguments, the device and the number of threads. Times are medians of repeats with the lowest and the highest
one. Competitors run in turns within one process, so that a machine that slows down affects all of them. Random numbers
have fixed seeds.
"""
