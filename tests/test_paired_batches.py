"""Which validation rows join which training rows."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SkipBatchSampler
from datasets import Dataset
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from trl_bilevel.paired_batches import (
    NUM_TOKENS,
    REFINED_SPANS,
    ROW_OF_SEQUENCE,
    SAMPLE_INDEX_COLUMN,
    SAMPLE_INDICES,
    PairedCollator,
    PairedDataset,
    PairedIndex,
    PairedSampler,
    ValidationStream,
)
from trl_bilevel.preference_pairs import REFERENCE_NLL


def _sampler(num_training, num_validation, training_batch, validation_batch, epoch=0):
    stream = ValidationStream(num_validation, seed=3)
    sampler = PairedSampler(SequentialSampler(range(num_training)), stream, training_batch, validation_batch)
    sampler.set_epoch(epoch)
    return sampler


def _validation_rows(sampler):
    return [row for index in sampler for row in index.validation]


def test_stream_visits_every_row_once_per_pass_in_a_new_order():
    rows = ValidationStream(7, seed=0).rows(0, 21)
    passes = [rows[0:7], rows[7:14], rows[14:21]]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len(set(passes)) == 3
    assert ValidationStream(7, seed=1).rows(0, 21) != rows


def test_stream_is_a_function_of_the_position():
    stream = ValidationStream(7, seed=0)
    whole = stream.rows(0, 40)
    assert stream.rows(23, 40) == whole[23:]
    assert stream.rows(5, 9) == whole[5:9]


@pytest.mark.parametrize(("training_batch", "validation_batch"), [(4, 4), (4, 2), (4, 1), (2, 6), (3, 2)])
def test_every_full_batch_holds_the_validation_rows_asked_for(training_batch, validation_batch):
    pairs = list(_sampler(12, 50, training_batch, validation_batch))
    for start in range(0, 12, training_batch):
        batch = pairs[start : start + training_batch]
        assert sum(len(index.validation) for index in batch) == validation_batch
    assert [index.training for index in pairs] == list(range(12))


def test_epochs_continue_the_stream():
    first = _validation_rows(_sampler(10, 7, 4, 4, epoch=0))
    second = _validation_rows(_sampler(10, 7, 4, 4, epoch=1))
    assert tuple(first + second) == ValidationStream(7, seed=3).rows(0, 20)


def test_pairs_do_not_depend_on_the_batch_size_at_equal_ratio():
    large, small = _sampler(12, 7, 8, 4), _sampler(12, 7, 2, 1)
    assert [index[:2] for index in large] == [index[:2] for index in small]


@pytest.mark.parametrize(("batch_size", "batches_per_step"), [(3, 2), (6, 1), (1, 6), (2, 3)])
def test_every_row_knows_its_optimizer_step(batch_size, batches_per_step):
    sampler = PairedSampler(
        SequentialSampler(range(20)), ValidationStream(5, seed=0), batch_size, 1, batches_per_step, steps_per_epoch=4
    )
    assert [index.step for index in sampler] == [row // 6 for row in range(20)]
    sampler.set_epoch(2)
    assert [index.step for index in sampler] == [8 + row // 6 for row in range(20)]


@pytest.mark.parametrize("num_rows", [3, 8, 41, 44, 47, 48])
def test_last_batches_are_filled_as_accelerate_does_and_are_of_the_last_step(num_rows):
    """Of several processes the last may get rows of the epoch's beginning only."""
    shares = []
    for batches_per_round in (1, 4):
        sampler = PairedSampler(
            SequentialSampler(range(num_rows)),
            ValidationStream(5, seed=0),
            4,
            2,
            8,
            -(-num_rows // 32),
            batches_per_round,
        )
        sampler.set_epoch(1)
        batches = BatchSampler(sampler, 4, drop_last=False)
        shards = [BatchSamplerShard(batches, num_processes=4, process_index=process) for process in range(4)]
        shares.append([[*shard] for shard in shards])
        assert [len(shard) for shard in shards] == [len(share) for share in shares[-1]]
    by_accelerate, by_us = ([[[index[:2] for index in batch] for batch in share] for share in half] for half in shares)
    assert by_us == by_accelerate
    first_step = -(-num_rows // 32)
    for share in shares[1]:
        steps = [{index.step for index in batch} for batch in share]
        assert steps == [{first_step + number // 2} for number in range(len(share))]


def test_epoch_reaches_the_sampler_after_a_resume_on_several_processes():
    """accelerate wraps the sampler once more then and hands the epoch to the dataset instead."""
    dataset = PairedDataset(
        Dataset.from_dict({"labels": [[1]] * 12, SAMPLE_INDEX_COLUMN: range(12)}),
        Dataset.from_dict({"labels": [[2]] * 7}),
    )
    dataset.sampler = _sampler(12, 7, 4, 4)
    sharded = BatchSamplerShard(BatchSampler(dataset.sampler, 4, drop_last=False), num_processes=2, process_index=0)
    loader = DataLoaderShard(dataset, batch_sampler=SkipBatchSampler(sharded, skip_batches=1), collate_fn=list)
    loader.set_epoch(3)
    assert dataset.sampler.epoch == 3


def test_generator_is_that_of_the_training_sampler():
    sampler = PairedSampler(RandomSampler(range(5)), ValidationStream(3, seed=0), 1, 1)
    sampler.generator = generator = torch.Generator()
    assert sampler.training_sampler.generator is generator
    assert not hasattr(_sampler(5, 3, 1, 1), "generator")


def test_batch_keeps_the_identity_and_order_of_rows():
    training = Dataset.from_dict({"labels": [[1], [2], [3]], SAMPLE_INDEX_COLUMN: [10, 11, 12]})
    validation = Dataset.from_dict({"labels": [[7], [8]]})
    rows = PairedDataset(training, validation).__getitems__([PairedIndex(2, (1,)), PairedIndex(0, (0, 1))])
    batch = PairedCollator(lambda rows: {"labels": [row["labels"] for row in rows]})(rows)
    assert batch == {"labels": [[3], [1], [8], [7], [8]], SAMPLE_INDICES: [12, 10], REFERENCE_NLL: [],
                     ROW_OF_SEQUENCE: [0, 1], REFINED_SPANS: [None, None], NUM_TOKENS: [0] * 5}  # fmt: skip


def test_collator_that_merges_rows_is_refused():
    with pytest.raises(ValueError, match="turned 2 rows into 1"):
        PairedCollator(lambda rows: {"labels": [[1, 2]]})([{"labels": [1]}, {"labels": [2]}])
