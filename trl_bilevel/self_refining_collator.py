"""
Stored responses in place of the originals.

The collator only reads: it never generates and never holds the model, so it works in data loading workers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .refined_responses import ResponseStore


Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
Row = dict[str, Any]
RowKey = Callable[[Row], int]


class RefinedRows(NamedTuple):
    """Sequences to train on, some of them refined responses."""

    sequences: list[Row]
    """For each row its original, or its G responses next to each other."""
    row_of_sequence: list[int]
    """Position of each sequence's row in the batch."""
    log_probs: list[list[float]]
    """Of each sequence: the response's log-probabilities when it was generated, in nats; empty for an original."""


class SelfRefiningCollator:
    """
    Puts refined responses in place of the rows' original answers, then collates.

    [`BilevelSFTTrainer`] uses it by itself as soon as `refine_ratio` is larger than 0. In a plain [`~trl.SFTTrainer`]
    a [`SelfRefiningCallback`] generates the responses it puts in:

    ```python
    from trl import SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl_bilevel import RefinementConfig, SelfRefiningCallback, SelfRefiningCollator

    collator = SelfRefiningCollator(DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id))
    callback = SelfRefiningCallback(collator, RefinementConfig(refine_ratio=0.1, refine_mode="random"))
    trainer = SFTTrainer(model, args, train_dataset=dataset, data_collator=collator, callbacks=[callback])
    ```

    A response is used from a refresh until the row is refined again; a row that is never chosen keeps its original.
    Batches that were collated before a refresh keep the older responses: every response carries the log-probabilities
    under the policy that generated it, so its importance ratio is right however old it is.

    Args:
        data_collator (`Callable`): collates rows of `input_ids` and `labels`.
    """

    def __init__(self, data_collator: Collator):
        self.data_collator = data_collator
        self.row_key: RowKey | None = None
        self.store: ResponseStore | None = None
        # In memory that data loading workers share: what the callback has finished since they were started
        self._last_refresh = torch.full((1,), -1, dtype=torch.int64).share_memory_()

    def connect(self, store: ResponseStore, row_key: RowKey) -> None:
        """
        Say where the responses are; before the first batch.

        Args:
            store ([`~trl_bilevel.refined_responses.ResponseStore`]): the responses.
            row_key (`Callable`): under which number the store knows a row.
        """
        self.store, self.row_key = store, row_key
        self.publish(-1)

    def publish(self, step: int) -> None:
        """Use the responses of refreshes up to this step from the next batch on, in all workers."""
        self._last_refresh[0] = step

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Collate rows, refined ones with their newest responses."""
        if self.store is not None and self.row_key is not None:
            step = int(self._last_refresh[0])
            rows = self.refine(rows, [self.row_key(row) for row in rows], step).sequences
        return self.data_collator(rows)

    def refine(self, rows: list[Row], keys: list[int], up_to_step: int) -> RefinedRows:
        """
        The sequences to train on.

        Args:
            rows (`list[dict]`): prepared rows.
            keys (`list[int]`): the numbers under which the store knows them.
            up_to_step (`int`): use responses that were generated no later.
        """
        assert self.store is not None
        self.store.read_new_files(up_to_step)
        refined = RefinedRows([], [], [])
        for position, (row, key) in enumerate(zip(rows, keys, strict=True)):
            responses = self.store.responses_of(key, up_to_step)
            for response in responses:
                refined.sequences.append(_with_tokens(row, response.prompt_ids, response.completion_ids))
                refined.log_probs.append(response.log_probs)
            if not responses:
                refined.sequences.append(row)
                refined.log_probs.append([])
            refined.row_of_sequence.extend([position] * max(1, len(responses)))
        return refined


def _with_tokens(row: Row, prompt_ids: list[int], completion_ids: list[int]) -> Row:
    """A prepared row with another answer, and the masks that go with its tokens."""
    is_answer = [0] * len(prompt_ids) + [1] * len(completion_ids)
    masks = {"attention_mask": [1] * len(is_answer), "completion_mask": is_answer, "assistant_masks": is_answer}
    return {
        **row,
        **{name: mask for name, mask in masks.items() if name in row},
        "input_ids": prompt_ids + completion_ids,
        "labels": [-100] * len(prompt_ids) + completion_ids,
    }
