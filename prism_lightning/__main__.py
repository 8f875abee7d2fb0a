"""python -m prism_lightning VERB ..."""

import sys

from prism_lightning.cli import main

sys.exit(main(sys.argv[1:]))
