"""python -m prism_lightning VERB ..."""

from prism_lightning.cli.main import console_script

console_script()
