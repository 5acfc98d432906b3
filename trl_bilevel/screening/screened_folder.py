"""The folder that a screen writes, read as that of a run is: for its curated dataset, its report and its cards."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from ..parquet_files import column, open_parquet
from .answer_statistics import STATISTICS
from .verdict import VERDICT_COLUMNS


SCREENED_FILE_NAME = "scored/train.parquet"  # in a folder that `load_dataset` reads
_NOT_CURATED = ("score", "rank", "kept", *STATISTICS)


def is_screened(directory: str | os.PathLike) -> bool:
    """Whether a folder is that of a screen."""
    return (Path(directory) / SCREENED_FILE_NAME).is_file()


def read_screened(directory: str | os.PathLike) -> Dataset:
    """
    All rows of a screen, as [`~trl_bilevel.curation.curate_dataset`] gives those of a run.

    Their weight is the probability that they are good, scaled to mean 1; that of rows without an answer is 1, and
    they are not `scored`.
    """
    rows = open_parquet([Path(directory) / SCREENED_FILE_NAME])
    good = column(rows, "good_probability").astype(np.float64)
    known = ~np.isnan(good)
    mean = good[known].mean() if known.any() else 1.0
    columns = {
        "weight": np.where(known, good / (mean or 1.0), 1.0),
        "rank": column(rows, "rank"),
        "scored": known,
        "response_source": pa.repeat("original", len(rows)),
    }
    own = [name for name in rows.column_names if name not in (*_NOT_CURATED, *VERDICT_COLUMNS)]
    parts = [rows.select_columns(own), Dataset(pa.table(columns)), rows.select_columns([*VERDICT_COLUMNS])]
    return concatenate_datasets([part.with_format(None) for part in parts], axis=1, split=rows.split)
