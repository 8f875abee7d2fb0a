"""Suppression: the prototypes behind a behaviour are ranked, selected and removed."""
