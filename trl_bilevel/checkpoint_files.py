"""
Which checkpoints are whole: a list of a checkpoint's files is the last that is written into it.

Trainer writes straight into `checkpoint-N`. A process that is killed there leaves a folder that looks like any other,
and that the next run would resume from.
"""

import json
import logging
import os
import re
import zlib
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .selector_files import SELECTOR_FILE_NAME
from .whole_files import write_whole


logger = logging.getLogger(__name__)

MANIFEST_FILE_NAME = "_checkpoint_files.json"
LAST_INTACT = "last_intact"
"""Value of `resume_from_checkpoint`: the newest checkpoint whose files are all as they were written."""
ONLY_TO_RESUME = ("*optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""Files of a checkpoint that tell nothing of its model and weights."""
_FORMAT_VERSION = "1"
_CHECKSUM_UP_TO = 2**28  # bytes: of larger files only the size is compared, or a checkpoint would take minutes
_IN_PROGRESS = "checkpoint-is-incomplete.txt"  # of Trainer, while it saves on SIGTERM
_FOLDER_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")

CheckpointState = Literal["whole", "torn", "damaged"]


def write_manifest(directory: str | os.PathLike) -> None:
    """
    Declare a checkpoint whole: write the sizes and checksums of all its files to `_checkpoint_files.json`.

    Args:
        directory (`str` or `os.PathLike`): a checkpoint that nothing more is written to.
    """
    folder = Path(directory)
    left_out = (MANIFEST_FILE_NAME, _IN_PROGRESS)
    files = {
        path.relative_to(folder).as_posix(): _describe(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in left_out and path.suffix != ".partial"
    }
    manifest = {"format_version": _FORMAT_VERSION, "trl_bilevel": version("trl-bilevel"), "files": files}
    text = json.dumps(manifest, indent=2) + "\n"
    write_whole(folder / MANIFEST_FILE_NAME, lambda partial: partial.write_text(text))


def renew_manifest(directory: str | os.PathLike) -> None:
    """Declare a checkpoint whole once more if files were written, changed or removed since."""
    folder = Path(directory)
    manifest = folder / MANIFEST_FILE_NAME
    if not manifest.is_file():
        return
    known = {folder / name for name in json.loads(manifest.read_text())["files"]} | {manifest}
    found = {path for path in folder.rglob("*") if path.is_file()}
    if found != known or any(path.stat().st_mtime_ns > manifest.stat().st_mtime_ns for path in found):
        write_manifest(folder)


def remove_manifest(directory: str | os.PathLike) -> None:
    """Before a checkpoint is written once more into the same folder."""
    (Path(directory) / MANIFEST_FILE_NAME).unlink(missing_ok=True)


def find_problem(directory: str | os.PathLike, not_needed: tuple[str, ...] = ()) -> tuple[CheckpointState, str]:
    """
    Whether a checkpoint can be resumed from.

    Args:
        directory (`str` or `os.PathLike`): an existing folder.
        not_needed (`tuple[str]`): patterns of files that are not looked at.

    Returns:
        `tuple[str, str]`: `"whole"`; or `"torn"`, if its writing was interrupted; or `"damaged"`, if a file is not as
        it was written. Then why. Checkpoints of other trainers, which know of no list of files, are whole once they
        have Trainer's state, which comes last.
    """
    folder = Path(directory)
    path = folder / MANIFEST_FILE_NAME
    if not path.is_file():
        is_of_another_trainer = not (folder / SELECTOR_FILE_NAME).is_file()
        if is_of_another_trainer and (folder / TRAINER_STATE_NAME).is_file():
            return "whole", ""
        return "torn", f"{folder} was interrupted while it was written: it has no {MANIFEST_FILE_NAME}"
    try:
        files: dict[str, Any] = json.loads(path.read_text())["files"]
        for name, expected in files.items():
            file = folder / name
            if any(fnmatch(name, pattern) for pattern in not_needed):
                continue
            if not file.is_file():
                return "damaged", f"{file} is missing"
            size = file.stat().st_size
            if size != expected["bytes"]:
                return "damaged", f"{file} is damaged: it has {size:,} bytes, and had {expected['bytes']:,}"
            if expected["crc32"] is not None and _checksum(file) != expected["crc32"]:
                return "damaged", f"{file} is damaged: its checksum is not that of the file that was written"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return "damaged", f"{path} is damaged and cannot be read ({error})"
    return "whole", ""


def check_checkpoint(directory: str | os.PathLike, not_needed: tuple[str, ...] = ()) -> None:
    """
    Refuse a checkpoint that is not whole.

    Args:
        directory (`str` or `os.PathLike`): an existing folder.
        not_needed (`tuple[str]`): patterns of files that are not looked at.

    Raises:
        `ValueError`: names the file and the cure.
    """
    state, why = find_problem(directory, not_needed)
    if state == "torn":
        raise ValueError(
            f"{why}. Resume from an earlier one: `resume_from_checkpoint=True` takes the newest that is whole."
        )
    if state == "damaged":
        raise ValueError(
            f"{why}. Resume from an earlier checkpoint: `resume_from_checkpoint={LAST_INTACT!r}` takes the newest "
            "whose files are all as they were written."
        )


def find_checkpoint(output_dir: str | os.PathLike, skip_damaged: bool) -> Path | None:
    """
    The newest checkpoint of a run that is whole. Those whose writing was interrupted are passed over with a warning.

    Args:
        output_dir (`str` or `os.PathLike`): output folder of the run.
        skip_damaged (`bool`): pass over damaged ones as well.

    Returns:
        `pathlib.Path`: its folder, or `None` if the run has not written any.

    Raises:
        `ValueError`: if the newest is damaged and `skip_damaged` is not set, or if there are some and none is whole.
    """
    reasons = []
    for _, folder in sorted(_checkpoints(output_dir).items(), reverse=True):
        state, why = find_problem(folder)
        if state == "whole":
            return folder
        if state == "damaged" and not skip_damaged:
            check_checkpoint(folder)
        logger.warning(f"{why}. An earlier checkpoint is tried.")
        reasons.append(why)
    if reasons:
        raise ValueError(
            f"No checkpoint in {output_dir} is whole: {'; '.join(reasons)}. Train from the start, "
            "`resume_from_checkpoint=None`."
        )
    return None


def is_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a folder has the name of one of Trainer's checkpoints."""
    return bool(_FOLDER_NAME.fullmatch(Path(directory).name))


def read_resume_option(value: str | os.PathLike | bool | None, output_dir: str | os.PathLike) -> str | bool | None:
    """
    What `resume_from_checkpoint` asks for. From the command line it is text, where `true` and `false` are meant so.

    Args:
        value (`str`, `os.PathLike` or `bool`, *optional*): the option.
        output_dir (`str` or `os.PathLike`): output folder of the run.

    Returns:
        `str` or `bool`, *optional*: a folder, `True`, `"last_intact"`, or `None` to train from the start.

    Raises:
        `ValueError`: for a path that is no folder, or if the run has no checkpoint to choose from. Whether one is
            whole is not looked at.
    """
    text = str(value) if isinstance(value, bool) else os.fspath(value or "")
    if text.lower() in ("", "false"):
        return None
    is_newest = text.lower() == "true"
    if not is_newest and text != LAST_INTACT:
        if not os.path.isdir(text):
            raise ValueError(
                f"`resume_from_checkpoint={text!r}` is no folder. Give a checkpoint's, such as "
                f"{os.path.join(output_dir, f'{PREFIX_CHECKPOINT_DIR}-500')!r}; True for the newest one in "
                f"`output_dir`, or {LAST_INTACT!r} for the newest that is undamaged."
            )
        return text
    if not _checkpoints(output_dir):
        raise ValueError(
            f"No valid checkpoint found in {output_dir}, to go on as `resume_from_checkpoint={text}` asks. Leave it "
            "out to train from the start, or give the `output_dir` of the run to go on with."
        )
    return True if is_newest else text


def _checkpoints(output_dir: str | os.PathLike) -> dict[int, Path]:
    """The folders of a run's checkpoints by their steps, whole or not."""
    return {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := _FOLDER_NAME.fullmatch(path.name))
    }


def _describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "crc32": _checksum(path) if size <= _CHECKSUM_UP_TO else None}


def _checksum(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
