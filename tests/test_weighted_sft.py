"""Rows that count by a column: against TRL's own trainer where weights say nothing, and closed forms where they do."""

import copy
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
import weighted_worker
from conftest import QUIET_CPU_RUN, left_padding_collator, prompt_completion_rows
from datasets import Dataset, IterableDataset, load_dataset
from peft import PromptTuningConfig
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from trl_bilevel import WeightedSFTConfig, WeightedSFTTrainer
from trl_bilevel.cli import main
from trl_bilevel.command_line import one_line_errors
from trl_bilevel.scripts import sft
from trl_bilevel.weight_column import read_counted_rows


PADDING_FREE = {"padding_free": True, "max_length": None}
PACKED = {"packing": True, "max_length": 80}
LEARNING_RATE = 0.5
UNEVEN = [0.25, 4.0, 1.0, 0.0, 2.5, 1e-3, 7.0, 1.0, 0.5, 3.0, 0.0, 1.5]


def weighted_rows(weights=UNEVEN):
    return prompt_completion_rows(len(weights)).add_column("weight", list(weights))


def chats(num_rows):
    def turns(row):
        user, assistant = ({"role": role} for role in ("user", "assistant"))
        return [{**user, "content": f"say {row}"}, {**assistant, "content": f"it is {row}" + " ok" * (row % 3)}] * 2

    return Dataset.from_list([{"messages": turns(row)} for row in range(num_rows)])


@pytest.fixture
def make(build_model, tokenizer, tmp_path):
    """A trainer that takes plain gradient steps, so that parameters tell gradients."""

    def build(trainer_class, rows, family="llama", **options):
        config_class = WeightedSFTConfig if trainer_class is WeightedSFTTrainer else SFTConfig
        fields = config_class.__dataclass_fields__
        defaults = {
            **QUIET_CPU_RUN,
            "output_dir": str(tmp_path / trainer_class.__name__),
            "per_device_train_batch_size": 4,
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": 4,
            "seed": 7,
        }
        config = config_class(**{**defaults, **{name: value for name, value in options.items() if name in fields}})
        arguments = {name: value for name, value in options.items() if name not in fields}
        return trainer_class(build_model(family), config, train_dataset=rows, processing_class=tokenizer, **arguments)

    return build


@pytest.fixture
def train(make):
    def run(*args, **options):
        trainer = make(*args, **options)
        trainer.train()
        return trainer

    return run


def parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(trainer, expected):
    """To the last bit: parameters, and all that is logged but times."""
    assert losses(trainer) == losses(expected)
    assert len(losses(trainer)) > 1
    for entry, other in zip(trainer.state.log_history[:-1], expected.state.log_history[:-1], strict=True):
        assert entry == other
    for name, value in parameters(expected).items():
        assert torch.equal(parameters(trainer)[name], value), name


