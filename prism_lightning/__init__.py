"""PRISM Lightning: train prototype language models and ask which training data made them say something."""

__version__ = "0.1.0"
