"""The files of a data selector: its state in a checkpoint, and its table of scores for other runs."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import save_file

from .selector_updates import SelectorActivation
from .whole_files import damage_explained, write_whole


SELECTOR_FILE_NAME = "_data_selector.safetensors"
"""Of an output folder Trainer pushes no file whose name begins with `_`: a stream's sample ids are in it."""
_EARLIER_FILE_NAME = "data_selector.safetensors"  # which was pushed
SELECTOR_TABLE_NAME = "data_selector.parquet"
_ACTIVATION_KEY, _PRIOR_KEY = b"selector_activation", b"selector_prior"
METADATA_KEYS = (_ACTIVATION_KEY, _PRIOR_KEY)
"""Metadata of the table: how logits become weights, and the sigma of a logit of which nothing is known."""
_MAIN_SPLIT = "train"
_OF_A_SPLIT = re.compile(r"data_selector-(\w+)\.parquet")
_NO_PRIOR = 0.5  # of softmax weights, and of files of before it was kept
_STATE_VERSION = "3"
_TABLE_COLUMNS = ("sample_id", "logit", "scored")


class Selector(Protocol):
    """What the files and the transfer ask of a [`~trl_bilevel.DataSelector`], which imports both."""

    activation: SelectorActivation
    prior: float

    @property
    def sample_ids(self) -> pa.ChunkedArray: ...
    @property
    def logits(self) -> torch.Tensor: ...
    @property
    def scored(self) -> torch.Tensor: ...
    @property
    def neutral_logit(self) -> float: ...
    def weights(self) -> torch.Tensor: ...


def write_selector_state(
    directory: str | os.PathLike, tensors: dict[str, torch.Tensor], identity: dict[str, Any]
) -> Path:
    """
    Write `_data_selector.safetensors`, whole or not at all.

    Args:
        directory (`str` or `os.PathLike`): an existing directory.
        tensors (`dict[str, torch.Tensor]`): the selector's state.
        identity (`dict[str, Any]`): what must be the same when the file is read, JSON values.
    """
    (Path(directory) / _EARLIER_FILE_NAME).unlink(missing_ok=True)
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


def selector_table(selector: Selector) -> pa.Table:
    """The columns `sample_id`, `logit`, `weight` and `scored`, a row per training row; what logits mean."""
    columns = {
        "sample_id": selector.sample_ids,
        "logit": selector.logits.numpy(),
        "weight": selector.weights().numpy(),
        "scored": selector.scored.numpy(),
    }
    metadata = {_ACTIVATION_KEY: selector.activation, _PRIOR_KEY: repr(float(selector.prior))}
    return pa.table(columns).replace_schema_metadata(metadata)


def selector_table_name(split: str) -> str:
    """The file of a split's selector: those of several splits of one dataset lie side by side."""
    path = Path(SELECTOR_TABLE_NAME)
    return path.name if split == _MAIN_SPLIT else f"{path.stem}-{split}{path.suffix}"


def write_selector_table(directory: str | os.PathLike, table: pa.Table, name: str = SELECTOR_TABLE_NAME) -> Path:
    """
    Write `data_selector.parquet`, whole or not at all.

    Args:
        directory (`str` or `os.PathLike`): created if it does not exist.
        table (`pyarrow.Table`): what [`selector_table`] returns.
        name (`str`): of the file.
    """
    path = Path(directory) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, lambda partial: pa.parquet.write_table(table, partial))


def read_selector_table(
    name_or_path: str | os.PathLike,
    revision: str | None = None,
    token: str | None = None,
    split: str | None = None,
) -> tuple[pa.Table, SelectorActivation, float]:
    """
    Read the table that [`write_selector_table`] wrote, or the logits that SEAL published as a table.

    Args:
        name_or_path (`str` or `os.PathLike`): a directory, a `.pt` file, or a dataset repository on the Hub.
        revision (`str`, *optional*): of the repository.
        token (`str`, *optional*): to read it with.
        split (`str`, *optional*): of the dataset; `train`, or the only one there is, if `None`.

    Returns:
        The table, the activation and the prior, 0.5 where the file says none.

    Raises:
        `FileNotFoundError`: if there is no selector.
        `ValueError`: if the file is damaged or holds something else, or if the split must be said.
    """
    path = Path(name_or_path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _read_logits(path), "softmax", _NO_PRIOR
    if path.is_dir():
        file = path / _choose_table([found.name for found in path.iterdir()], split, name_or_path)
    elif path.exists():
        file = path
    else:
        file = _download_table(str(name_or_path), revision, token, split)
    with damage_explained(file, "Write it anew with `DataSelector.save_pretrained`."):
        table = pa.parquet.read_table(file)
    activation, prior = ((table.schema.metadata or {}).get(key, b"").decode() for key in METADATA_KEYS)
    missing = [name for name in _TABLE_COLUMNS if name not in table.column_names]
    if missing or activation not in get_args(SelectorActivation):
        raise ValueError(f"{file} is not the table of a data selector: it has the columns {table.column_names}.")
    return table, activation, _read_prior(prior, file)


def _read_prior(text: str, file: Path) -> float:
    try:
        prior = float(text or _NO_PRIOR)
    except ValueError:
        prior = float("nan")
    if not 0 < prior < 1:
        raise ValueError(f"{file} is not the table of a data selector: its prior is {text!r}, not within (0, 1).")
    return prior


def _download_table(repo_id: str, revision: str | None, token: str | None, split: str | None) -> Path:
    api = HfApi(token=token)
    name = selector_table_name(split or _MAIN_SPLIT)
    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    try:
        try:
            return Path(api.hf_hub_download(repo_id, name, **options))
        except RemoteEntryNotFoundError:
            if split is not None:
                raise
            name = _choose_table(api.list_repo_files(repo_id, **options), split, repo_id)
            return Path(api.hf_hub_download(repo_id, name, **options))
    except (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    ) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is neither a directory here nor a dataset repository with a {name} ({error})."
        ) from error


def _choose_table(names: list[str], split: str | None, where: str | os.PathLike) -> str:
    """Of the files in a folder or repository the one of a split; of the main one, or the only one, by default."""
    name = selector_table_name(split or _MAIN_SPLIT)
    others = sorted(match[1] for match in map(_OF_A_SPLIT.fullmatch, names) if match)
    if name not in names and split is None and len(others) == 1:
        return selector_table_name(others[0])
    if name not in names and split is None and others:
        raise ValueError(f"{where} has selectors of the splits {others}. Choose one with `split=`.")
    if name not in names:
        raise FileNotFoundError(
            f"{Path(where) / name} does not exist. Write it with `DataSelector.save_pretrained`, or publish the "
            "dataset with `push_curated_dataset`."
        )
    return name


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
