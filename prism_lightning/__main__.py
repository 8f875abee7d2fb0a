"""python -m prism_lightning VERB ..."""

from prism_lightning.cli import console_script

console_script()