PLAIN_OPTIONS = {
    "padding": {},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "chunked": {"loss_type": "chunked_nll"},
    "whole rows": {"completion_only_loss": False},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "each micro-batch by itself": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
    "padding-free": PADDING_FREE,
    "padding-free, padded to a multiple": {**PADDING_FREE, "pad_to_multiple_of": 16},
    "packed": PACKED,
    "packed and shuffled": {**PACKED, "shuffle_dataset": True, "loss_type": "dft"},
    "packed and split": {"packing": True, "max_length": 20, "packing_strategy": "bfd_split"},
    "packed and wrapped": {"packing": True, "max_length": 32, "packing_strategy": "wrapped"},
    "shuffled and truncated": {"shuffle_dataset": True, "max_length": 16},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "experts": {"family": "moe", "gradient_accumulation_steps": 2},
    "virtual tokens": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
    "workers": {"dataloader_num_workers": 2},
    "all columns": {"remove_unused_columns": False},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", PLAIN_OPTIONS.values(), ids=PLAIN_OPTIONS)
def test_equal_weights_are_plain_sft(train, options):
    rows = prompt_completion_rows(24)
    expected = train(SFTTrainer, rows, **copy.deepcopy(options))
    assert_same(train(WeightedSFTTrainer, rows.add_column("weight", [7.0] * 24), **options), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", PLAIN_OPTIONS.values(), ids=PLAIN_OPTIONS)
def test_weights_of_zero_and_one_are_plain_sft_on_the_rows_of_one(train, options):
    rows = prompt_completion_rows(30)
    ones = [row for row in range(30) if row % 5]
    expected = train(SFTTrainer, rows.select(ones), **copy.deepcopy(options))
    weighted = rows.add_column("weight", [int(row % 5 > 0) for row in range(30)])
    assert_same(train(WeightedSFTTrainer, weighted, **options), expected)


@pytest.mark.parametrize("options", [{}, {**PACKED}], ids=["padding", "packed"])
def test_assistant_turns_only(train, options):
    options = {**options, "assistant_only_loss": True}
    rows = chats(12)
    expected = train(SFTTrainer, rows, **options)
    assert_same(train(WeightedSFTTrainer, rows.add_column("weight", [1] * 12), **options), expected)


def one_step(model, rows, weights, token_loss):
    """The loss of a step over all rows and the parameters after it: each row by itself, without TRL's code."""
    total, num_tokens = 0.0, 0
    for row, weight in zip(rows, weights, strict=True):
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        if weight:
            total = total + weight * token_loss(logits[labels != -100], labels[labels != -100]).sum()
            num_tokens += int((labels != -100).sum())
    loss = total / num_tokens
    loss.backward()
    stepped = {n: (p - LEARNING_RATE * p.grad).detach() for n, p in model.named_parameters()}
    return loss.item(), stepped


def nll(logits, labels):
    return cross_entropy(logits, labels, reduction="none")


def dft(logits, labels):
    return nll(logits, labels) * logits.softmax(-1).gather(1, labels[:, None])[:, 0].detach()


def smoothed(logits, labels):
    return cross_entropy(logits, labels, reduction="none", label_smoothing=0.3)


CLOSED_FORMS = {
    "nll": ({}, nll),
    "dft": ({"loss_type": "dft"}, dft),
    "label smoothing": ({"label_smoothing_factor": 0.3}, smoothed),
    "dft ignores smoothing": ({"loss_type": "dft", "label_smoothing_factor": 0.3}, dft),
    "accumulation": ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}, nll),
    "whole rows": ({"completion_only_loss": False}, nll),
    "padding-free": (PADDING_FREE, nll),
    "padding-free, to a multiple": ({**PADDING_FREE, "pad_to_multiple_of": 64, "loss_type": "dft"}, dft),
    "packed": (PACKED, nll),
    "packed and shuffled": ({**PACKED, "shuffle_dataset": True}, nll),
    "packed dft": ({**PACKED, "loss_type": "dft"}, dft),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as they are"])
@pytest.mark.parametrize(("options", "token_loss"), CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_a_step_is_the_weighted_sum_over_its_tokens(make, build_model, options, token_loss, normalize):
    options = {"per_device_train_batch_size": 12, **options, "max_steps": 1, "normalize_weights": normalize}
    trainer = make(WeightedSFTTrainer, weighted_rows(), **options)
    unpacked = {name: value for name, value in options.items() if name not in ("packing", "normalize_weights")}
    prepared = make(SFTTrainer, weighted_rows(), **{**unpacked, "shuffle_dataset": False}).train_dataset
    positive = [weight for weight in UNEVEN if weight]
    scale = len(positive) / sum(positive) if normalize else 1.0
    loss, stepped = one_step(build_model(), prepared, [scale * weight for weight in UNEVEN], token_loss)
    trainer.train()
    assert losses(trainer) == pytest.approx([loss], rel=1e-5)
    for name, value in parameters(trainer).items():
        torch.testing.assert_close(value, stepped[name], rtol=1e-5, atol=1e-6)


def test_wrapped_sequences_hold_the_weight_of_each_token(make):
    """Rows cut in the middle: each token keeps the weight of its own row."""
    options = {"packing": True, "max_length": 32, "packing_strategy": "wrapped"}
    rows = weighted_rows([2.0] * 4 + [0.5] * 4)
    unpacked = make(SFTTrainer, rows, max_length=None).train_dataset
    wrapped = make(WeightedSFTTrainer, rows, **options).train_dataset
    flat = [weight for sequence in wrapped["weight"] for weight in sequence]
    assert flat == [row["weight"] for row in unpacked for _ in row["input_ids"]]
    assert [len(sequence) for sequence in wrapped["weight"]] == [len(ids) for ids in wrapped["input_ids"]]


def test_a_token_at_a_cut_counts_with_the_row_it_is_of(train, build_model, make):
    """Wrapped sequences go on with the next row, whose first token is then predicted, and is that row's."""
    options = {"packing": True, "max_length": 32, "packing_strategy": "wrapped", "completion_only_loss": False}
    options |= {"max_steps": 1, "per_device_train_batch_size": 64, "normalize_weights": False}
    rows = weighted_rows([5.0, 0.1] * 6)
    of_tokens = [
        row["weight"] for row in make(SFTTrainer, rows, max_length=None).train_dataset for _ in row["input_ids"]
    ]
    trainer = train(WeightedSFTTrainer, rows, **options)
    model, total, num_tokens = build_model(), 0.0, 0
    for sequence in trainer.train_dataset:
        ids = torch.tensor(sequence["input_ids"])
        weights, of_tokens = torch.tensor(of_tokens[: len(ids)]), of_tokens[len(ids) :]
        total = total + (weights[1:] * nll(model(ids[None]).logits[0, :-1], ids[1:])).sum()
        num_tokens += len(ids) - 1
    assert not of_tokens
    assert losses(trainer) == pytest.approx([(total / num_tokens).item()], rel=1e-5)


def test_rows_come_in_proportion_to_their_weights_at_any_batch_size(make):
    """Why the divisor is tokens: with weighted tokens a step of one row would not know its weight."""
    rows = prompt_completion_rows(2).select([1, 1]).add_column("weight", [1.0, 3.0])
    trainer = make(WeightedSFTTrainer, rows, per_device_train_batch_size=1, train_sampling_strategy="sequential")
    batches = iter(trainer.get_train_dataloader())
    first, second = (trainer.compute_loss(trainer.model, next(batches)).item() for _ in range(2))
    assert second == pytest.approx(3 * first, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e300])
def test_normalized_weights_have_no_scale(train, scale):
    expected = train(WeightedSFTTrainer, weighted_rows())
    trainer = train(WeightedSFTTrainer, weighted_rows([scale * weight for weight in UNEVEN]))
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-5)
    for name, value in parameters(expected).items():
        torch.testing.assert_close(parameters(trainer)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "weights",
    [[2, 0, 4], [True, False, True], [Decimal("0.5"), Decimal(0), Decimal("1.5")]],
    ids=["integers", "booleans", "decimals"],
)
@pytest.mark.parametrize("options", [{}, PACKED], ids=["padding", "packed"])
def test_kinds_of_numbers(train, weights, options):
    expected = train(WeightedSFTTrainer, weighted_rows(list(map(float, weights)) * 4), **options)
    assert_same(train(WeightedSFTTrainer, weighted_rows(weights * 4), **options), expected)


