"""Scores for rows that were never trained on: one forward pass a row, in chunks that survive an interruption."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset, IterableDataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm

from .amortized_selector import AmortizedSelector, captured_hidden_states, pool_completions
from .losses import row_losses
from .paired_batches import add_sample_indices, read_sample_indices
from .value_function import ValueFunction


SCORE_COLUMNS = ("score", "loss", "value_loss", "selector_score")
_MANIFEST_NAME = "scoring.json"


class RowScorer:
    """
    Scores rows with a trained model, as it was trained: same formatting, truncation and completion tokens.

    Args:
        trainer ([`~trl.SFTTrainer`]): holds the model and prepares rows for it.
        value_function ([`~trl_bilevel.value_function.ValueFunction`], *optional*): to score by the excess loss.
        amortized_selector ([`~trl_bilevel.amortized_selector.AmortizedSelector`], *optional*): for `selector_score`.
        batch_size (`int`): rows per forward pass.
    """

    def __init__(
        self,
        trainer: Any,
        value_function: ValueFunction | None,
        amortized_selector: AmortizedSelector | None,
        batch_size: int,
    ):
        self.trainer = trainer
        self.value_function = value_function
        self.amortized_selector = amortized_selector
        self.batch_size = batch_size

    def fingerprint(self) -> str:
        """Of what decides the scores: the trained parameters and the head."""
        digest = hashlib.sha256()
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                digest.update(parameter.detach().float().sum(dtype=torch.float64).cpu().numpy().tobytes())
        digest.update(repr([self.value_function is None, self.amortized_selector is None]).encode())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def score(self, rows: Dataset) -> dict[str, np.ndarray]:
        """
        The columns of `SCORE_COLUMNS` that apply, float64 of shape (N,).

        `score`, higher is better, is the loss under the value function minus the loss, and without one the negative
        loss; both in nats per completion token. NaN for a row without completion tokens after truncation.
        """
        trainer = self.trainer
        indexed = add_sample_indices(rows)
        if not trainer._skip_prepare_dataset:
            indexed = trainer._prepare_dataset(
                indexed, trainer.processing_class, trainer.args, False, trainer._formatting_func, "scored"
            )
        positions = read_sample_indices(indexed)
        # Rows of similar length share a batch; the longest first, so that memory runs out at once or not at all
        lengths = pa.compute.list_value_length(
            indexed.select_columns(["input_ids"]).with_format("arrow")[:].column("input_ids")
        ).to_numpy()
        order = np.argsort(-lengths, kind="stable")

        columns: dict[str, np.ndarray] = {"loss": np.full(len(rows), np.nan)}
        if self.value_function is not None:
            columns["value_loss"] = np.full(len(rows), np.nan)
        if self.amortized_selector is not None:
            columns["selector_score"] = np.full(len(rows), np.nan)
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                batch_rows = order[start : start + self.batch_size]
                examples = [
                    {"input_ids": row["input_ids"], "labels": row["labels"]} for row in indexed.select(batch_rows)
                ]
                for name, values in self._score_batch(
                    trainer._prepare_inputs(trainer.data_collator(examples))
                ).items():
                    columns[name][positions[batch_rows]] = values.double().cpu().numpy()
        finally:
            trainer.model.train(was_training)
        score = columns["value_loss"] - columns["loss"] if self.value_function is not None else -columns["loss"]
        return {"score": score, **columns}

    def _score_batch(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scores = {}
        with captured_hidden_states(self.trainer.model) as hidden_states:
            scores["loss"] = self._losses(inputs)
        if self.amortized_selector is not None:
            pooled = pool_completions(hidden_states.pop(), inputs["labels"]).cpu()
            scores["selector_score"] = self.amortized_selector.score(pooled, scores["loss"].float().cpu())
        if self.value_function is not None:
            with self.value_function.active():
                scores["value_loss"] = self._losses(inputs)
        return scores

    def _losses(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.trainer.compute_loss_context_manager():
            outputs = self.trainer.model(**inputs, use_cache=False, fused_lm_head=True)
        return row_losses(outputs.log_probs, outputs.label_mask).mean  # (B,)


class _Chunk(NamedTuple):
    number: int
    start: int
    rows: Dataset


def score_dataset(
    scorer: RowScorer, dataset: Dataset | IterableDataset, output_dir: str | os.PathLike | None, chunk_size: int
) -> Dataset:
    """
    Score every row, chunk by chunk.

    Args:
        scorer ([`RowScorer`]): scores a chunk.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows in the format that was trained on.
        output_dir (`str` or `os.PathLike`, *optional*): where each chunk is written as soon as it is scored. A second
            call goes on after the chunks that are there. Needed for an `IterableDataset`, which never fits in memory.
        chunk_size (`int`): rows per chunk.

    Returns:
        `datasets.Dataset`: the rows with the columns that [`RowScorer.score`] adds, read from `output_dir` if given.

    Raises:
        `ValueError`: for a streamed dataset without `output_dir`, a column that scoring adds itself, an empty dataset,
            or chunks in `output_dir` that belong to another model or another chunk size.
    """
    if output_dir is None and not isinstance(dataset, Dataset):
        raise ValueError("Streamed rows are written as they are scored: give `output_dir`.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    taken = sorted(set(SCORE_COLUMNS) & set(dataset.column_names or ()))
    if taken:
        raise ValueError(
            f"The dataset already has the columns {taken}, which scoring adds. Drop or rename them first."
        )
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        _check_manifest(folder, {"model": scorer.fingerprint(), "chunk_size": chunk_size})
    total = len(dataset) if isinstance(dataset, Dataset) else None
    done = (lambda number: False) if folder is None else (lambda number: _chunk_path(folder, number).is_file())

    tables: list[pa.Table] = []
    had_progress_bars = not are_progress_bars_disabled()
    disable_progress_bars()  # of the preparation of every single chunk
    try:
        with tqdm(total=total, unit="row", desc="Scoring") as progress:
            for chunk in _chunks(dataset, chunk_size, done):
                progress.update(chunk.start - progress.n)
                scores = scorer.score(chunk.rows)
                plain = chunk.rows.with_format(None)
                table = plain.data.table if plain._indices is None else plain.flatten_indices().data.table
                for name, values in scores.items():
                    table = table.append_column(name, pa.array(values))
                if folder is None:
                    tables.append(table)
                else:
                    _write_chunk(table, _chunk_path(folder, chunk.number))
                progress.update(len(chunk.rows))
    finally:
        if had_progress_bars:
            enable_progress_bars()
    if folder is None:
        if not tables:
            raise ValueError("The dataset is empty, so there is nothing to score.")
        return Dataset(pa.concat_tables(tables))
    files = sorted(str(path) for path in folder.glob("scored-*.parquet"))
    if not files:
        raise ValueError("The dataset is empty, so there is nothing to score.")
    return Dataset.from_parquet(files)


def _chunks(dataset: Dataset | IterableDataset, chunk_size: int, done: Callable[[int], bool]) -> Iterator[_Chunk]:
    if isinstance(dataset, Dataset):
        for number, start in enumerate(range(0, len(dataset), chunk_size)):
            if not done(number):
                yield _Chunk(number, start, dataset.select(range(start, min(start + chunk_size, len(dataset)))))
        return
    number = 0
    while done(number):
        number += 1
    stream: Iterable[dict[str, Any]] = iter(dataset.skip(number * chunk_size))
    while rows := list(islice(stream, chunk_size)):
        yield _Chunk(number, number * chunk_size, Dataset.from_list(rows, features=dataset.features))
        number += 1


def _chunk_path(folder: Path, number: int) -> Path:
    return folder / f"scored-{number:06d}.parquet"


def _write_chunk(table: pa.Table, path: Path) -> None:
    partial = path.with_suffix(".partial")
    pa.parquet.write_table(table, partial)
    os.replace(partial, path)


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Chunks of another model or another size must not be mixed with new ones."""
    path = folder / _MANIFEST_NAME
    if path.is_file():
        found = json.loads(path.read_text())
        if found != manifest:
            raise ValueError(
                f"{folder} holds scores of another model or with another chunk size ({found}, now {manifest}). Choose "
                "another `output_dir`, or delete it."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(manifest))
    os.replace(partial, path)
