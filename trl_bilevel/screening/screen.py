"""A dataset screened before anybody trains: every row scored, the share of bad rows, and a cut with a promise."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..curation import count_kept, rank_rows
from ..parquet_files import write_parquet
from ..row_format_checks import columns_read, refuse_gaps
from ..run_records import describe_screen, save_facts
from ..scoring import score_dataset
from ..whole_files import write_whole
from .answer_statistics import STATISTICS, AnswerStatistics
from .calibration import NoiseRate
from .evidence import FEWEST_TRUSTED
from .row_screener import RowScreener
from .screened_folder import SCREENED_FILE_NAME
from .verdict import Verdict, conclude, summarize


logger = get_logger(__name__)

SCREEN_COLUMNS = ("score", "p_value", "good_probability", "rank", "kept", "screen_reason", *STATISTICS)
"""Columns that a screen adds to the user's."""
SUMMARY_FILE_NAME = "screening.json"
_STATISTICS_FOLDER_NAME = "_statistics"


class Screening(NamedTuple):
    """What one forward pass says of a dataset."""

    scored: Dataset
    """All rows with their columns unchanged, and those of [`SCREEN_COLUMNS`]."""
    facts: dict[str, Any]
    """See [`~trl_bilevel.screening.verdict.Verdict`]; JSON values."""

    @property
    def noise_rate(self) -> NoiseRate:
        """Share of bad rows, with a 90 % interval."""
        return NoiseRate(**self.facts["noise_rate"])

    @property
    def num_trusted(self) -> int:
        """Trusted rows that the others were compared with."""
        return self.facts["num_trusted"]

    @property
    def is_informative(self) -> bool:
        """Whether anything tells the rows from the trusted ones."""
        return self.facts["is_informative"]

    @property
    def control_auroc(self) -> float:
        """Share of pairs in which the model tells a trusted answer from one of another prompt; chance is 0.5."""
        return self.facts["control_auroc"]

    def curate(self, keep_ratio: float | str | None = "auto") -> Dataset:
        """
        The rows to keep, with their scores.

        Args:
            keep_ratio (`float` or `"auto"`, *optional*, defaults to `"auto"`): share of the rows, in (0, 1], those of
                the best rank; `"auto"` leaves out the rows of which at most a tenth is good on average; `None` keeps
                all.

        Raises:
            `ValueError`: for another word, or a share out of range.
        """
        if keep_ratio == "auto":
            return self.scored.select(np.flatnonzero(self.scored["kept"]))
        num_kept = count_kept(len(self.scored), keep_ratio)
        return self.scored.select(np.flatnonzero(np.array(self.scored["rank"]) <= num_kept))

    def summary(self) -> str:
        """What was found, in a few sentences, with what is promised and under which assumption."""
        return "\n".join(summarize(self.facts))


