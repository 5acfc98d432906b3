"""
What TRL's own tests of `SFTTrainer` train on, with models from a config in place of those of the Hub: each situation
trains as in `SFTTrainer`, once trusted rows and weights have no say, or ends with the same error.

`benchmarks/trl_tests.py` runs TRL's tests themselves.
"""

import copy
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import QUIET_CPU_RUN, prompt_completion_rows
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


RUN: dict[str, Any] = {
    **QUIET_CPU_RUN,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "seed": 7,
    "adam_epsilon": 1e-6,
}
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool['function']['name'] }};{% endfor %}{% endif %}"
    "{% for message in messages %}{{ (message['role'] | upper) if shouting else message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Situation(NamedTuple):
    """Rows, and what is passed besides them."""

    make_row: Callable[[str, str, int], dict[str, Any]]
    """Of a prompt, its completion, and the row's number."""
    options: dict[str, Any] = {}
    arguments: dict[str, Any] = {}


def _chat(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _messages(prompt: str, completion: str, number: int) -> dict[str, Any]:
    return {"messages": _chat(prompt, completion)}


def _tokens(prompt: str, completion: str, number: int) -> dict[str, Any]:
    return {"input_ids": [7 + ord(letter) for letter in prompt + completion]}


def _masked(prompt: str, completion: str, number: int) -> dict[str, Any]:
    mask = [0] * len(prompt) + [1] * len(completion)
    return {**_tokens(prompt, completion, number), "completion_mask": mask}


def _turns(prompt: str, completion: str, number: int) -> dict[str, Any]:
    turns = _chat(prompt, completion)
    return {"prompt": turns[:1], "completion": turns[1:]}


SITUATIONS = {
    "text": Situation(lambda prompt, completion, number: {"text": prompt + completion}),
    "from and value": Situation(
        lambda prompt, completion, number: {
            "conversations": [{"from": turn["role"], "value": turn["content"]} for turn in _chat(prompt, completion)]
        }
    ),
    "prompt and completion turns": Situation(_turns),
    "tokens": Situation(_tokens),
    "tokens with labels": Situation(
        lambda *row: {**_tokens(*row), "labels": [-100] * 5 + _tokens(*row)["input_ids"][5:]}
    ),
    "tokens with a mask": Situation(_masked, {"completion_only_loss": True}),
    "formatting function": Situation(
        lambda prompt, completion, number: {"question": prompt, "answer": completion},
        arguments={"formatting_func": lambda row: f"Q: {row['question']} A: {row['answer']}"},
    ),
    "template options": Situation(
        lambda *row: {**_messages(*row), "chat_template_kwargs": {"shouting": bool(row[2] % 2)}}
    ),
    "tools": Situation(lambda *row: {**_messages(*row), "tools": [TOOL]}),
    "tools as JSON": Situation(lambda *row: {**_messages(*row), "tools": json.dumps([TOOL])}),
    "assistant only": Situation(_messages, {"assistant_only_loss": True}),
    "assistant and completion only": Situation(_turns, {"assistant_only_loss": True, "completion_only_loss": True}),
    "prompts that fill the length": Situation(
        lambda prompt, completion, number: {"prompt": prompt * (1 + 9 * (number % 3 == 0)), "completion": completion},
        {"max_length": 60},
    ),
    "adapter": Situation(_messages, arguments={"peft_config": LORA}),
    "adapter, checkpointing that re-enters": Situation(
        _messages,
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"peft_config": LORA},
    ),
    "adapted model": Situation(_messages, arguments={"model": "adapted"}),
    "model of a folder in bf16": Situation(
        _messages, {"model_init_kwargs": {"dtype": "bfloat16"}}, arguments={"model": "folder"}
    ),
    "template of a folder": Situation(_messages, {"chat_template_path": "folder"}),
    "evaluation of a dictionary": Situation(
        _messages, {"eval_strategy": "steps", "eval_steps": 2}, {"eval_dataset": dict}
    ),
    "evaluation of splits": Situation(
        _messages, {"eval_strategy": "steps", "eval_steps": 2}, {"eval_dataset": DatasetDict}
    ),
    "evaluation of streams": Situation(
        _messages, {"eval_strategy": "steps", "eval_steps": 2}, {"eval_dataset": IterableDatasetDict}
    ),
}


def _rows(situation: Situation, num_rows: int, offset: int = 0) -> Dataset:
    rows = prompt_completion_rows(num_rows, offset)
    return Dataset.from_list(
        [situation.make_row(row["prompt"], row["completion"], number) for number, row in enumerate(rows, offset)]
    )


