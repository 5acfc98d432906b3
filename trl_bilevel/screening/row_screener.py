"""The forward pass of a screen: statistics of each row's answer, in batches of similar length."""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from peft import get_peft_model_state_dict

from ..assistant_turns import prepare_answers
from ..batch_layout import padded
from ..labelled_positions import score_labels
from ..paired_batches import read_sample_indices
from ..refine_prompts import stop_token_ids
from ..run_settings import row_options
from .answer_statistics import STATISTICS, AnswerStatistics, answer_statistics
from .evidence import FEWEST_TRUSTED
from .positive_control import swap_answers


class RowScreener:
    """
    Statistics of rows under a model that is not trained.

    Args:
        trainer ([`~trl.SFTTrainer`]): holds the model and prepares rows for it.
        tokens_per_batch (`int`): padding included; a row that is longer is a batch by itself.
    """

    columns: tuple[str, ...] = AnswerStatistics._fields
    """Columns that [`score`] adds."""

    def __init__(self, trainer: Any, tokens_per_batch: int):
        self.trainer = trainer
        self.tokens_per_batch = tokens_per_batch

    def fingerprint(self) -> str:
        """Of what decides the statistics: the model's parameters, its template, and how rows are cut."""
        model = self.trainer.model
        states = get_peft_model_state_dict(model, adapter_name=model.active_adapter) if is_peft_model(model) else {}
        # All parameters of a large model take long to read: of each one the sum speaks for it
        sums = {name: float(value.detach().float().sum()) for name, value in {**model.state_dict(), **states}.items()}
        facts = [sums, row_options(self.trainer.args), self.trainer.chat_template, STATISTICS]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @torch.no_grad()
    def score(self, rows: Dataset) -> dict[str, np.ndarray]:
        """The columns of [`AnswerStatistics`], shape (N,); NaN for a row without an answer after truncation."""
        return self.statistics(rows)._asdict()

    @torch.no_grad()
    def statistics(self, rows: Dataset) -> AnswerStatistics:
        """Statistics of N rows in any format that [`~trl.SFTTrainer`] takes, in their order."""
        prepared = self._prepare(rows)
        positions = read_sample_indices(prepared)
        return self._statistics_of(prepared, positions, rows, positions)

    @torch.no_grad()
    def swapped_statistics(self, rows: Dataset) -> AnswerStatistics:
        """Those of the same rows, each with the answer of another one, in no order; NaN where too few have one."""
        prepared = self._prepare(rows)
        if len(prepared) < FEWEST_TRUSTED:
            raise ValueError(
                f"{len(prepared)} of {len(rows)} trusted rows have an answer left after truncation, and at least "
                f"{FEWEST_TRUSTED} are needed. Raise `max_length`, or give more."
            )
        swapped = swap_answers(prepared)
        return self._statistics_of(swapped, np.arange(len(swapped)), rows, read_sample_indices(prepared))

    def _statistics_of(
        self, prepared: Dataset, positions: np.ndarray, rows: Dataset, readable: np.ndarray
    ) -> AnswerStatistics:
        """Each process takes its share of the batches; all of them get all statistics."""
        num_rows = len(rows)
        lengths = pa.compute.list_value_length(
            prepared.select_columns(["input_ids"]).with_format("arrow")[:].column("input_ids")
        ).to_numpy()
        trainer = self.trainer
        eos_token_ids = trainer.model.generation_config.eos_token_id
        end_ids = set[int]()
        if len(readable) > 0:  # the first row may be one that nothing is said in
            first = rows[int(readable[0])]
            end_ids = {*stop_token_ids(trainer._tokenizer, eos_token_ids, trainer.chat_template, first)}
        was_training = trainer.model.training
        trainer.model.eval()
        batches = batches_by_length(lengths, self.tokens_per_batch)
        own = batches[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
        try:
            found = [(positions[batch], self._statistics_of_batch(prepared.select(batch), end_ids)) for batch in own]
        finally:
            trainer.model.train(was_training)
        columns = {name: np.full(num_rows, np.nan) for name in STATISTICS}
        hashes = np.zeros(num_rows, dtype=np.int64)
        for batch, of_batch in gather_object(found):
            for name in STATISTICS:
                columns[name][batch] = getattr(of_batch, name)
            hashes[batch] = of_batch.answer_hash
        return AnswerStatistics(**columns, answer_hash=hashes)

    def _prepare(self, rows: Dataset) -> Dataset:
        return prepare_answers(self.trainer, rows, "screened")

    def _statistics_of_batch(self, rows: Dataset, end_ids: set[int]) -> AnswerStatistics:
        trainer = self.trainer
        examples = [{"input_ids": row["input_ids"], "labels": row.get("labels", row["input_ids"])} for row in rows]
        inputs = trainer._prepare_inputs(padded(trainer.data_collator)(examples))
        with trainer.accelerator.autocast():
            outputs = score_labels(trainer.model, inputs, trainer.args)
        return answer_statistics(
            outputs.log_probs,
            outputs.entropy,
            inputs["input_ids"],
            outputs.label_mask,
            inputs["attention_mask"].bool(),
            end_ids,
        )


def batches_by_length(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """
    Rows of similar length together, the longest first, so that memory runs out at once or not at all.

    Args:
        lengths (`np.ndarray`): tokens of each row, shape (N,).
        tokens_per_batch (`int`): of a batch, padding included.

    Example:

    ```python
    >>> [batch.tolist() for batch in batches_by_length(np.array([2, 5, 3, 2]), tokens_per_batch=6)]
    [[1], [2, 0], [3]]

    ```
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens_per_batch // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches
