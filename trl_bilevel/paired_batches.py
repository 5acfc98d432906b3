"""
Training and validation rows in one batch.

A validation row travels with a training row: the sampler yields pairs of indices, so batching, sharding over processes
and skipping ahead on resume are those of PyTorch and accelerate, and one forward pass serves both levels.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .packing import PackedRows
from .parquet_files import read_column
from .preference_pairs import REFERENCE_NLL, is_paired, split_pair
from .self_refining_collator import SelfRefiningCollator


SAMPLE_INDEX_COLUMN = "bilevel_sample_index"
"""Column added to the training dataset: the row's position in the dataset that the user passed."""
SAMPLE_INDICES = "sample_indices"
"""Batch key: list of int, the `SAMPLE_INDEX_COLUMN` of the batch's training rows, which come first."""
ROW_OF_SEQUENCE = "row_of_sequence"
"""Batch key: list of int, the training row that each training sequence answers; a refined row has several."""
REFINED_SPANS = "refined_spans"
"""Batch key: list of [`RefinedSpan`], of each training sequence; `None` for original answers."""
NUM_TOKENS = "num_completion_tokens"
"""Batch key: list of int, the tokens of each sequence that have a prediction and are not ignored."""
ROW_LENGTHS = "row_lengths"
"""Batch key: list of int, tokens of each sequence where all of them follow one another in one (padding-free)."""
ROW_WIDTHS = "row_widths"
"""Batch key: list of int, the columns of a padded batch that each sequence needs; only where all inputs are (R, L) and
padded on the right by TRL's collator."""
HAS_IMAGES = "has_images"
"""Batch key: `True` where rows have images, which processors put one after the other, as many as a row has."""
OPTIMIZER_STEP = "optimizer_step"
"""Key of a training row on its way to the collator: the step that trains on it, from 0."""
_OURS = (SAMPLE_INDEX_COLUMN, REFERENCE_NLL, OPTIMIZER_STEP)


def without_our_keys(row: dict[str, Any]) -> dict[str, Any]:
    """A prepared row of the user's, who may have columns of the names by which the collator knows its rows."""
    return {name: value for name, value in row.items() if name not in _OURS}


def add_sample_indices(dataset: Dataset) -> Dataset:
    """
    Add `SAMPLE_INDEX_COLUMN`, the position of each row.

    A format or transform of the user's is kept; adding the column through it would bake it into the rows.
    """
    user_format = dataset.format
    indexed = dataset.with_format(None).add_column(SAMPLE_INDEX_COLUMN, np.arange(len(dataset)))
    if user_format["type"] is None:
        return indexed
    columns = [*user_format["columns"], SAMPLE_INDEX_COLUMN]
    return indexed.with_format(
        user_format["type"], columns, user_format["output_all_columns"], **user_format["format_kwargs"]
    )


def read_sample_indices(training: Dataset) -> np.ndarray:
    """`SAMPLE_INDEX_COLUMN` of a prepared training dataset, int64 of shape (number of its rows,)."""
    return read_column(training, SAMPLE_INDEX_COLUMN).to_numpy()


class PairedIndex(NamedTuple):
    """A training row and the validation rows that travel with it; with packing, packed sequences of rows."""

    training: int
    validation: tuple[int, ...]
    step: int = 0
    """Optimizer step that trains on them, from 0."""


class RefinedSpan(NamedTuple):
    """Where a refined response is in its sequence."""

    start: int
    """Position of its first token's prediction: that of the token, less one."""
    log_probs: np.ndarray
    """Of its tokens under the policy that generated them, in nats. Not a list, whose numbers a dataloader would visit
    one by one."""


