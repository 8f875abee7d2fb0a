"""Reader of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from prism_lightning.data.sources.arrow import BATCH_ROWS, array_values, schema_tree
from prism_lightning.data.sources.column import TextColumn

BUFFER_BYTES = 2**20


def read_parquet(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, Any]]:
    """Yield number and value of every row; only the text column is read, in batches.

    Raises:
        RecordError: the column is missing; a text is not UTF-8.
    """
    from pyarrow.parquet import ParquetFile  # takes 60 ms to import

    # With a buffer size, pages are read as they are needed; without it, a whole row group's column is in memory.
    table = ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
    path = column.required_path(schema_tree(table.schema_arrow))
    row = 0
    for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=[".".join(path)], use_threads=False):
        yield from array_values(batch.column(path[0]), path[1:], row)
        row += batch.num_rows
