"""The settings of a run that its results depend on, in a file beside them."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from trl import SFTConfig

from .whole_files import damage_explained, write_whole


RUN_SETTINGS_FILE_NAME = "bilevel_sft.json"
_BASE_MODEL_FILE_NAME = "_base_model.json"
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


class RunSettings(NamedTuple):
    """What scoring rows as a run did needs to know of it, besides its files."""

    row_options: dict[str, Any]
    """Options of [`~trl.SFTConfig`] under which the run prepared its rows."""
    has_formatting_func: bool
    """Whether a function of the training script made the rows' text."""
    model_revision: str | None
    """Commit, or else branch or tag, of the base model on the Hub."""
    vocab_size: int | None = None
    """Of the model's configuration; TRL changes it for a chat template that brings tokens of its own."""


def write_run_settings(directory: str | os.PathLike, trainer: Any) -> None:
    """
    Write `bilevel_sft.json`, whole or not at all.

    Args:
        directory (`str` or `os.PathLike`): an existing directory.
        trainer ([`~trl.SFTTrainer`]): of the run.
    """
    asked_for = (trainer.args.model_init_kwargs or {}).get("revision")
    settings = {
        "rows": row_options(trainer.args),
        "has_formatting_func": trainer._formatting_func is not None,
        "model_revision": getattr(trainer.model.config, "_commit_hash", None) or asked_for,
        "vocab_size": getattr(trainer.model.config.get_text_config(), "vocab_size", None),
    }
    text = json.dumps(settings, indent=2) + "\n"
    write_whole(Path(directory) / RUN_SETTINGS_FILE_NAME, lambda partial: partial.write_text(text))


def read_run_settings(directory: str | os.PathLike) -> RunSettings:
    """
    Read what [`write_run_settings`] wrote; what older versions did not write has a default.

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
        settings = json.loads(path.read_text())
        rows = {name: settings["rows"][name] for name in _ROW_OPTIONS if name in settings["rows"]}
        return RunSettings(
            rows,
            settings.get("has_formatting_func", False),
            settings.get("model_revision"),
            settings.get("vocab_size"),
        )


def write_base_model(output_dir: str | os.PathLike, path: str) -> None:
    """
    Keep where the base model of an adapter is on this machine, in a file that is not pushed.

    Args:
        output_dir (`str` or `os.PathLike`): of the run; created if it does not exist.
        path (`str`): of the base model.
    """
    os.makedirs(output_dir, exist_ok=True)
    write_whole(Path(output_dir) / _BASE_MODEL_FILE_NAME, lambda partial: partial.write_text(json.dumps(path)))


def remove_base_model(output_dir: str | os.PathLike) -> None:
    """Before a run saves its own adapter into the folder."""
    (Path(output_dir) / _BASE_MODEL_FILE_NAME).unlink(missing_ok=True)


def read_base_model(directory: str | os.PathLike, name: str) -> str:
    """
    Where a base model is that a pushed adapter calls by its folder's name only.

    Args:
        directory (`str` or `os.PathLike`): output folder, or a checkpoint in it.
        name (`str`): what the adapter's configuration calls it.

    Returns:
        `str`: what [`write_base_model`] kept, if that has this name; otherwise the name.

    Raises:
        `ValueError`: if the folder is no longer there. On the Hub there may be another model of its name.
    """
    for folder in (Path(directory), Path(directory).absolute().parent):
        file = folder / _BASE_MODEL_FILE_NAME
        if file.is_file():
            with damage_explained(file, "Delete it, and name the base model."):
                path = Path(json.loads(file.read_text()))
            if path.name == name and not path.is_dir():
                raise ValueError(
                    f"The base model of {directory} was in {path}, which is no folder now. Say where it is with "
                    "`--model_name_or_path`."
                )
            if path.name == name:
                return str(path)
    return name
