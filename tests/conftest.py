"""Models and datasets of the tests: built from a config, the tokenizer trained on the spot. Nothing is downloaded."""

import os

from hub_environment import HUB, HubServer


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: more threads than cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    TrainerCallback,
)

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


disable_progress_bars()
# pytest-xdist runs a process per core
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

QUIET_CPU_RUN: dict[str, Any] = {
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every string of the tests, whatever its script, has tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog, 0123456789"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def build_tiny_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A tiny model of a family, the same parameters at every call."""
    shape = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config: PreTrainedConfig
    if family == "llama":
        config = LlamaConfig(**shape, **sizes, num_key_value_heads=2)
    elif family == "gpt2":
        config = GPT2Config(
            **shape, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    else:
        config = Qwen3MoeConfig(
            **shape,
            **sizes,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            output_router_logits=True,
        )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups, which are long and go to one worker, come first: at the end the other workers would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(scope="session", autouse=True)
def _quantized_weights_stay_trainable() -> Iterator[None]:
    """On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit weights for inference, and cannot train on them again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub, empty and in order."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which the demo switches on for good
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def build_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    return lambda family="llama": build_tiny_model(family, tokenizer)


def prompt_completion_rows(num_rows: int, offset: int = 0) -> Dataset:
    """Rows of different lengths, none like another."""
    return Dataset.from_list(
        [
            {"prompt": f"add {row} and {row * row}:", "completion": f" {row + row * row}" + " ok" * (row % 4)}
            for row in range(offset, offset + num_rows)
        ]
    )


def left_padding_collator(pad_token_id: int) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Pads on the left, with positions that do not count the padding."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": [], "position_ids": []}
        for row in rows:
            padding = longest - len(row["input_ids"])
            batch["input_ids"].append([pad_token_id] * padding + row["input_ids"])
            batch["labels"].append([-100] * padding + row["labels"])
            batch["attention_mask"].append([0] * padding + [1] * len(row["input_ids"]))
            batch["position_ids"].append([0] * padding + list(range(len(row["input_ids"]))))
        return {name: torch.tensor(values) for name, values in batch.items()}

    return collate


@pytest.fixture
def train_dataset() -> Dataset:
    return prompt_completion_rows(24)


@pytest.fixture
def validation_dataset() -> Dataset:
    return prompt_completion_rows(10, offset=1000)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., BilevelSFTConfig]:
    """Options for a short fp32 run on the CPU that writes to the test's own folder."""

    def make(**options: Any) -> BilevelSFTConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "seed": 7,
            **QUIET_CPU_RUN,
        }
        return BilevelSFTConfig(**{**defaults, **options})

    return make


@pytest.fixture
def make_trainer(
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    train_dataset: Dataset,
    validation_dataset: Dataset,
    make_config: Callable[..., BilevelSFTConfig],
) -> Callable[..., BilevelSFTTrainer]:
    """A trainer on the tiny Llama; keywords that are fields of the config go there, all others to the trainer."""

    def make(**options: Any) -> BilevelSFTTrainer:
        fields = BilevelSFTConfig.__dataclass_fields__
        arguments: dict[str, Any] = {
            "model": options.pop("model", None) or build_model(),
            "args": make_config(**{name: value for name, value in options.items() if name in fields}),
            "train_dataset": train_dataset,
            "validation_dataset": validation_dataset,
            "processing_class": tokenizer,
        }
        arguments |= {name: value for name, value in options.items() if name not in fields}
        return BilevelSFTTrainer(**arguments)

    return make


class StopWithinStep(TrainerCallback):
    """What Trainer does on SIGTERM: a checkpoint between a backward pass and the optimizer's step."""

    def __init__(self, step: int):
        self.step = step
        self.trainer: BilevelSFTTrainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            control.should_training_stop = True
