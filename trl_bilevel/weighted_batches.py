"""Weights on their way to the loss: packed along with the tokens of their rows, and part of each batch."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig, pack_dataset
from trl.trainer.utils import global_then_local_main_first


_WEIGHTS = "loss_weights"


def without_packing(args: SFTConfig) -> SFTConfig:
    """The same options for rows that are packed afterwards: packing cuts and shuffles them itself."""
    args = copy.copy(args)
    args.max_length, args.shuffle_dataset = None, False
    return args


def pack_weighted_rows(
    dataset: Dataset | IterableDataset, column: str, args: SFTConfig, name: str
) -> Dataset | IterableDataset:
    """
    Pack prepared rows as [`~trl.SFTTrainer`] does, each token with the weight of its row.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows with `input_ids` and `labels`, and a number in
            `column`.
        column (`str`): the weights; in packed sequences a list, as long as `input_ids`.
        args ([`~trl.SFTConfig`]): how to pack.
        name (`str`): of the dataset, for the progress bar.

    Raises:
        `ValueError`: without `max_length`.
    """
    if args.max_length is None:
        raise ValueError("`packing=True` needs `max_length`, the tokens of a packed sequence.")

    def give_to_tokens(row: dict[str, Any]) -> dict[str, Any]:
        return {column: [float(row[column])] * len(row["input_ids"])}

    options: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        options = {"num_proc": args.dataset_num_proc, "desc": f"Packing {name} dataset"}
    with global_then_local_main_first():
        dataset = dataset.select_columns(["input_ids", "labels", column]).map(give_to_tokens, **options)
        if args.shuffle_dataset:  # as TRL does, before packing and after it
            dataset = dataset.shuffle(seed=args.seed)
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, options)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


class WeightedCollator:
    """
    A data collator whose batches say how much each row counts, or each token where rows share a sequence.

    Args:
        collator (`Callable`): the one that makes the batches.
        column (`str`): the rows' weights; of packed sequences a list.
        scale (`float`): what they are multiplied by.
        padding_free (`bool`): whether `collator` puts all rows into one sequence, one after the other.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], column: str, scale: float, padding_free: bool):
        self._collator = collator
        self._column = column
        self._scale = scale
        self._padding_free = padding_free

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        weights = [(torch.as_tensor(row[self._column], dtype=torch.float64) * self._scale).float() for row in rows]
        batch = self._collator([{name: row[name] for name in row if name != self._column} for row in rows])
        if self._padding_free:
            ids = [row["input_ids"] for row in rows]
            weights = [torch.cat([weight.expand(len(own)) for weight, own in zip(weights, ids, strict=True)])]
        if weights[0].dim() == 0:
            stacked = torch.stack(weights)[:, None]  # (B, 1)
        else:
            stacked = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
            stacked = torch.nn.functional.pad(stacked, (0, batch["labels"].shape[1] - stacked.shape[1]))  # (B, L)
        # Trainer casts floats to the precision of the model under DeepSpeed, and integers never
        batch[_WEIGHTS] = stacked.view(torch.int32)
        return batch


def take_weights(batch: dict[str, Any]) -> torch.Tensor | None:
    """
    Take the weights out of a batch; `None` in one of evaluation.

    Returns:
        `torch.Tensor`: fp32, of each sequence (B, 1), or of each token (B, L).
    """
    weights = batch.pop(_WEIGHTS, None)
    return None if weights is None else weights.view(torch.float32)
