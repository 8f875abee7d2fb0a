"""The methods that are compared, each behind `benchmarks.attribution.task.Method`."""
