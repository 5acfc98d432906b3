"""What was logged during a run, on disk: Trainer writes it to checkpoints only."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .whole_files import damage_explained, write_whole


FILE_NAME = f"_{TRAINER_STATE_NAME}"
"""In the output folder; Trainer does not push files of such names."""


class TrainingLog(NamedTuple):
    """What was logged up to an optimizer step, as in `TrainerState`."""

    global_step: int
    max_steps: int
    epoch: float
    entries: list[dict[str, Any]]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps at which something was logged, and its values."""
        found = [(entry["step"], entry[name]) for entry in self.entries if name in entry]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, name: str) -> float | None:
        """What was logged last under a name."""
        values = self.series(name)[1]
        return values[-1] if values else None


def save_log(directory: str | os.PathLike, state: TrainerState) -> None:
    """Write the log to `_trainer_state.json` in an existing directory, whole or not at all."""
    write_whole(Path(directory) / FILE_NAME, lambda partial: state.save_to_json(str(partial)))


def read_log(directory: str | os.PathLike) -> TrainingLog | None:
    """
    The log beside the scores in a folder, of a run or a checkpoint, see [`~trl_bilevel.row_scores.find_scores`].

    Returns:
        [`TrainingLog`]: `None` if there is none.

    Raises:
        `ValueError`: if the file is damaged.
    """
    paths = [Path(directory) / name for name in (FILE_NAME, TRAINER_STATE_NAME)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    with damage_explained(path, "Delete its folder, or give an earlier checkpoint."):
        state = json.loads(path.read_text())
        return TrainingLog(state["global_step"], state["max_steps"], state["epoch"] or 0.0, state["log_history"])
