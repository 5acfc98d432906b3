"""The settings of a run that its results depend on, in a file beside them."""

import json
import os
from pathlib import Path
from typing import Any

from trl import SFTConfig

from .whole_files import damage_explained, write_whole


RUN_SETTINGS_FILE_NAME = "bilevel_sft.json"
# What decides which tokens a row's loss covers. An allow-list: nothing else of the arguments, such as paths or tokens,
# belongs in a file that may be published.
_ROW_OPTIONS = (
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "dataset_text_field",
    "eos_token",
    "pad_token",
)


def row_options(args: SFTConfig) -> dict[str, Any]:
    """The options that decide which tokens a row's loss covers."""
    return {name: getattr(args, name) for name in _ROW_OPTIONS}


def write_run_settings(directory: str | os.PathLike, args: SFTConfig) -> None:
    """Write `bilevel_sft.json` to an existing directory, whole or not at all."""
    text = json.dumps({"rows": row_options(args)}, indent=2) + "\n"
    write_whole(Path(directory) / RUN_SETTINGS_FILE_NAME, lambda partial: partial.write_text(text))


def read_row_options(directory: str | os.PathLike) -> dict[str, Any]:
    """
    Options of [`~trl.SFTConfig`] under which the run prepared its rows.

    Raises:
        `FileNotFoundError`: if the directory is not that of a run.
        `ValueError`: if the file is damaged.
    """
    path = Path(directory) / RUN_SETTINGS_FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Give the output folder, or a checkpoint, of a run with BilevelSFTTrainer."
        )
    with damage_explained(path, "Use another checkpoint."):
        rows = json.loads(path.read_text())["rows"]
        return {name: rows[name] for name in _ROW_OPTIONS if name in rows}
