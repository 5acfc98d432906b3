"""The files of a data selector: its state in a checkpoint, and its table of scores for other runs."""

import json
import os
import pickle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import save_file

from .selector_updates import SelectorActivation
from .whole_files import damage_explained, write_whole


SELECTOR_FILE_NAME = "data_selector.safetensors"
SELECTOR_TABLE_NAME = "data_selector.parquet"
_STATE_VERSION = "3"
_TABLE_COLUMNS = ("sample_id", "logit", "scored")


def write_selector_state(
    directory: str | os.PathLike, tensors: dict[str, torch.Tensor], identity: dict[str, Any]
) -> Path:
    """
    Write `data_selector.safetensors`, whole or not at all.

    Args:
        directory (`str` or `os.PathLike`): an existing directory.
        tensors (`dict[str, torch.Tensor]`): the selector's state.
        identity (`dict[str, Any]`): what must be the same when the file is read, JSON values.
    """
    metadata = {"format": "pt", "selector": json.dumps({"format_version": _STATE_VERSION, **identity})}
    return write_whole(
        Path(directory) / SELECTOR_FILE_NAME, lambda partial: save_file(tensors, partial, metadata=metadata)
    )


def read_selector_state(directory: str | os.PathLike, identity: dict[str, Any]) -> dict[str, torch.Tensor]:
    """
    Read what [`write_selector_state`] wrote.

    Raises:
        `FileNotFoundError`: if the directory holds no selector state.
        `ValueError`: if the file is damaged, or was written with another identity.
    """
    path = Path(directory) / SELECTOR_FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, so the learned row weights cannot be restored. Resume from a checkpoint that "
            "BilevelSFTTrainer wrote, or train from the start."
        )
    with damage_explained(path, "Resume from another checkpoint."), safe_open(path, framework="pt") as file:
        stored = json.loads((file.metadata() or {}).get("selector", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    expected = {"format_version": _STATE_VERSION, **identity}
    differing = [
        f"{key} {stored.get(key)!r} (now {value!r})" for key, value in expected.items() if stored.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{path} was written for another run: {', '.join(differing)}. Resume with the same training rows, "
            "sample ids and selector options, or train from the start."
        )
    return tensors


def write_selector_table(directory: str | os.PathLike, table: pa.Table, activation: SelectorActivation) -> Path:
    """
    Write `data_selector.parquet`, whole or not at all.

    Args:
        directory (`str` or `os.PathLike`): created if it does not exist.
        table (`pyarrow.Table`): a row per training row, with the columns `sample_id`, `logit` and `scored` at least.
        activation (`"softmax"` or `"sigmoid"`): how logits become weights.
    """
    path = Path(directory) / SELECTOR_TABLE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({"selector_activation": activation})
    return write_whole(path, lambda partial: pa.parquet.write_table(table, partial))


def read_selector_table(name_or_path: str | os.PathLike) -> tuple[pa.Table, SelectorActivation]:
    """
    Read the table that [`write_selector_table`] wrote, or the logits that SEAL published as a table.

    Args:
        name_or_path (`str` or `os.PathLike`): a directory, a `.pt` file, or a dataset repository on the Hub.

    Raises:
        `FileNotFoundError`: if there is no selector.
        `ValueError`: if the file is damaged or holds something else.
    """
    path = Path(name_or_path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _read_logits(path), "softmax"
    if path.is_dir() or path.exists():
        file = path / SELECTOR_TABLE_NAME if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist. Write it with `DataSelector.save_pretrained`.")
    else:
        try:
            file = Path(hf_hub_download(str(name_or_path), SELECTOR_TABLE_NAME, repo_type="dataset"))
        except (EntryNotFoundError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            raise FileNotFoundError(
                f"{str(name_or_path)!r} is neither a directory here nor a dataset repository with a "
                f"{SELECTOR_TABLE_NAME} ({error})."
            ) from error
    with damage_explained(file, "Write it anew with `DataSelector.save_pretrained`."):
        table = pa.parquet.read_table(file)
    activation = (table.schema.metadata or {}).get(b"selector_activation", b"").decode()
    missing = [name for name in _TABLE_COLUMNS if name not in table.column_names]
    if missing or activation not in get_args(SelectorActivation):
        raise ValueError(f"{file} is not the table of a data selector: it has the columns {table.column_names}.")
    return table, activation


def _read_logits(path: Path) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        logits = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a tensor ({error}).") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 1 or not logits.isfinite().all() or not len(logits):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"{path} must hold one vector of finite logits, a number per row; it holds {found}.")
    return pa.table(
        {
            "sample_id": np.arange(len(logits)),
            "logit": logits.detach().float().numpy(),
            "scored": np.ones(len(logits), dtype=bool),
        }
    )
