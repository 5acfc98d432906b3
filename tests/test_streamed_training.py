"""A stream as the training dataset: the same run as on the same rows map-style, and what only streams have."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import StopWithinStep, prompt_completion_rows
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig

from trl_bilevel import BilevelSFTTrainer, DataSelector
from trl_bilevel.paired_batches import ValidationStream
from trl_bilevel.paired_stream import PairedStream
from trl_bilevel.parquet_files import write_parquet
from trl_bilevel.report import build_report
from trl_bilevel.run_records import curate_run, read_facts
from trl_bilevel.scripts import sft
from trl_bilevel.streamed_selector import ConsumedRows
from trl_bilevel.weight_history import WeightHistory


def rows_with_ids(num_rows: int) -> Dataset:
    return prompt_completion_rows(num_rows).add_column("uid", [f"row-{row}" for row in range(num_rows)])


class CountedRows:
    """A stream that knows how far it was read, and in how many passes."""

    def __init__(self, rows: Dataset):
        self.rows = rows
        self.num_read = 0

    def __call__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.num_read += 1
            yield row

    def stream(self) -> IterableDataset:
        return IterableDataset.from_generator(self, features=self.rows.features)


@pytest.fixture
def train(make_trainer) -> Callable[..., BilevelSFTTrainer]:
    def run(**options: Any) -> BilevelSFTTrainer:
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        options = {"sample_id_column": "uid", "train_sampling_strategy": "sequential", "optim": "sgd", **options}
        if options.get("value_function") == "adapter":
            options["peft_config"] = lora
        checkpoint = options.pop("resume_from", None)
        trainer = make_trainer(**options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    return run


def weights_by_id(trainer: BilevelSFTTrainer) -> dict[str | int, float]:
    selector = trainer.data_selector
    return dict(zip(selector.sample_ids.to_pylist(), selector.weights().tolist(), strict=True))


def assert_same_run(run: BilevelSFTTrainer, expected: BilevelSFTTrainer) -> None:
    assert weights_by_id(run) == pytest.approx(weights_by_id(expected), abs=1e-6)
    parameters = dict(expected.model.named_parameters())
    for name, value in run.model.named_parameters():
        torch.testing.assert_close(value, parameters[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"filter_ratio": 0.25, "amortized_selector": True},
        {"selection_method": "bmo"},
        {"value_function": "adapter", "per_device_validation_batch_size": 3},
        {"validation_loss_type": "nll", "padding_free": True, "max_length": None},
    ],
)
def test_a_stream_trains_like_its_rows(train, options):
    """Every step has all rows, so that the weights, whose mean over the rows seen is 1, are the same throughout."""
    rows = rows_with_ids(8)
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
    expected = train(train_dataset=rows, **options)
    streamed = train(train_dataset=rows.to_iterable_dataset(), **options)
    assert_same_run(streamed, expected)
    assert max(weights_by_id(streamed).values()) > 1.05


def test_resumed_stream_is_exact(train, tmp_path):
    """Stopped in the second pass over the rows: 7 of them, in batches of 4, shuffled anew in each pass."""
    stream = rows_with_ids(7).to_iterable_dataset().shuffle(seed=3, buffer_size=100)
    options = {"train_dataset": stream, "value_function": "adapter", "selector_learning_rate": 5.0}
    options |= {
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
        "optim": "adamw_torch",
        "dataloader_num_workers": 1,
    }
    unbroken = train(output_dir=str(tmp_path / "run"), **options)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    resumed = train(resume_from=checkpoint, output_dir=str(tmp_path / "next"), **options)
    assert resumed.state.global_step == 6
    assert_same_run(resumed, unbroken)
    assert list(weights_by_id(resumed)) == list(weights_by_id(unbroken))
    options["train_dataset"] = rows_with_ids(7).to_iterable_dataset().skip(1)
    with pytest.raises(ValueError, match="first 12 rows of the stream are not those that the checkpoint was trained"):
        train(resume_from=checkpoint, output_dir=str(tmp_path / "other"), **options)


def test_stream_stopped_within_a_step_counts_its_rows_once(train, make_trainer, tmp_path):
    options = {"train_dataset": rows_with_ids(7).to_iterable_dataset(), "max_steps": 6, "output_dir": str(tmp_path)}
    options |= {"save_strategy": "steps", "save_steps": 4}
    unbroken = train(**{**options, "output_dir": str(tmp_path / "unbroken")})
    stop = StopWithinStep(2)
    stop.trainer = make_trainer(**options, sample_id_column="uid", optim="sgd", callbacks=[stop])
    stop.trainer.train()
    resumed = train(resume_from=tmp_path / "checkpoint-2", **options)
    assert resumed.data_selector.consumed.count == 6 * 4
    assert_same_run(resumed, unbroken)
    assert_same_run(train(resume_from=tmp_path / "checkpoint-4", **options), unbroken)


def test_second_training_reads_the_stream_from_its_beginning(train, make_trainer, tmp_path):
    options = {"train_dataset": rows_with_ids(7).to_iterable_dataset(), "max_steps": 4, "sample_id_column": "uid"}
    options |= {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    trainer = make_trainer(**options)
    trainer.train()
    trainer.train()
    assert trainer.data_selector.consumed.count == 4 * 4
    make_trainer(**options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_curated_stream_is_read_no_further_than_needed(train, tmp_path):
    counted = CountedRows(rows_with_ids(2000))
    trainer = train(train_dataset=counted.stream(), max_steps=5, per_device_train_batch_size=4)
    assert trainer.data_selector.num_rows == 20
    curated = trainer.curate(keep_ratio=0.4)
    counted.num_read = 0
    kept = list(curated)
    weights = weights_by_id(trainer)
    best = sorted(weights, key=lambda name: -weights[name])
    assert sorted(row["sample_id"] for row in kept) == sorted(best[:8])
    last = max(int(row["sample_id"].removeprefix("row-")) for row in kept)
    assert counted.num_read <= last + 3
    for row in kept:
        assert row["weight"] == weights[row["sample_id"]]
        assert row["rank"] == best.index(row["sample_id"]) + 1
        assert row["scored"] is True
        assert row["prompt"] == rows_with_ids(20)[int(row["uid"].removeprefix("row-"))]["prompt"]
    assert list(curated.features) == list(kept[0])
    assert list(curated) == kept  # it can be read again

    path = tmp_path / "curated" / "train.parquet"
    assert write_parquet(trainer.curate(), path) == 20
    assert Dataset.from_parquet(str(path), cache_dir=str(tmp_path)).to_list() == list(trainer.curate())
    assert [file.name for file in path.parent.iterdir()] == ["train.parquet"]
    with pytest.raises(ValueError, match="must be 'auto', or larger than 0 and at most 1, got 2"):
        trainer.curate(2)


def test_a_row_that_comes_twice_is_one_row(train):
    rows = rows_with_ids(6)
    stream = Dataset.from_list([*rows, *rows.select([0, 1])]).to_iterable_dataset()
    trainer = train(train_dataset=stream, max_steps=4)
    assert trainer.data_selector.sample_ids.to_pylist() == rows["uid"][:]
    assert sorted(row["uid"] for row in trainer.curate()) == sorted(rows["uid"])


def test_rows_that_do_not_come_again_are_reported(train, caplog):
    counted = CountedRows(rows_with_ids(8))
    trainer = train(train_dataset=counted.stream(), max_steps=2)
    counted.rows = counted.rows.select(range(6))
    assert len(list(trainer.curate())) == 6
    assert "2 of 8 rows to keep did not come again in the stream" in caplog.text


def test_records_of_a_stream_name_the_way_to_its_rows(train, tmp_path):
    trainer = train(train_dataset=rows_with_ids(8).to_iterable_dataset(), max_steps=2)
    trainer.save_model()
    with pytest.raises(ValueError, match=r"whose rows are not on disk\. Curate in the training script: `trainer.cur"):
        curate_run(trainer.args.output_dir)
    with pytest.raises(ValueError, match=r"whose rows are not on disk, so there is no report of it"):
        build_report(trainer.args.output_dir)
    assert read_facts(trainer.args.output_dir)["training"]["num_rows"] == 8
    DataSelector.from_pretrained(trainer.data_selector.save_pretrained(tmp_path / "weights").parent)


def test_curated_stream_is_published(hub, train):
    trainer = train(train_dataset=rows_with_ids(40).to_iterable_dataset(), max_steps=5)
    trainer.push_curated_dataset("me/stream", keep_ratio=0.5)
    assert load_dataset("me/stream", split="train").to_list() == list(trainer.curate(0.5))
    assert "a stream, whose source is not recorded" in hub.files("dataset", "me/stream")["README.md"].decode()


def test_command_line(build_model, tokenizer, tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows_with_ids(24).to_json(tmp_path / "mixture.jsonl")
    prompt_completion_rows(10, 1000).to_json(tmp_path / "trusted.jsonl")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "mixture.jsonl")]
    options += ["--validation_dataset_name", str(tmp_path / "trusted.jsonl"), "--dataset_streaming", "True"]
    options += ["--sample_id_column", "uid", "--max_steps", "3", "--per_device_train_batch_size", "4"]
    options += ["--use_cpu", "--bf16", "False", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    sft.main(*sft.make_parser().parse_args_and_config([*options, "--keep_ratio", "0.5"]))
    curated = Dataset.from_parquet(str(tmp_path / "out" / "curated" / "train.parquet"), cache_dir=str(tmp_path))
    assert len(curated) == 6
    assert set(curated["uid"]) < {f"row-{row}" for row in range(12)}
    assert max(curated["rank"]) == 6


STREAM = rows_with_ids(24).to_iterable_dataset()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_steps": -1}, ValueError, "needs `max_steps`, got -1"),
        (
            {"sample_id_column": None},
            ValueError,
            r"needs `sample_id_column`.* columns are \['prompt', 'completion'",
        ),
        ({"sample_id_column": "id"}, ValueError, "`sample_id_column='id'` is not a column"),
        ({"sample_id_column": "prompt"}, ValueError, "is text or tokens, which preparation changes"),
        ({"packing": True}, ValueError, "`packing=True` is not supported with a stream.*`padding_free=True`"),
        ({"refine_ratio": 0.1}, ValueError, "`refine_ratio=0.1` is not supported with a stream"),
        ({"ignore_data_skip": True}, ValueError, "`ignore_data_skip=True` is not supported with a stream"),
        ({"source_column": "prompt"}, ValueError, "`source_column='prompt'` is not supported with a stream"),
        ({"selector_optimizer": "adam"}, ValueError, "`selector_optimizer='adam'` is not supported with a stream"),
        ({"validation_weight_decay": 0.1}, ValueError, "`validation_weight_decay=0.1` is not supported"),
        ({"save_strategy": "epoch"}, ValueError, "`save_strategy='epoch'` is not supported.*use 'steps'"),
        ({"dataloader_num_workers": 2}, ValueError, "`dataloader_num_workers=2` is not supported.*Use 1"),
        ({"train_sampling_strategy": "group_by_length"}, ValueError, "Rows come in the stream's order"),
        ({"data_selector": "weights"}, ValueError, "`data_selector` is not supported with a stream"),
        ({"train_dataset": IterableDataset.from_generator(lambda: iter(()))}, ValueError, "`train_dataset` is empty"),
        (
            {"train_dataset": STREAM.map(lambda row: {"uid": 0.5})},
            TypeError,
            "must be strings or integers, but a row of the stream has 0.5 in the column 'uid'",
        ),
        (
            {"train_dataset": STREAM.map(lambda row: {"uid": None})},
            ValueError,
            "A row of the stream has no id in the column 'uid'",
        ),
    ],
)
def test_what_a_stream_cannot_do(make_trainer, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**{"train_dataset": STREAM, "sample_id_column": "uid", **options})


def test_stream_that_can_be_read_only_once():
    rows = iter(rows_with_ids(10).to_list())
    once = IterableDataset.from_generator(lambda: rows)
    pairs = iter(PairedStream(once, ValidationStream(5, 0), "uid", None, 4, 4, ConsumedRows()))
    assert [next(pairs).row["uid"] for _ in range(10)] == [f"row-{row}" for row in range(10)]
    with pytest.raises(ValueError, match=r"no rows in pass 2\. It can be read only once, and training needs more"):
        next(pairs)


# ---- Before training ----
@pytest.mark.parametrize("options", [{}, {"selector_activation": "sigmoid"}, {"selection_method": "bmo"}])
def test_nothing_is_known_of_a_stream_before_training(make_trainer, hub, options):
    rows = rows_with_ids(24)
    options = {"train_dataset": rows.to_iterable_dataset(), "sample_id_column": "uid", **options}
    trainer = make_trainer(**options)
    trainer.save_model()
    selector = trainer.data_selector
    assert selector.weights().tolist() == selector.weights_of(torch.tensor([], dtype=torch.int64)).tolist() == []
    assert all(math.isnan(value) for value in selector.statistics())
    with pytest.raises(ValueError, match="seen no row of the stream yet, so there is nothing to curate"):
        trainer.push_curated_dataset("me/rows")
    folder = trainer.args.output_dir
    assert not len(WeightHistory.load(folder).steps)
    with pytest.raises(ValueError, match="is of a run on a stream"):
        curate_run(folder)
    again = make_trainer(**options)
    again.data_selector.load(folder, "stream")
    again.train()
    trainer.train()
    assert weights_by_id(again) == weights_by_id(trainer)
    assert len(weights_by_id(trainer)) == 24
