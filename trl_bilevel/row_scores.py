"""The scores of a run's rows on disk, and which of those in a folder are the newest."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoint_files import is_checkpoint
from .data_selector import DataSelector
from .screening.screened_folder import is_screened
from .selector_files import selector_table
from .whole_files import damage_explained, write_whole


SCORES_FILE_NAME = "_row_scores.pq"  # Parquet; the Hub's client warns of `.parquet` in a model repository
_COLUMNS = ("sample_id", "logit", "weight", "scored", "judged", "loss")
# How many scores had been written into the run's folder by then, of whatever run: a clock may be set back, and copies
# have times of their own
_WRITE_NUMBER = "write_number"
_CURE = "Delete it, and an earlier checkpoint is taken, or give another one."


def save_scores(
    directory: str | os.PathLike, selector: DataSelector, fingerprint: str, step: int, losses: np.ndarray | None = None
) -> None:
    """
    Write what curation needs to know of every row, whole or not at all.

    Args:
        directory (`str` or `os.PathLike`): an existing folder, of the run or of a checkpoint.
        selector ([`DataSelector`]): N rows.
        fingerprint (`str`): of the training rows.
        step (`int`): optimizer step of the scores.
        losses (`numpy.ndarray`, *optional*): of the rows under the trained model, shape (N,), nats per token.
    """
    table = selector_table(selector)
    table = table.append_column("judged", pa.array(selector.judged.numpy()))
    loss = pa.nulls(len(table), pa.float64()) if losses is None else pa.array(losses)
    table = table.append_column("loss", loss)
    table = table.replace_schema_metadata(
        {
            **table.schema.metadata,
            "rows_fingerprint": fingerprint,
            "step": str(step),
            _WRITE_NUMBER: str(_last_write_number(Path(directory)) + 1),
        }
    )
    write_whole(Path(directory) / SCORES_FILE_NAME, lambda path: pyarrow.parquet.write_table(table, path))


def read_scores(directory: str | os.PathLike) -> tuple[pa.Table, str]:
    """
    Read what [`save_scores`] wrote: a row for each training row, and the fingerprint of those.

    Raises:
        `ValueError`: if the file is damaged.
    """
    path = Path(directory) / SCORES_FILE_NAME
    with damage_explained(path, _CURE):
        scores = pyarrow.parquet.read_table(path).select(_COLUMNS)
        return scores, scores.schema.metadata[b"rows_fingerprint"].decode()


def find_scores(run_dir: str | os.PathLike) -> Path:
    """
    The folder with the scores that were written last: that of the run, or, if it was interrupted, a checkpoint.

    So they are of the newest run in the folder, however far earlier ones came, and of the newest part of a run that
    went back to a checkpoint. The folder of a screen is found as it is.

    Raises:
        `FileNotFoundError`: if there is none.
        `ValueError`: if a file is damaged.
    """
    directory = Path(run_dir)
    written = {folder: _read_written(folder) for folder in _scored_folders(directory)}
    if not written and is_screened(directory):
        return directory
    if written:
        return max(written, key=lambda folder: (written[folder], folder == directory))
    if not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist. Give the output folder, or a checkpoint, of a run.")
    raise FileNotFoundError(
        f"{directory} holds no scores of rows. Give the output folder, or a checkpoint, of a run with "
        "BilevelSFTTrainer that has come to its first checkpoint."
    )


class _Written(NamedTuple):
    """When scores were written; the later, the larger."""

    number: int
    """0 in files without one, of which only the step tells."""
    step: int


def _read_written(folder: Path) -> _Written:
    path = folder / SCORES_FILE_NAME
    with damage_explained(path, _CURE):
        metadata = pyarrow.parquet.read_schema(path).metadata
        return _Written(int(metadata.get(_WRITE_NUMBER.encode(), 0)), int(metadata[b"step"]))


def _last_write_number(directory: Path) -> int:
    """Of the scores in the folder of the run that `directory` is, or is a checkpoint of."""
    last = 0
    for folder in _scored_folders(directory.parent if is_checkpoint(directory) else directory):
        with suppress(OSError, ValueError):  # one that is damaged must not keep others from being written
            last = max(last, _read_written(folder).number)
    return last


def _scored_folders(run_dir: Path) -> list[Path]:
    folders = [run_dir, *run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return [folder for folder in folders if (folder / SCORES_FILE_NAME).is_file()]