def test_evaluation_is_unweighted(make):
    """Of rows without weights, and of rows whose weights would be refused."""
    rows = prompt_completion_rows(6, offset=50)
    expected = make(SFTTrainer, weighted_rows(), eval_dataset=rows).evaluate()["eval_loss"]
    others = {"none": rows, "train": rows.add_column("weight", [-1.0] * 6)}
    metrics = make(WeightedSFTTrainer, weighted_rows(), eval_dataset=others).evaluate()
    assert metrics["eval_none_loss"] == metrics["eval_train_loss"] == expected
    packed = make(WeightedSFTTrainer, weighted_rows(), eval_dataset={"train": rows}, **PACKED)
    assert packed.evaluate()["eval_train_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_between_steps_leaves_training_alone(train):
    expected = train(WeightedSFTTrainer, weighted_rows())
    trainer = train(
        WeightedSFTTrainer,
        weighted_rows(),
        eval_dataset=prompt_completion_rows(4),
        eval_strategy="steps",
        eval_steps=1,
    )
    assert losses(trainer) == losses(expected)


@pytest.mark.parametrize("options", [{}, PADDING_FREE], ids=["padding", "padding-free"])
def test_a_stream_trains_like_its_rows(train, options):
    options = {**options, "train_sampling_strategy": "sequential", "normalize_weights": False}
    expected = train(WeightedSFTTrainer, weighted_rows(UNEVEN * 2), **options)
    streamed = train(WeightedSFTTrainer, weighted_rows(UNEVEN * 2).to_iterable_dataset(), **options)
    assert losses(streamed) == losses(expected)
    for name, value in parameters(expected).items():
        assert torch.equal(parameters(streamed)[name], value)


def test_a_packed_stream_trains_like_its_rows(train):
    options = {**PACKED, "train_sampling_strategy": "sequential", "normalize_weights": False, "max_steps": 2}
    expected = train(WeightedSFTTrainer, weighted_rows(UNEVEN * 2), **options)
    streamed = train(WeightedSFTTrainer, weighted_rows(UNEVEN * 2).to_iterable_dataset(), **options)
    assert losses(streamed) == losses(expected)


def test_stream_without_features(train):
    """One that does not say its columns."""
    stream = IterableDataset.from_generator(lambda: iter(weighted_rows(UNEVEN * 2).to_list()))
    options = {"train_sampling_strategy": "sequential", "normalize_weights": False}
    expected = train(WeightedSFTTrainer, weighted_rows(UNEVEN * 2), **options)
    assert losses(train(WeightedSFTTrainer, stream, **options)) == losses(expected)


def test_a_bad_weight_far_down_a_stream_ends_training(train):
    weights = [1.0] * 200
    weights[150] = float("nan")
    stream = weighted_rows(weights).to_iterable_dataset()
    with pytest.raises(ValueError, match="The weight of row 150 in the column 'weight' is nan"):
        train(WeightedSFTTrainer, stream, normalize_weights=False, max_steps=50)


def test_resume_is_exact(make, train):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_steps": 6}
    rows = weighted_rows(UNEVEN * 2)
    whole = train(WeightedSFTTrainer, rows, **options, save_strategy="steps", save_steps=3)
    expected, expected_losses = parameters(whole), losses(whole)
    resumed = make(WeightedSFTTrainer, rows, **options)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    assert losses(resumed) == expected_losses
    assert len(expected_losses) == 6
    for name, value in expected.items():
        assert torch.equal(parameters(resumed)[name], value)


def test_own_collator(train, tokenizer):
    """Padding on the left, of rows whose weights it does not know."""
    collator = left_padding_collator(tokenizer.pad_token_id)
    expected = train(WeightedSFTTrainer, weighted_rows())
    trainer = train(WeightedSFTTrainer, weighted_rows(), data_collator=collator)
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-4)
    ones = prompt_completion_rows(12)
    expected = train(SFTTrainer, ones, data_collator=collator)
    assert_same(train(WeightedSFTTrainer, ones.add_column("weight", [1.0] * 12), data_collator=collator), expected)


