"""A run directory: its lock and its MLflow store."""
