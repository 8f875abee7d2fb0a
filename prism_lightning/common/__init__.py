"""Helpers for every other package: files, manifests, errors, progress, devices, signals and text."""