def test_prepared_rows_and_another_column(train):
    rows = weighted_rows()
    expected = train(WeightedSFTTrainer, rows)
    prepared = train(SFTTrainer, rows).train_dataset.rename_column("weight", "trust")
    options = {"weight_column": "trust", "dataset_kwargs": {"skip_prepare_dataset": True}}
    assert_same(train(WeightedSFTTrainer, prepared, **options), expected)


def test_options_of_trl_are_completed(build_model, tokenizer, tmp_path):
    args = SFTConfig(str(tmp_path), max_steps=1, **QUIET_CPU_RUN)
    trainer = WeightedSFTTrainer(build_model(), args, train_dataset=weighted_rows(), processing_class=tokenizer)
    assert isinstance(trainer.args, WeightedSFTConfig)
    assert (trainer.args.weight_column, trainer.args.normalize_weights, trainer.args.max_steps) == ("weight", True, 1)


def test_an_outlier_is_left_out_by_its_weight(train):
    """What it is for: a row that would spoil the model has no say, and a light one little."""
    rows = prompt_completion_rows(12)
    spoiled = Dataset.from_list([*rows, {"prompt": "add 3 and 9:", "completion": " zzzzzzzz"}])
    clean = train(SFTTrainer, rows, max_steps=6)
    left_out = train(WeightedSFTTrainer, spoiled.add_column("weight", [1] * 12 + [0]), max_steps=6)
    assert_same(left_out, clean)


