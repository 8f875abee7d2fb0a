"""Decoding: UTF-8 with or without a byte order mark; any other encoding is an error and is never guessed."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from prism_lightning.data.sources.source import RecordError, line_place

READ_BYTES = 2**20
HEAD_BYTES = 4096
# The mark of UTF-32 little-endian begins with that of UTF-16, so it is tested first.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Text without a mark that is mostly ASCII: which of four bytes are zero.
ZEROS = {"utf-32le": (1, 2, 3), "utf-32be": (0, 1, 2), "utf-16le": (1, 3), "utf-16be": (0, 2)}
SIGNATURES = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet", b"ARROW1": ".arrow"}


def wide_encoding(head: bytes) -> str | None:
    """Return iconv's name of UTF-16 or UTF-32, recognised by the byte order mark or the zero bytes; None otherwise."""
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    groups = len(head) // 4
    shares = [head[offset : 4 * groups : 4].count(0) / max(1, groups) for offset in range(4)]
    for name, zeros in ZEROS.items():
        if all((share > 0.7) if offset in zeros else (share < 0.3) for offset, share in enumerate(shares)):
            return name
    return None


def is_binary(head: bytes) -> bool:
    """Return whether the first bytes of a file are not text in any encoding."""
    return b"\0" in head and wide_encoding(head) is None


def check_encoding(head: bytes) -> None:
    """Raise an error if the first bytes are not those of UTF-8 text; UTF-16 of ASCII text is valid UTF-8 with zeros.

    Raises:
        RecordError: the text is UTF-16 or UTF-32; the bytes are the signature of another kind of file.
    """
    encoding = wide_encoding(head)
    if encoding:
        name = encoding[:6].upper()
        raise RecordError("", f"the text is {name}, not UTF-8: convert it with iconv -f {encoding} -t utf-8")
    for signature, suffix in SIGNATURES.items():
        if head.startswith(signature) and (b"\0" in head or not signature.isascii()):
            raise RecordError("", f"the content is that of a {suffix} file, not text: give the file that suffix")


def decoded_chunks(file: BinaryIO) -> Iterator[str]:
    """Yield the text of a file in chunks of about 1 MiB, without a byte order mark.

    Raises:
        RecordError: a byte is not UTF-8; the error names the first.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    while True:
        chunk = file.read(READ_BYTES)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            carried = len(error.object) - len(chunk)  # bytes of a character that began in the chunk before
            raise not_utf8(f", byte {position - carried + error.start}", error) from error
        position += len(chunk)
        if text:
            yield text
        if not chunk:
            return


def decoded_lines(file: BinaryIO) -> Iterator[str]:
    r"""Yield every line that ends with \n, without a byte order mark; raises as `decoded_line` does."""
    number = 0
    while line := file.readline():
        yield decoded_line(line, number)
        number += 1


def decoded_line(line: bytes, number: int) -> str:
    """Return the text of a line, without a byte order mark.

    Args:
        line: bytes of the line.
        number: of the line, counted from 0.

    Raises:
        RecordError: the bytes are not UTF-8.
    """
    try:
        return line.decode("utf-8-sig" if number == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(line_place(number), error) from error


def not_utf8(where: str, error: UnicodeDecodeError) -> RecordError:
    """Return the error for bytes that are not UTF-8. A guess of their encoding could be wrong and corrupt the text."""
    wrong = error.object[error.start : error.end]
    advice = "find out the file's encoding, for example with file -i, and convert it with iconv -f ENCODING -t utf-8"
    return RecordError(where, f"{wrong!r} is not UTF-8: {advice}")
