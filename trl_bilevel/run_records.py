"""
What a run leaves on disk for its curated dataset, so that it can be cut and published later, without the model.

The names start with `_`: Trainer does not push such files of an output folder.
"""

import json
import os
import secrets
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, IterableDataset, load_from_disk
from trl import SFTConfig
from trl.trainer.utils import get_config_model_id

from .card_options import card_options, model_options
from .curation import count_kept, curate_dataset
from .data_selector import DataSelector
from .dataset_sources import describe_dataset, is_hub_id
from .parquet_files import column
from .refined_responses import CHECKPOINT_FILE_NAME as RESPONSES_FILE_NAME
from .refined_responses import read_arrived
from .row_scores import find_scores, read_scores
from .screening.screened_folder import is_screened, read_screened
from .screening.training_evidence import after_training
from .screening.verdict import read_verdict
from .selector_files import METADATA_KEYS, selector_table
from .selector_transfer import logit_probabilities
from .whole_files import damage_explained, write_whole


ROWS_FOLDER_NAME = "_training_rows"
FACTS_FILE_NAME = "_run.json"
_FINGERPRINT_FILE_NAME = "rows_fingerprint.txt"
_PACKAGES = ("trl-bilevel", "trl", "transformers", "peft", "datasets", "torch")


def save_training_rows(directory: str | os.PathLike, rows: Dataset, fingerprint: str) -> None:
    """
    Write the training rows as the user passed them, unless they are there already.

    Args:
        directory (`str` or `os.PathLike`): output folder of the run.
        rows (`datasets.Dataset`): all N of them.
        fingerprint (`str`): tells whether rows on disk are the same.
    """
    folder = Path(directory) / ROWS_FOLDER_NAME
    mark = folder / _FINGERPRINT_FILE_NAME
    # The first knows of prepared rows only; of the other columns, and of text that was cut off, the second
    fingerprints = f"{fingerprint} {rows._fingerprint}"
    if mark.is_file() and mark.read_text() == fingerprints:
        return
    partial = folder.with_name(f"{ROWS_FOLDER_NAME}.{secrets.token_hex(4)}.partial")
    try:
        rows.with_format(None).save_to_disk(partial)
        (partial / _FINGERPRINT_FILE_NAME).write_text(fingerprints)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_facts(directory: str | os.PathLike, facts: dict[str, Any]) -> None:
    """Write what [`describe_run`] returns, for the cards, whole or not at all."""
    text = json.dumps(facts, indent=2) + "\n"
    write_whole(Path(directory) / FACTS_FILE_NAME, lambda path: path.write_text(text))


def curate_run(run_dir: str | os.PathLike, keep_ratio: float | str | None = None) -> Dataset:
    """
    The curated dataset of a run on disk, finished or interrupted; no model is loaded.

    Args:
        run_dir (`str` or `os.PathLike`): output folder of a run, of which the last checkpoint is taken if it was
            interrupted, or a checkpoint; or of a screen.
        keep_ratio (`float` or `"auto"`, *optional*): see [`BilevelSFTTrainer.curate`].

    Raises:
        `FileNotFoundError`: if there is no run, or it has not come to its first checkpoint.
        `ValueError`: if `keep_ratio` is out of range, or the files do not belong together.
    """
    directory = find_scores(run_dir)
    facts = read_facts(directory)
    if is_screened(directory):
        rows = read_screened(directory)
        num_kept = count_kept(len(rows), keep_ratio, num_dropped(facts))
        return rows.select(np.flatnonzero(column(rows, "rank") <= num_kept))
    if facts["training"].get("is_stream"):
        raise ValueError(
            f"{directory} is of a run on a stream, whose rows are not on disk. Curate in the training script: "
            "`trainer.curate(...)`. After a restart build the trainer as before and take the weights from disk, "
            f'`trainer.data_selector.load({str(directory)!r}, fingerprint="")`, instead of training.'
        )
    rows_folder = next(
        (
            folder / ROWS_FOLDER_NAME
            for folder in (directory, Path(os.path.abspath(directory)).parent)  # `.` has no parent
            if (folder / ROWS_FOLDER_NAME).is_dir()
        ),
        None,
    )
    if rows_folder is None:
        raise FileNotFoundError(
            f"{directory} has no training rows beside its scores. They are in the output folder of the run, unless it "
            "was trained with `save_training_rows=False`: then curate in the training script, `trainer.curate(...)`."
        )
    rows = load_from_disk(str(rows_folder))
    scores, fingerprint = read_scores(directory)
    if len(scores) != len(rows) or fingerprint != (rows_folder / _FINGERPRINT_FILE_NAME).read_text().split()[0]:
        raise ValueError(
            f"{directory} has scores of {len(scores)} rows, and {rows_folder} holds {len(rows)} others: they are of "
            "different runs. Curate in the training script, `trainer.curate(...)`, or train again."
        )
    logits, scored = scores.column("logit").to_numpy(), scores.column("scored").to_numpy()
    has_probabilities = scores.schema.metadata[METADATA_KEYS[0]] == b"sigmoid"
    good_probability = logit_probabilities(logits, scored) if has_probabilities else None
    verdict = read_verdict(rows_folder.parent, fingerprint) if facts.get("screening") else None
    if verdict is not None and "noise_rate_after_training" in facts["screening"]:
        assert good_probability is not None
        losses = scores.column("loss").to_numpy().astype(float)
        verdict = after_training(verdict, good_probability, losses, facts["prior_good_share"])
    responses = directory / RESPONSES_FILE_NAME
    with damage_explained(responses, "Give another checkpoint."):
        refined = read_arrived(responses) if responses.is_file() else None
    return curate_dataset(
        rows,
        scores.column("sample_id"),
        weights=scores.column("weight").to_numpy(),
        scores=logits,
        scored=scored,
        judged=scores.column("judged").to_numpy(),
        keep_ratio=keep_ratio,
        responses=refined,
        verdict=verdict,
        good_probability=good_probability,
    )


