"""Recipes: composed from YAML files and the command line, and validated all at once."""
