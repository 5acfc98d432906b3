"""Datasets named on the command line: on the Hub, in a local folder, or in a file."""

import difflib
import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, ScriptArguments


_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_split(name: str, config: str | None, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """
    Load one split.

    Args:
        name (`str`): a dataset on the Hub; a folder written by `save_to_disk`, or of data files; or one CSV, JSON,
            JSON lines or Parquet file.
        config (`str`, *optional*): configuration of the dataset; not for files and `save_to_disk` folders.
        split (`str`): name of the split. Data files without splits are the split `train`.
        streaming (`bool`): read rows one after the other, without a copy in the cache.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` of a stream: the split.

    Raises:
        `ValueError`: for a file of another type, one that cannot be read or has no rows, or a split that does not
            exist.
        `FileNotFoundError`: if there is no such dataset.
    """
    path = Path(name)
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ValueError(f"{name} is not a dataset file. Use one that ends with {', '.join(sorted(_BUILDERS))}.")
    with _unreadable_explained(name):
        loaded = _load(name, config, streaming)
    # A folder of one split need not say which
    splits = {"train", str(loaded.split or "train").partition("[")[0]} if isinstance(loaded, Dataset) else {*loaded}
    if split not in splits:
        raise ValueError(f"The dataset {name} has no split {split!r}, only {sorted(splits)}.")
    if isinstance(loaded, (DatasetDict, IterableDatasetDict)):
        loaded = loaded[split]
    with _unreadable_explained(name):
        next(iter(loaded))  # before a model is loaded
    return loaded


def load_training_datasets(
    script_args: ScriptArguments, training_args: TrainingArguments, dataset_args: DatasetMixtureConfig
) -> tuple[Any, Any]:
    """
    What a script trains on and evaluates on, the latter `None` without evaluation.

    Args:
        script_args ([`~trl.ScriptArguments`]): a dataset and its splits.
        training_args (`transformers.TrainingArguments`): whether to evaluate.
        dataset_args ([`~trl.DatasetMixtureConfig`]): a mixture of several in its place.

    Raises:
        `ValueError`: for both, neither, or a split that does not exist.
    """
    from trl import get_dataset

    eval_dataset = None
    if dataset_args.datasets and script_args.dataset_name:
        raise ValueError("Give either `datasets` or `--dataset_name`, not both.")
    if dataset_args.datasets:
        mixture = get_dataset(dataset_args)
        train_dataset = _split_of(mixture, script_args.dataset_train_split)
        if training_args.eval_strategy != "no":
            eval_dataset = _split_of(mixture, script_args.dataset_test_split)
    elif script_args.dataset_name:
        name, config = script_args.dataset_name, script_args.dataset_config
        train_dataset = load_split(
            name, config, script_args.dataset_train_split, streaming=script_args.dataset_streaming
        )
        if training_args.eval_strategy != "no":
            eval_dataset = load_split(name, config, script_args.dataset_test_split)
    else:
        raise ValueError("Either `datasets` or `--dataset_name` must be given.")
    return train_dataset, eval_dataset


def _split_of(mixture: Any, split: str) -> Any:
    if split not in mixture:
        raise ValueError(
            f"The mixture of `datasets` has no split {split!r}, only {sorted(mixture)}. `test_split_size` sets rows "
            "apart for the evaluation."
        )
    return mixture[split]


@contextmanager
def _unreadable_explained(name: str) -> Iterator[None]:
    try:
        yield
    except (DatasetGenerationError, StopIteration, ValueError, pa.ArrowException) as error:
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise ValueError(f"The dataset {name} is empty.") from error
        raise ValueError(f"The dataset {name} cannot be read: {error.__cause__ or error}") from error


def _load(name: str, config: str | None, streaming: bool) -> Dataset | DatasetDict | IterableDatasetDict:
    path = Path(name)
    if path.is_file():
        return load_dataset(_BUILDERS[path.suffix], data_files=glob.escape(str(path)), streaming=streaming)
    if path.suffix in _BUILDERS and not path.exists():  # no name on the Hub: not worth a connection, and its retries
        similar = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")], n=1)
        meant = f" Did you mean {path.parent / similar[0]}?" if similar else ""
        raise FileNotFoundError(f"{name} is no file here.{meant}")
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return load_from_disk(name)  # memory-mapped: as good as a stream
    if path.is_dir() and glob.escape(str(path.resolve())) != str(path.resolve()):
        return _load_folder(path, config, streaming)
    try:
        return load_dataset(name, name=config, streaming=streaming)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} is no file or folder here and no dataset on the Hub: {error}") from error


def _load_folder(folder: Path, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """
    A folder of data files in whose path `datasets` would see a pattern, and read the files of another folder.

    Raises:
        `ValueError`: for a configuration, which a card in the folder would describe, and for files of several types.
    """
    escaped = glob.escape(str(folder.resolve()))
    if config is not None or (folder / "README.md").is_file():
        raise ValueError(
            f"the path of {folder} has one of the characters `[`, `*` or `?`, by which its card cannot be followed. "
            "Rename the folder, or name one file"
        )
    files = DataFilesDict.from_patterns(get_data_patterns(escaped), base_path=escaped)
    types = {Path(path).suffix for paths in files.values() for path in paths if Path(path).suffix in _BUILDERS}
    builders = {_BUILDERS[suffix] for suffix in types}
    if len(builders) != 1:
        raise ValueError(f"{folder} has files of the types {sorted(types)}. Name one file")
    data_files = {
        str(split): [glob.escape(path) for path in paths if Path(path).suffix in types]
        for split, paths in files.items()
    }
    return load_dataset(builders.pop(), data_files=data_files, streaming=streaming)