REFUSED = {
    "missing column": (prompt_completion_rows(3), ValueError, r"not a column.*\['prompt', 'completion'\]"),
    "negative": (weighted_rows([1, 2, -0.5]), ValueError, "row 2 in the column 'weight' is -0.5"),
    "NaN": (weighted_rows([1, float("nan"), 2]), ValueError, "row 1 in the column 'weight' is nan"),
    "infinite": (weighted_rows([float("inf"), 1]), ValueError, "row 0 in the column 'weight' is inf"),
    "missing": (weighted_rows([1.0, None]), ValueError, "row 1 in the column 'weight' is missing"),
    "all missing": (weighted_rows([None, None]), ValueError, r"row 0 .* missing \(2 of 2 rows"),
    "several": (weighted_rows([1, -1, float("nan")]), ValueError, r"row 1 .* is -1.0 \(2 of 3 rows"),
    "text": (weighted_rows(["high", "low"]), TypeError, "'weight' has type string, and 'high' in row 0"),
    "lists": (weighted_rows([[1.0], [2.0]]), TypeError, r"'weight' has type .* and \[1.0\] in row 0"),
    "zeros": (weighted_rows([0, 0, 0]), ValueError, "All 3 weights in the column 'weight' are 0"),
    "no rows": (weighted_rows([1.0]).select([]), ValueError, "`train_dataset` is empty"),
}