def screen_dataset(
    model: str | PreTrainedModel | list[str | PreTrainedModel],
    train_dataset: Dataset | IterableDataset,
    validation_dataset: Dataset,
    args: SFTConfig | None = None,
    *,
    processing_class: Any = None,
    formatting_func: Callable[[dict], str] | None = None,
    output_dir: str | os.PathLike | None = None,
    tokens_per_batch: int = 4096,
    chunk_size: int = 10_000,
) -> Screening:
    """
    Score every row by one forward pass under a model that has learned neither the rows nor the trusted ones.

    Each answer's token statistics are compared with those of the trusted rows' answers; the same comparison of the
    trusted rows with each other calibrates what comes of it. Only answers count, in conversations the assistant's
    turns, whatever a training loss would cover.

    Args:
        model (`str` or `PreTrainedModel`): name or folder of the model, or the model itself, with its adapter or
            quantized as it is. One that was trained on the trusted rows takes every other row for bad. Of a list of
            models, one after the other reads the rows, and their evidence is added up; the statistics in the result
            are those of the first.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): N rows in any format that
            [`~trl.SFTTrainer`] takes.
        validation_dataset (`datasets.Dataset`): rows you trust, in the same format; at least 10, better 100.
        args ([`~trl.SFTConfig`], *optional*): how rows are prepared, `max_length` above all, and the device.
        processing_class (`transformers.PreTrainedTokenizerBase`, *optional*): the model's own by default; of a list of
            models a list.
        formatting_func (`Callable`, *optional*): makes text of a row, as for [`~trl.SFTTrainer`].
        output_dir (`str` or `os.PathLike`, *optional*): folder that the scored rows are written to as
            `scored/train.parquet`, with a summary. An interrupted screen goes on there. Needed for a stream.
        tokens_per_batch (`int`, *optional*, defaults to `4096`): tokens of a forward pass, padding included.
        chunk_size (`int`, *optional*, defaults to `10_000`): rows between two saves.

    Returns:
        [`Screening`]: the scored rows, the noise rate, and the cut.

    Raises:
        `ValueError`: for datasets that are empty, lack a column, or have one that the screen adds; for too few trusted
            rows; and for a stream without `output_dir`.

    Example:

    ```python
    from datasets import load_dataset
    from trl_bilevel import screen_dataset

    screening = screen_dataset(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        load_dataset("json", data_files="mixture.jsonl", split="train"),
        load_dataset("json", data_files="trusted.jsonl", split="train"),
    )
    print(screening.summary())
    curated = screening.curate()
    ```
    """
    _check(train_dataset, validation_dataset, args, formatting_func, output_dir)
    models = model if isinstance(model, list) else [model]
    tokenizers = processing_class if isinstance(processing_class, list) else [processing_class] * len(models)
    names: list[str | None] = []
    of_rows, of_trusted, of_swapped = [], [], []
    scored: Dataset | None = None
    for number, (one, tokenizer) in enumerate(zip(models, tokenizers, strict=True)):
        with tempfile.TemporaryDirectory() as scratch:
            trainer = preparing_trainer(one, validation_dataset, args, tokenizer, formatting_func, scratch)
            if output_dir is None and trainer.accelerator.num_processes > 1:
                raise ValueError("In a run of several processes the main one writes the rows: give `output_dir`.")
            names.append(one if isinstance(one, str) else get_config_model_id(one.config))
            is_in_4bit = getattr(trainer.model, "is_loaded_in_4bit", False)  # which only quantized models have
            screener = RowScreener(trainer, tokens_per_batch)
            of_trusted.append(screener.statistics(validation_dataset))
            of_swapped.append(screener.swapped_statistics(validation_dataset))
            name = f"{_STATISTICS_FOLDER_NAME}{number or ''}"
            folder = None if output_dir is None else Path(output_dir) / name
            rows = score_dataset(screener, train_dataset, folder, chunk_size)
        columns = rows.with_format("numpy")
        of_rows.append(AnswerStatistics(*(np.array(columns[name]) for name in AnswerStatistics._fields)))
        scored = rows if scored is None else scored
    assert scored is not None
    verdict = conclude(of_rows, of_trusted, of_swapped)
    if num_without := int(np.isnan(verdict.score).sum()):
        logger.warning(f"{num_without} of {len(scored)} rows have no answer left after truncation, and rank last.")
    screening = Screening(_with_columns(scored, verdict), verdict.facts)
    if output_dir is not None:
        if trainer.accelerator.is_main_process:
            facts = describe_screen(trainer.args, names, is_in_4bit, train_dataset, validation_dataset, verdict.facts)
            _write(screening, Path(output_dir), facts)
        trainer.accelerator.wait_for_everyone()
    return screening


