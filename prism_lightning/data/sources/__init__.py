"""Where documents come from: the running Python's standard library, local files, or a Hugging Face dataset.

To add a kind of file, write a reader in a module of its own and enter its suffix in `registry.KINDS`.
"""

from prism_lightning.data.sources.hub import hub_dataset
from prism_lightning.data.sources.local import local_files
from prism_lightning.data.sources.python_library import standard_library
from prism_lightning.data.sources.registry import has_rows
from prism_lightning.data.sources.source import Document, Source

__all__ = ["Document", "Source", "has_rows", "hub_dataset", "local_files", "standard_library"]
