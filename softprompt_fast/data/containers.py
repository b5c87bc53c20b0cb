"""What a file is by its first bytes: text may come packed, and what is no text is named."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
NO_TEXT = {
    b"%PDF": "a PDF: take the text out of it first",
    b"PK\x03\x04": "a ZIP archive, as DOCX and XLSX are: take the text out of it first",
    b"\xd0\xcf\x11\xe0": "an old Office document: take the text out of it first",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it first",
    b"BZh": "packed by bzip2: unpack it first",
    b"\xfd7zXZ": "packed by xz: unpack it first",
    b"ARROW1": "an Arrow file: write it as Parquet or JSON Lines",
    b"SQLite": "a database: write it as JSON Lines",
    b"{\\rtf": "an RTF document: take the text out of it first",
    b"version https://git-lfs": "a pointer of Git LFS: git lfs pull gets the file itself",
}


@contextmanager
def opened(path: Any) -> Iterator[tuple[BinaryIO, bool]]:
    """The bytes of the file, unpacked where gzip packed them, and whether they are Parquet's.

    Raises ValueError naming the file where it is no text, or where it is damaged.
    """
    with open(path, "rb") as file:
        # Peeked: what is read from a pipe does not come again.
        stream: Any = gzip.GzipFile(fileobj=file) if file.peek(2).startswith(GZIP) else file
        try:
            first = stream.peek(32)
            for signature, what in NO_TEXT.items():
                if first.startswith(signature):
                    raise ValueError(f"{path} is {what}.")
            yield stream, first.startswith(PARQUET)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def parquet_rows(file: BinaryIO, path: Any) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, without the fields that they leave empty."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:  # there is none, or one for another NumPy
        raise ValueError(
            f"{path} is a Parquet file: pip install pyarrow, or write it as JSON Lines ({error})"
        ) from None
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield {name: value for name, value in row.items() if value is not None}
    except (ArrowException, OverflowError, OSError, ValueError) as error:
        # damaged, or with a date that Python does not know
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None
