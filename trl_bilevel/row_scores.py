"""The scores of a run's rows on disk, and which of those in a folder are the newest."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .data_selector import DataSelector
from .whole_files import damage_explained, write_whole


SCORES_FILE_NAME = "_row_scores.pq"  # Parquet; the Hub's client takes no `.parquet` in a model repository's checkpoint
_COLUMNS = ("sample_id", "logit", "weight", "scored", "judged")
_CURE = "Delete it, and an earlier checkpoint is taken, or give another one."


def save_scores(directory: str | os.PathLike, selector: DataSelector, fingerprint: str, step: int) -> None:
    """
    Write what curation needs to know of every row, whole or not at all.

    Args:
        directory (`str` or `os.PathLike`): an existing folder, of the run or of a checkpoint.
        selector ([`DataSelector`]): N rows.
        fingerprint (`str`): of the training rows.
        step (`int`): optimizer step of the scores.
    """
    table = pa.table(
        {
            "sample_id": selector.sample_ids,
            "logit": selector.logits.numpy(),
            "weight": selector.weights().numpy(),
            "scored": selector.scored.numpy(),
            "judged": selector.judged.numpy(),
        }
    ).replace_schema_metadata({"rows_fingerprint": fingerprint, "step": str(step)})
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
    The folder with the newest scores of a run: its own, or, if it was interrupted, its last complete checkpoint.

    Raises:
        `FileNotFoundError`: if there is none.
        `ValueError`: if a file is damaged.
    """
    directory = Path(run_dir)
    steps: dict[Path, int] = {}
    for folder in (directory, *directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        path = folder / SCORES_FILE_NAME
        if path.is_file():
            with damage_explained(path, _CURE):
                steps[folder] = int(pyarrow.parquet.read_schema(path).metadata[b"step"])
    if steps:
        return max(steps, key=lambda folder: (steps[folder], folder == directory))
    raise FileNotFoundError(
        f"{directory} holds no scores of rows. Give the output folder, or a checkpoint, of a run with "
        "BilevelSFTTrainer that has come to its first checkpoint."
    )