@pytest.fixture
def run(build_model, tokenizer, tmp_path):
    def run(trainer_class: type, situation: Situation) -> SFTTrainer:
        options, arguments = {**RUN, **situation.options}, copy.deepcopy(situation.arguments)
        reader = copy.deepcopy(tokenizer)  # some options are written into it
        reader.chat_template = TEMPLATE
        model: Any = build_model()
        match arguments.pop("model", None):
            case "folder":
                model.save_pretrained(tmp_path / "model")
                model = str(tmp_path / "model")
            case "adapted":
                torch.manual_seed(0)
                model = get_peft_model(model, copy.deepcopy(LORA))
        if "chat_template_path" in options:
            other = copy.deepcopy(reader)
            other.chat_template = "{% for message in messages %}{{ message['content'] }}<new>{% endfor %}"
            other.add_special_tokens({"additional_special_tokens": ["<new>"]})
            other.save_pretrained(tmp_path / "template")
            options["chat_template_path"] = str(tmp_path / "template")
        if kind := arguments.pop("eval_dataset", None):
            splits = {"one": _rows(situation, 3, 500), "two": _rows(situation, 5, 600)}
            if kind is IterableDatasetDict:
                splits = {name: rows.to_iterable_dataset() for name, rows in splits.items()}
            arguments["eval_dataset"] = kind(splits)
        is_bilevel = trainer_class is BilevelSFTTrainer
        if is_bilevel:
            arguments["validation_dataset"] = _rows(situation, 10, 1000)
            options |= {"selector_learning_rate": 0.0, "value_function": "none"}
        trainer = trainer_class(
            model,
            (BilevelSFTConfig if is_bilevel else SFTConfig)(str(tmp_path / trainer_class.__name__), **options),
            train_dataset=_rows(situation, 12),
            processing_class=reader,
            **arguments,
        )
        if is_bilevel:
            trainer.args.validation_weight = 0.0  # not allowed to users
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("name", SITUATIONS)
def test_trains_as_in_sft(run, name):
    situation = SITUATIONS[name]
    runs = []
    for trainer_class in (SFTTrainer, BilevelSFTTrainer):
        trainer = run(trainer_class, situation)
        logs = [
            {key: value for key, value in entry.items() if key == "loss" or key.endswith("_loss")}
            for entry in trainer.state.log_history
        ]
        runs.append((dict(trainer.model.named_parameters()), logs))
    (expected, their_logs), (parameters, logs) = runs
    assert parameters.keys() == expected.keys()
    for parameter, value in parameters.items():
        assert value.dtype == expected[parameter].dtype
        if value.dtype == torch.float32:  # Adam makes whole steps of what is rounded in bf16
            torch.testing.assert_close(value, expected[parameter], rtol=1e-3, atol=2e-4, msg=parameter)
    tolerance = 1e-4 if trainer.model.dtype == torch.float32 else 1e-2
    for ours, theirs in zip(logs, their_logs, strict=True):
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=tolerance)
    losses = [entry["loss"] for entry in their_logs if "loss" in entry]
    assert len(losses) == 3
    assert losses[0] != losses[-1]


@pytest.mark.parametrize(
    ("situation", "prepare"),
    [
        (Situation(_messages), lambda rows: rows.with_transform(lambda batch: batch)),
        (Situation(_masked, {"dataset_kwargs": {"skip_prepare_dataset": True}}), lambda rows: rows),
        (Situation(_messages, {"padding_free": True}), lambda rows: rows),
        (Situation(_messages, {"eos_token": "<nothing>"}), lambda rows: rows),
        (Situation(_messages, {"packing": True, "max_length": None}), lambda rows: rows),
    ],
    ids=["transform", "masks without labels", "padding-free with a length", "eos token", "packing without a length"],
)
def test_ends_with_the_error_of_sft(run, monkeypatch, situation, prepare):
    rows = _rows
    monkeypatch.setattr(f"{__name__}._rows", lambda *args: prepare(rows(*args)))
    errors = []
    for trainer_class in (SFTTrainer, BilevelSFTTrainer):
        with pytest.raises(ValueError, match=r"`\w+[`=(]|`Dataset|labels") as error:
            run(trainer_class, situation)
        errors.append(str(error.value))
    assert errors[1].startswith(errors[0])  # ours may go on