def read_selector(run_dir: str | os.PathLike) -> pa.Table:
    """
    The weights of a run on disk for other runs, see [`~trl_bilevel.selector_files.selector_table`].

    Raises:
        `FileNotFoundError`: if there is no run.
        `ValueError`: if its scores are damaged.
    """
    directory = find_scores(run_dir)
    if is_screened(directory):
        rows = read_screened(directory)
        selector = DataSelector(len(rows), activation="sigmoid", sample_ids=rows.data.column("sample_id"))
        selector.start_with(column(rows, "good_probability"))
        return selector_table(selector)
    scores, _ = read_scores(directory)
    metadata = scores.schema.metadata
    return scores.drop_columns("judged").replace_schema_metadata(
        {key: metadata[key] for key in METADATA_KEYS if key in metadata}
    )


def push_command(run_dir: str | os.PathLike, repo_id: str, sensitive: bool = False, **options: Any) -> str:
    """
    The command that publishes a run's curated dataset, with the same options; those that are `None` are left out.

    Example:

    ```python
    >>> push_command("out", "me/rows", keep_ratio=0.7, private=False, revision=None, sensitive=False)
    'trl-bilevel push out me/rows --keep_ratio 0.7 --private False'

    ```
    """
    words = ["trl-bilevel", "push", str(run_dir), repo_id]
    for name, value in options.items():
        if value is not None and (name, value) != ("keep_ratio", "auto"):  # the default
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, *["--sensitive"] * sensitive])


def upload_command(
    output_dir: str | os.PathLike, repo_id: str, private: bool | None = None, revision: str | None = None
) -> str:
    """
    The command that publishes a model on disk as Trainer would: without checkpoints, records and curated rows.

    Example:

    ```python
    >>> upload_command("out", "me/adapter", private=True)
    "hf upload me/adapter out . --private --exclude '_*' --exclude 'checkpoint-*' --exclude '*.parquet'"

    ```
    """
    words = ["hf", "upload", repo_id, str(output_dir), "."]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    for pattern in ("_*", "checkpoint-*", "*.parquet"):
        words += ["--exclude", pattern]
    return shlex.join(words)


def read_facts(run_dir: str | os.PathLike) -> dict[str, Any]:
    """
    What [`describe_run`] said of a run on disk.

    Raises:
        `FileNotFoundError`: if there is no run.
        `ValueError`: if the file is damaged.
    """
    path = find_scores(run_dir) / FACTS_FILE_NAME
    with damage_explained(path, "Give another checkpoint."):
        return json.loads(path.read_text())


def describe_run(
    args: Any,
    model: Any,
    training: Dataset | IterableDataset,
    validation: Dataset,
    has_value_function: bool,
    has_adaptive_weight: bool = False,
) -> dict[str, Any]:
    """
    The facts of a run that a card may show, JSON values: nothing local and nothing secret.

    Args:
        args ([`BilevelSFTConfig`]): options, see [`~trl_bilevel.card_options.card_options`].
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): what is trained. Its name is left out if it is
            that of a folder of this machine.
        training (`datasets.Dataset` or `datasets.IterableDataset`): rows as the user passed them.
        validation (`datasets.Dataset`): trusted rows, likewise.
        has_value_function (`bool`): whether the weights follow excess losses.
        has_adaptive_weight (`bool`, *optional*, defaults to `False`): whether lambda falls as rows prove good.
    """
    with_value_function = " with a value function" if has_value_function else ""
    and_adaptive = " and an adaptive validation weight" if has_adaptive_weight else ""
    return {
        "method": args.selection_method.upper() + with_value_function + and_adaptive,
        "base_model": _public_name(get_config_model_id(model.config)),
        "options": card_options(args),
        "model_options": model_options(model),
        **_describe_rows(training, validation),
    }


def describe_screen(
    args: SFTConfig,
    models: list[str | None],
    is_in_4bit: bool,
    training: Dataset | IterableDataset,
    validation: Dataset,
    screening: dict[str, Any],
) -> dict[str, Any]:
    """
    The same of a screen.

    Args:
        args ([`~trl.SFTConfig`]): how rows were prepared.
        models (`list[str | None]`): names of the models that read the rows.
        is_in_4bit (`bool`): whether they were quantized to 4 bits.
        training, validation: as for [`describe_run`].
        screening (`dict`): facts of its [`~trl_bilevel.screening.verdict.Verdict`].
    """
    shown = {"max_length": args.max_length, "dataset_text_field": args.dataset_text_field}
    defaults = type(args).__dataclass_fields__
    first, *others = map(_public_name, models)
    return {
        "method": "Screen",
        "base_model": first,
        "other_models": others,
        "options": {name: value for name, value in shown.items() if value != defaults[name].default},
        "model_options": {"load_in_4bit": True} if is_in_4bit else {},
        **_describe_rows(training, validation),
        "screening": screening,
        "cut": {"num_dropped": screening["num_left_out"]},
    }


def _public_name(model: str | None) -> str | None:
    return model if model and is_hub_id(model) else None


def _describe_rows(training: Dataset | IterableDataset, validation: Dataset) -> dict[str, Any]:
    return {
        "packages": {name: version(name).partition("+")[0] for name in _PACKAGES},
        "training": describe_dataset(training),
        "validation": describe_dataset(validation),
    }


def num_dropped(facts: dict[str, Any]) -> int:
    """Rows that `keep_ratio="auto"` leaves out of a run or a screen."""
    return facts.get("cut", {}).get("num_dropped", 0)