class ValidationStream:
    """
    An endless sequence of validation rows: one random permutation of all rows after another.

    Any stretch of it is a pure function of the seed and the position, so nothing has to be saved to resume.

    Args:
        num_rows (`int`): number of validation rows.
        seed (`int`): seed of the permutations.
    """

    def __init__(self, num_rows: int, seed: int):
        self.num_rows = num_rows
        self.seed = seed
        self._cached_pass = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def rows(self, start: int, stop: int) -> tuple[int, ...]:
        """Rows at the positions `start` (included) to `stop` (excluded)."""
        return tuple(self._row(position) for position in range(start, stop))

    def _row(self, position: int) -> int:
        current_pass, offset = divmod(position, self.num_rows)
        if current_pass != self._cached_pass:
            self._permutation = np.random.default_rng([self.seed, current_pass]).permutation(self.num_rows)
            self._cached_pass = current_pass
        return int(self._permutation[offset])


def num_validation_rows(num_training_rows: int, training_batch_size: int, validation_batch_size: int) -> int:
    """Validation rows that the first n training rows bring along: ceil(n * V / T), so that full batches hold V."""
    return -(-num_training_rows * validation_batch_size // training_batch_size)


class PairedSampler(Sampler[PairedIndex]):
    """
    Pairs the rows of a training sampler, in its order, with the validation stream.

    With T training and V validation rows per batch, the first n training rows of an epoch bring ceil(n * V / T)
    validation rows along. So every full batch holds exactly V, and any way to cut an epoch into batches, micro-batches
    or processes sees the same pairs.

    Args:
        training_sampler (`torch.utils.data.Sampler`): yields the training rows of an epoch.
        validation_stream ([`ValidationStream`]): where validation rows come from.
        training_batch_size (`int`): T, rows.
        validation_batch_size (`int`): V, rows.
        batches_per_step (`int`): micro-batches of all processes in an optimizer step.
        steps_per_epoch (`int`): optimizer steps in an epoch.
        batches_per_round (`int`): batches dealt out at a time, one per process. Above 1 the last round of an epoch is
            filled with its first rows, as accelerate would fill it, but these know the step that they are now of.
    """

    def __init__(
        self,
        training_sampler: Sampler[int],
        validation_stream: ValidationStream,
        training_batch_size: int,
        validation_batch_size: int,
        batches_per_step: int = 1,
        steps_per_epoch: int = 0,
        batches_per_round: int = 1,
    ):
        self.training_sampler = training_sampler
        self.validation_stream = validation_stream
        self.training_batch_size = training_batch_size
        self.validation_batch_size = validation_batch_size
        self.batches_per_step = batches_per_step
        self.steps_per_epoch = steps_per_epoch
        self.batches_per_round = batches_per_round
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch
        if isinstance(self.training_sampler, SeedableRandomSampler):
            self.training_sampler.set_epoch(epoch)

    @property
    def generator(self) -> torch.Generator | None:
        """Of a sampler that is not seedable: accelerate sets one, the same in all processes."""
        return self.training_sampler.generator  # type: ignore[attr-defined]

    @generator.setter
    def generator(self, generator: torch.Generator) -> None:
        self.training_sampler.generator = generator  # type: ignore[attr-defined]

    @property
    def num_rows(self) -> int:
        """N, training rows or packed sequences of them."""
        return len(self.training_sampler)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """N, and what fills the last batches."""
        rows_per_round = self.training_batch_size * self.batches_per_round if self.batches_per_round > 1 else 1
        return -(-self.num_rows // rows_per_round) * rows_per_round

    def __iter__(self) -> Iterator[PairedIndex]:
        epoch_start = self.epoch * self._validation_rows_for(self.num_rows)
        stop = epoch_start
        first: list[PairedIndex] = []
        for position, training_row in enumerate(self.training_sampler):
            start, stop = stop, epoch_start + self._validation_rows_for(position + 1)
            index = PairedIndex(training_row, self.validation_stream.rows(start, stop), self._step_at(position))
            if position < self.training_batch_size * self.batches_per_round:
                first.append(index)
            yield index
        for position in range(self.num_rows, len(self)):
            yield first[(position - self.num_rows) % len(first)]._replace(step=self._step_at(position))

    def _step_at(self, position: int) -> int:
        return self.epoch * self.steps_per_epoch + position // (self.training_batch_size * self.batches_per_step)

    def _validation_rows_for(self, num_training_rows: int) -> int:
        return num_validation_rows(num_training_rows, self.training_batch_size, self.validation_batch_size)


class PairedDataset(TorchDataset):
    """
    The prepared training and validation datasets behind one index, a [`PairedIndex`].

    Args:
        training (`datasets.Dataset`): prepared training rows with `SAMPLE_INDEX_COLUMN`.
        validation (`datasets.Dataset`): prepared validation rows, without that column; or preference pairs as
            [`~trl_bilevel.preference_pairs.prepare_pairs`] makes them, each of which becomes two rows.
        packed_training ([`~trl_bilevel.packing.PackedRows`], *optional*): what an index of training rows stands for.
        packed_validation ([`~trl_bilevel.packing.PackedRows`], *optional*): the same for validation rows.
    """

    def __init__(
        self,
        training: Dataset,
        validation: Dataset,
        packed_training: PackedRows | None = None,
        packed_validation: PackedRows | None = None,
    ):
        # Read here, once: a transform of the user's may return rows without this column
        self.sample_indices = read_sample_indices(training)
        self.training = training
        self.validation = validation
        self.packed_training = packed_training
        self.packed_validation = packed_validation
        self.sampler: PairedSampler | None = None

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate when it cannot reach the sampler: on several processes, resumed within an epoch."""
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.training if self.packed_training is None else self.packed_training)

    @property
    def num_validation(self) -> int:
        """Validation rows, or packed sequences of them."""
        return len(self.validation if self.packed_validation is None else self.packed_validation)

    def __getitem__(self, index: PairedIndex) -> list[dict[str, Any]]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[PairedIndex]) -> list[dict[str, Any]]:
        """The rows of a batch, training rows first; PyTorch's fetcher calls this once per batch."""
        training = [(row, index.step) for index in indices for row in _unpacked(index.training, self.packed_training)]
        training_rows = [
            {**without_our_keys(row), SAMPLE_INDEX_COLUMN: int(self.sample_indices[number]), OPTIMIZER_STEP: step}
            for (number, step), row in zip(
                training, self.training.__getitems__([number for number, _ in training]), strict=True
            )
        ]
        validation_indices = [
            row for index in indices for item in index.validation for row in _unpacked(item, self.packed_validation)
        ]
        return training_rows + read_validation_rows(self.validation, validation_indices)


def read_validation_rows(validation: Dataset, numbers: list[int]) -> list[dict[str, Any]]:
    """Prepared validation rows by their numbers; of preference pairs two rows each."""
    rows = validation.__getitems__(numbers) if numbers else []
    if is_paired(validation):
        return [row for pair in rows for row in split_pair(pair)]
    return [without_our_keys(row) for row in rows]


def _unpacked(item: int, packed: PackedRows | None) -> list[int]:
    return [item] if packed is None else packed.rows_of(item)


class PairedCollator:
    """
    Collates training and validation rows with the trainer's own collator and keeps the training rows' identity, and
    the reference's log-likelihoods of preference pairs. Refined responses take the place of the training rows.

    Args:
        collator (`Callable`): collator for the rows themselves. It must keep their order, and their number unless it
            is padding-free.
        self_refining (`SelfRefiningCollator`, *optional*): knows the refined responses.
        refresh_delay (`int`): optimizer steps that a refresh takes to reach the batches: they are collated ahead. With
            it, what a step trains on depends on the step alone, and a resumed run sees the same.
        padding_free (`bool`): whether the collator is TRL's and puts all rows into one sequence.
        has_images (`bool`): whether rows have images, which the collator processes.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        self_refining: SelfRefiningCollator | None = None,
        refresh_delay: int = 0,
        padding_free: bool = False,
        has_images: bool = False,
    ):
        self.collator = collator
        self.has_images = has_images
        self.padding_free = padding_free
        self.self_refining = self_refining
        self.refresh_delay = refresh_delay

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        sample_indices = [row[SAMPLE_INDEX_COLUMN] for row in rows if SAMPLE_INDEX_COLUMN in row]
        reference_nll = [row[REFERENCE_NLL] for row in rows if REFERENCE_NLL in row]
        steps = [row[OPTIMIZER_STEP] for row in rows if OPTIMIZER_STEP in row]
        rows = [without_our_keys(row) for row in rows]
        num_training = len(sample_indices)
        row_of_sequence = list(range(num_training))
        log_probs: list[list[float]] = [[]] * num_training
        if self.self_refining is not None and steps:
            refined = self.self_refining.refine(
                rows[:num_training], sample_indices, up_to_step=max(steps) - self.refresh_delay
            )
            rows = refined.sequences + rows[num_training:]
            row_of_sequence, log_probs = refined.row_of_sequence, refined.log_probs
        batch = self.collator(rows)
        row_labels: Any  # of each row, shape (L,)
        if self.padding_free:
            row_labels = [torch.tensor(row.get("labels", row["input_ids"])) for row in rows]
            batch[ROW_LENGTHS] = [len(labels) for labels in row_labels]
            num_tokens = [int(labels[1:].ne(-100).sum()) for labels in row_labels]
        else:
            row_labels = torch.as_tensor(batch["labels"])  # (R, L)
            if len(row_labels) != len(rows):
                raise ValueError(
                    f"The data collator turned {len(rows)} rows into {len(row_labels)}. Row weights need a collator "
                    "that returns one sequence per row, in the order of the rows."
                )
            num_tokens = row_labels[:, 1:].ne(-100).sum(dim=1).tolist()
            widths = _row_widths(self.collator, batch)
            if self.has_images:
                batch[HAS_IMAGES] = True
            elif widths is not None:
                batch[ROW_WIDTHS] = widths
        # Lists, not tensors: they stay on the host, where rows are weighed without waiting for the device
        batch[SAMPLE_INDICES] = sample_indices
        batch[REFERENCE_NLL] = reference_nll
        batch[ROW_OF_SEQUENCE] = row_of_sequence
        batch[NUM_TOKENS] = num_tokens
        batch[REFINED_SPANS] = [
            _find_span(labels, values) if values else None
            for labels, values in zip(row_labels, log_probs, strict=False)  # validation rows follow
        ]
        return batch


def _row_widths(collator: Any, batch: dict[str, Any]) -> list[int] | None:
    """
    Columns up to the last token of each row, rounded up as the collator rounds the batch's; `None` of batches that
    cannot be cut there: another collator may pad on the left or have inputs of other shapes.
    """
    if not isinstance(collator, DataCollatorForLanguageModeling) or "attention_mask" not in batch:
        return None
    attended = batch["attention_mask"]  # (R, L)
    if any(not torch.is_tensor(value) or value.shape != attended.shape for value in batch.values()):
        return None
    lengths = attended.sum(dim=1)
    if not torch.equal(attended.bool(), torch.arange(attended.shape[1]) < lengths[:, None]):
        return None
    multiple = collator.pad_to_multiple_of or 1
    return [-(-length // multiple) * multiple for length in lengths.tolist()]


def _find_span(labels: torch.Tensor, log_probs: list[float]) -> RefinedSpan:
    positions = labels.ne(-100).nonzero().flatten()
    if len(positions) != len(log_probs) or positions[-1] - positions[0] >= len(log_probs):
        raise ValueError(
            f"The data collator kept {len(positions)} of the {len(log_probs)} tokens of a refined response. "
            "Importance ratios need all of them: shorten sequences with `max_length`, not in the collator."
        )
    return RefinedSpan(int(positions[0]) - 1, np.array(log_probs, dtype=np.float32))