@pytest.mark.parametrize(("rows", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_weights_are_refused(make, rows, error, message):
    with pytest.raises(error, match=message):
        make(WeightedSFTTrainer, rows)


STREAM_MESSAGES = {
    "missing column": r"not a column.*\['prompt', 'completion'\]",
    "negative": "row 2 in the column 'weight' is -0.5",
    "missing": "row 1 in the column 'weight' is missing",
    "text": "row 0 in the column 'weight' is no number but 'high'",
    "zeros": "All weights in the column 'weight' are 0",
}


@pytest.mark.parametrize("name", STREAM_MESSAGES)
def test_bad_weights_of_a_stream_are_refused(make, name):
    rows, error, _ = REFUSED[name]
    with pytest.raises(error, match=STREAM_MESSAGES[name]):
        make(WeightedSFTTrainer, rows.to_iterable_dataset(), normalize_weights=False)


def test_other_refusals(make, tmp_path):
    with pytest.raises(ValueError, match="`normalize_weights=True` is not supported with a stream"):
        make(WeightedSFTTrainer, weighted_rows().to_iterable_dataset())
    with pytest.raises(ValueError, match="stream without rows"):
        make(WeightedSFTTrainer, IterableDataset.from_generator(lambda: iter([])), normalize_weights=False)
    with pytest.raises(ValueError, match="`compute_loss_func` is not supported"), pytest.warns(FutureWarning):
        make(WeightedSFTTrainer, weighted_rows(), compute_loss_func=lambda *_, **__: 0)
    with pytest.raises(ValueError, match=r"row 1 .* 1e\+300, beyond the 32-bit numbers"):
        make(WeightedSFTTrainer, weighted_rows([1.0, 1e300]), normalize_weights=False)
    with pytest.raises(ValueError, match="needs `max_length`"):
        make(WeightedSFTTrainer, weighted_rows(), packing=True, max_length=None)
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        make(WeightedSFTTrainer, None)
    with pytest.raises(ValueError, match="`weight_column` is empty"):
        WeightedSFTConfig(str(tmp_path), weight_column="", **QUIET_CPU_RUN)


def test_row_numbers_are_those_of_the_rows_passed():
    rows = weighted_rows([1, -1, 2, -2]).select([2, 3, 0])
    with pytest.raises(ValueError, match="row 1 in the column 'weight' is -2"):
        read_counted_rows(rows, "weight", normalize=True)


def test_it_stands_on_the_ground_floor():
    """Nothing of the bilevel trainer is needed for it."""
    code = "import sys, trl_bilevel.weighted_sft_trainer; print(*[m for m in sys.modules if 'trl_bilevel.' in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "trl_bilevel.weighted_sft_trainer" in loaded
    assert not [name for name in loaded if "bilevel_" in name.split(".")[1] or "refine" in name or "selector" in name]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What came of each run on one process and on two."""
    found = []
    for number in (1, 2):
        folder = tmp_path_factory.mktemp(f"on_{number}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        command += [weighted_worker.__file__, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append([torch.load(folder / f"{run}.pt", weights_only=True) for run in range(len(weighted_worker.RUNS))])
    return found


@pytest.mark.xdist_group("weighted_processes")
@pytest.mark.parametrize("number", range(len(weighted_worker.RUNS)), ids=lambda n: json.dumps(weighted_worker.RUNS[n]))
def test_two_processes_equal_one(processes, number):
    one, two = processes[0][number], processes[1][number]
    assert len(one["losses"]) > 1
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-6)
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=1e-5, atol=1e-5)


@pytest.fixture
def options(build_model, tokenizer, tmp_path):
    """Of the command line, for a run of three steps."""
    build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = weighted_rows()
    # As a curated dataset has it, with columns that training does not read
    rows = rows.add_column("sample_id", list(range(12))).add_column("scored", [True] * 12)
    rows.to_json(tmp_path / "curated.jsonl")
    return [
        "--model_name_or_path", str(tmp_path / "model"),
        "--dataset_name", str(tmp_path / "curated.jsonl"),
        "--output_dir", str(tmp_path / "out"),
        "--max_steps", "3", "--per_device_train_batch_size", "4", "--learning_rate", "0.5", "--optim", "sgd",
        "--lr_scheduler_type", "constant", "--max_grad_norm", "0", "--seed", "7",
        "--use_cpu", "--bf16", "False", "--report_to", "none", "--logging_steps", "1", "--save_strategy", "no",
    ]  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--normalize_weights", "false", "--loss_type", "dft"]], ids=["default", "dft"])
def test_command_line_trains_with_it(options, train, tmp_path, monkeypatch, more):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert main(["sft", *options, "--weight_column", "weight", *more]) == 0
    sft.run(launched[0].training_script_args)
    rows = load_dataset("json", data_files=str(tmp_path / "curated.jsonl"), split="train")
    expected = train(
        WeightedSFTTrainer,
        rows,
        max_steps=3,
        normalize_weights=not more,
        loss_type="dft" if more else "nll",
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    trained = dict(model.named_parameters())
    for name, value in parameters(expected).items():
        torch.testing.assert_close(trained[name].detach(), value, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "out" / "curated").exists()


def test_command_line_reads_a_file_of_options(options, tmp_path):
    """And a stream, whose weights are not normalized."""
    (tmp_path / "run.yaml").write_text("weight_column: weight\nnormalize_weights: false\ndataset_streaming: true\n")
    sft.run([*options, "--config", str(tmp_path / "run.yaml")])
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--validation_dataset_name", "trusted.jsonl"], "`--weight_column weight` has no effect with `--validation_"),
        (["--resume_from_checkpoint", "last_intact"], "No valid checkpoint found"),
    ],
)
def test_command_line_refuses(options, capsys, more, message):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        sft.run([*options, "--weight_column", "weight", *more])
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code


def test_command_line_refuses_options_of_the_bilevel_trainer(options, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sft", *options, "--weight_column", "weight", "--validation_weight", "0.5"])
    assert stop.value.code == 2
    assert "--validation_weight" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["sft", *options, "--weight_column", "weight", "--validation_dataset_name", "trusted.jsonl"])
    assert "`--weight_column weight` has no effect" in stop.value.code


def test_command_line_shows_its_options(capsys):
    for options, shown in ((["--weight_column", "weight"], "--normalize_weights"), ([], "--weight_column")):
        with pytest.raises(SystemExit) as stop:
            main(["sft", *options, "--help"])
        assert stop.value.code == 0
        assert shown in capsys.readouterr().out
