"""
Rows to Parquet, a piece at a time.

`to_parquet` of `datasets` holds all rows of a stream, and gathers rows that were selected one by one.
"""

import glob
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, IterableDataset
from datasets.features.features import require_storage_embed
from datasets.table import embed_table_storage, table_cast

from .whole_files import write_whole


_ROWS_PER_PIECE = 10_000  # read at a time, and at most in a row group of the file
_ROWS_WITH_FILES_PER_PIECE = 100  # whose content is read as well


def write_parquet(rows: Dataset | IterableDataset, path: str | os.PathLike) -> int:
    """
    Write rows to one Parquet file as they are read, whole or not at all.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): if a stream does not say the types of its columns,
            those of its first rows are taken.
        path (`str` or `os.PathLike`): of the file; its folder is created.

    Returns:
        `int`: rows written.

    Raises:
        `ValueError`: for a stream without rows.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = None if rows.features is None else rows.features.arrow_schema
    has_files = any(require_storage_embed(feature) for feature in (rows.features or {}).values())
    tables = read_pieces(rows, _ROWS_WITH_FILES_PER_PIECE if has_files else None)
    if schema is None:
        first = next(tables, None)
        if first is None:
            raise ValueError(f"The stream has no rows, so {path} has no columns to be written with.")
        schema, tables = first.schema, itertools.chain([first], tables)
    num_rows = 0

    def write(partial: Path) -> None:
        nonlocal num_rows
        options = {"use_content_defined_chunking": True, "write_page_index": True}
        with pa.parquet.ParquetWriter(partial, schema, **options) as writer:
            for table in tables:
                table = table_cast(table, schema)
                if has_files:  # their content goes along, and no path of this machine
                    table = embed_table_storage(table)
                writer.write_table(table)
                num_rows += len(table)

    write_whole(path, write)
    return num_rows


def open_parquet(paths: Sequence[str | os.PathLike], **options: Any) -> Dataset:
    """Rows of Parquet files, in their order. `datasets` takes a name with `[`, `*` or `?` in it for a pattern."""
    return Dataset.from_parquet([glob.escape(str(path)) for path in paths], **options)


def read_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """A column. Indexing a dataset would gather rows that were selected or filtered one by one."""
    stored = dataset.data.column(name)
    return stored if dataset._indices is None else stored.take(dataset._indices.column(0))


def column(dataset: Dataset, name: str) -> np.ndarray:
    """A column of numbers or strings as an array, shape (N,)."""
    return read_column(dataset, name).to_numpy()


def read_pieces(rows: Dataset | IterableDataset, num_rows: int | None = None) -> Iterator[pa.Table]:
    """
    Walk over all rows, some at a time; fast as long as those that were selected come in the order they are stored in.
    """
    num_rows = num_rows or _ROWS_PER_PIECE
    if isinstance(rows, Dataset) and rows._indices is not None:
        numbers = rows._indices.column(0).to_numpy().astype(np.int64)  # of the rows that were selected
        if (numbers[1:] >= numbers[:-1]).all():
            for start in range(0, len(rows.data), num_rows):
                first, last = np.searchsorted(numbers, [start, start + num_rows])
                if first < last:
                    piece = rows.data.fast_slice(start, min(num_rows, len(rows.data) - start))
                    yield piece.take(numbers[first:last] - start)
            return
    if rows.features is None:  # each piece would have types of its own
        yield from (piece.data.table for piece in pieces_of_stream(rows, num_rows))
    else:
        yield from rows.with_format("arrow").iter(batch_size=num_rows)


def pieces_of_stream(rows: IterableDataset, num_rows: int) -> Iterator[Dataset]:
    """
    The rows of a stream, all pieces with the same columns: those of the stream, or, if it does not say, of the first
    piece.

    Args:
        rows (`datasets.IterableDataset`): a key that a row lacks is empty there.
        num_rows (`int`): of a piece; the last may have less.

    Raises:
        `ValueError`: for rows that do not fit the columns.
    """
    features, start = rows.features, 0
    stream = iter(rows.with_format(None))
    while piece := list(itertools.islice(stream, num_rows)):
        names = dict.fromkeys(features or (name for row in piece for name in row))
        try:
            if rows.features is None and (unknown := {name for row in piece for name in row} - names.keys()):
                raise ValueError(f"they have the columns {sorted(unknown)} as well")
            dataset = Dataset.from_list([{**dict.fromkeys(names), **row} for row in piece], features=features)
        except (pa.ArrowInvalid, TypeError, ValueError) as error:
            raise ValueError(
                f"Rows {start} to {start + len(piece)} do not fit the columns of those before ({error}). Give the "
                "stream its features: `dataset.cast(Features(...))`."
            ) from error
        features, start = dataset.features, start + len(piece)
        yield dataset


@contextmanager
def as_rows(curated: Dataset | IterableDataset) -> Iterator[Dataset]:
    """A curated dataset with rows that can be counted: a stream is written to disk, for as long as the block runs."""
    if isinstance(curated, Dataset):
        yield curated
        return
    # Windows deletes no file that is mapped into memory, as the rows are while somebody holds them
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "rows.parquet"
        write_parquet(curated, path)
        yield open_parquet([path], split=curated.split, cache_dir=folder)
