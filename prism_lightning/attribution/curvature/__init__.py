"""The mathematics of attribution: gradients of tokens, their curvature, and the dictionary of prototypes."""
