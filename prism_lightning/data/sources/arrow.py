"""Reader of Arrow IPC files (Feather version 2) and streams; values of Arrow arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.encoding import not_utf8
from prism_lightning.data.sources.source import row_place

BATCH_ROWS = 256  # a few megabytes of long texts
FILE_SIGNATURE = b"ARROW1"


def read_arrow(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, Any]]:
    """Yield number and value of every row; one record batch is in memory at a time.

    Raises:
        RecordError: the column is missing; a text is not UTF-8.
    """
    is_file = file.read(len(FILE_SIGNATURE)) == FILE_SIGNATURE
    file.seek(0)
    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
    path = column.required_path(schema_tree(reader.schema))
    batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
    row = 0
    for batch in batches:
        values = batch.column(path[0])
        _validate(values)
        for start in range(0, len(values), BATCH_ROWS):
            yield from array_values(values.slice(start, BATCH_ROWS), path[1:], row + start)
        row += len(values)


def _validate(values: pa.Array) -> None:
    """Raise ArrowInvalid for a damaged column, since reading by its offsets could reach any memory."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # `array_values` reports that with its row; offsets are checked before it.
            raise


def schema_tree(schema: pa.Schema) -> dict[str, Any]:
    """Return a schema as nested mappings of names, as `TextColumn` reads them."""
    return {field.name: _type_tree(field.type) for field in schema}


def _type_tree(kind: pa.DataType) -> Any:
    if not pa.types.is_struct(kind):
        return str(kind)
    return {field.name: _type_tree(field.type) for field in (kind.field(n) for n in range(kind.num_fields))}


def array_values(array: pa.Array, path: tuple[str, ...], first_row: int) -> Iterator[tuple[int, Any]]:
    """Yield row and Python value of every item.

    Args:
        array: a column, or a part of it.
        path: names that lead to a field inside structs; empty for the column itself.
        first_row: row of the first item.

    Raises:
        RecordError: a text is not UTF-8.
    """
    if path:
        from pyarrow.compute import struct_field  # takes 60 ms to import

        array = struct_field(array, list(path))
    for row, item in enumerate(array, first_row):
        try:
            yield row, item.as_py()
        except UnicodeDecodeError as error:
            raise not_utf8(row_place(row), error) from error
