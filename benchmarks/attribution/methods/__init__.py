"""The compared methods, each a subclass of `benchmarks.attribution.task.Method`."""
