"""Sources of documents: local files, a Hugging Face dataset, or the running Python's standard library.

`registry.py` says how to add a kind of file.
"""

from prism_lightning.data.sources.hub import hub_dataset
from prism_lightning.data.sources.local import local_files
from prism_lightning.data.sources.python_library import standard_library
from prism_lightning.data.sources.registry import has_rows, place_of
from prism_lightning.data.sources.rows import CompletionRows, MessageRows, Rows, TextRows
from prism_lightning.data.sources.source import Document, Source

__all__ = [
    "CompletionRows",
    "Document",
    "MessageRows",
    "Rows",
    "Source",
    "TextRows",
    "has_rows",
    "hub_dataset",
    "local_files",
    "place_of",
    "standard_library",
]
