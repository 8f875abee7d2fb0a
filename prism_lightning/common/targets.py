"""Masked targets: tokens that a model reads but is not trained to predict."""

from __future__ import annotations

IGNORED_TARGET = -100  # in place of a masked target's id, as torch and transformers have it