def _check(
    train_dataset: Dataset | IterableDataset,
    validation_dataset: Dataset,
    args: SFTConfig | None,
    formatting_func: Callable[[dict], str] | None,
    output_dir: str | os.PathLike | None,
) -> None:
    """Before a model is loaded."""
    if not isinstance(validation_dataset, Dataset):
        raise TypeError(
            f"`validation_dataset` must be a `datasets.Dataset`, got {type(validation_dataset).__name__}. Trusted "
            "rows are few: read them whole, without `streaming=True`."
        )
    if len(validation_dataset) < FEWEST_TRUSTED:
        raise ValueError(
            f"`validation_dataset` has {len(validation_dataset)} rows, too few to tell what good answers look like. "
            f"Give at least {FEWEST_TRUSTED}, better 100."
        )
    if isinstance(train_dataset, IterableDataset) and output_dir is None:
        raise ValueError("Streamed rows are written as they are screened: give `output_dir`.")
    first = next(iter(train_dataset), None)
    if first is None:
        raise ValueError("`train_dataset` is empty, so there is nothing to screen.")
    if taken := sorted({"sample_id", *SCREEN_COLUMNS} & {*first} - {"sample_id"}):
        raise ValueError(f"`train_dataset` already has the columns {taken}, which a screen adds. Rename them first.")
    if formatting_func is None:
        text_field = "text" if args is None else args.dataset_text_field
        read = [columns_read(name, row, text_field) for name, row in _first_rows(first, validation_dataset[0])]
        if read[0] != read[1]:
            raise ValueError(
                f"`train_dataset` is read from the columns {read[0]} and `validation_dataset` from {read[1]}, so that "
                "other tokens would be compared. Bring both into one format."
            )
        refuse_gaps("validation_dataset", validation_dataset, read[1])


def _first_rows(first: dict, trusted: dict) -> list[tuple[str, dict]]:
    return [("train_dataset", first), ("validation_dataset", trusted)]


def preparing_trainer(
    model: str | PreTrainedModel,
    rows: Dataset,
    args: SFTConfig | None,
    processing_class: Any,
    formatting_func: Callable[[dict], str] | None,
    scratch: str,
) -> SFTTrainer:
    """TRL's trainer, which prepares rows and moves the model to its device; it is never trained."""
    if isinstance(model, str):
        chosen = {} if args is None else args.model_init_kwargs or {}
        model = _load(model, {"dtype": "auto", "device_map": None, **chosen})
    if args is None:
        args = SFTConfig(scratch, bf16=False, report_to="none", activation_checkpointing=False)
    if args.model_init_kwargs is not None:  # which have served
        args = dataclasses.replace(args, model_init_kwargs=None)
    is_quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    needs_adapter = is_quantized and not is_peft_model(model)  # Trainer takes no other quantized models
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=processing_class,
        formatting_func=formatting_func,
        peft_config=LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM") if needs_adapter else None,
    )
    if needs_adapter:
        trainer.model = trainer.model.unload()
    return trainer


def _load(name: str, options: dict[str, Any]) -> PreTrainedModel | PeftModel:
    """A model, or an adapter on its base."""
    if find_adapter_config_file(name, revision=options.get("revision")) is not None:
        return AutoPeftModelForCausalLM.from_pretrained(name, **options)
    return create_model_from_path(name, **options)


def _with_columns(rows: Dataset, verdict: Verdict) -> Dataset:
    columns = {
        "score": verdict.score,
        "p_value": verdict.p_values,
        "good_probability": verdict.good_probability,
        "rank": rank_rows(np.nan_to_num(-verdict.score), ~np.isnan(verdict.score)),
        "kept": ~verdict.left_out,
        "screen_reason": verdict.reasons,
    }
    if "sample_id" not in rows.column_names:
        columns = {"sample_id": np.arange(len(rows)), **columns}
    added = Dataset(pa.table(columns))
    original = [name for name in rows.column_names if name not in AnswerStatistics._fields]
    parts = [rows.select_columns(original), added, rows.select_columns([*STATISTICS])]
    return concatenate_datasets([part.with_format(None) for part in parts], axis=1, split=rows.split)


def _write(screening: Screening, folder: Path, facts: dict[str, Any]) -> None:
    """The scored rows, then the summary, each whole or not at all."""
    write_parquet(screening.scored, folder / SCREENED_FILE_NAME)
    summary = {**screening.facts, "summary": screening.summary()}
    write_whole(folder / SUMMARY_FILE_NAME, lambda partial: partial.write_text(json.dumps(summary, indent=2) + "\n"))
    save_facts(folder, facts)
