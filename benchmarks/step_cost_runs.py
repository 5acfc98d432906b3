"""The runs of the step-cost benchmark: a method trains a model on random rows, timed or with its memory counted."""

import gc
import json
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from transformers.quantizers import AutoHfQuantizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import pad

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.planted_faults import build_tokenizer
from trl_bilevel.paired_batches import ValidationStream


PLAIN = "SFTTrainer"
TWO_FORWARDS = "two forwards"
# Options of the bilevel trainer
METHODS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "BDS": {"value_function": "none"},
    "BMO": {"selection_method": "bmo"},
    "BDS, value function": {"value_function": "adapter"},
    TWO_FORWARDS: {},
}
SETTINGS = ("LoRA", "LoRA, packed", "QLoRA", "QLoRA, packed")
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
             "vocab_size": 2000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        shape (`str`): of the Llama, `"tiny"` or `"8b"`.
        settings (`list[str]`): which adapters and batches, of "LoRA", "LoRA, packed", "QLoRA" and "QLoRA, packed".
        num_pairs (`int`): how often the methods run, in alternation; 0 to leave out the times.
        num_steps (`int`): timed optimizer steps of a run.
        num_warmup_steps (`int`): steps before them.
        num_memory_steps (`int`): optimizer steps of a run that peak memory is taken from.
        batch_size (`int`): training sequences per step; as many of validation rows join them.
        sequence_length (`int`): longest row, tokens; rows are between half of it and all of it, packed rows between a
            sixteenth and a quarter.
        num_rows (`list[int]`): training rows for the figure of the cost as their number grows; 0 to leave it out.
        lengths (`list[int]`): sequence lengths for the figure of the memory; 0 to leave it out.
        figure (`str`, *optional*): PNG file for both figures.
        results (`str`, *optional*): JSON file that keeps what the figures show as it is measured: run the same again
            after an interruption, and it goes on.
        only (`str`, *optional*): internal; run one method once and print its step time, or with `peak` its memory.
        peak (`bool`): see `only`.
        vocab_size (`int`): internal; of the model, that of `shape` if larger.
    """

    shape: str = "tiny"
    settings: list[str] = field(default_factory=lambda: list(SETTINGS))
    num_pairs: int = 7
    num_steps: int = 15
    num_warmup_steps: int = 3
    num_memory_steps: int = 3
    batch_size: int = 8
    sequence_length: int = 96
    num_rows: list[int] = field(default_factory=lambda: [1_000, 10_000, 100_000, 1_000_000])
    lengths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    figure: str | None = None
    results: str | None = None
    only: str | None = None
    peak: bool = False
    vocab_size: int = 0


class StepClock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next: all of it, batches and logs included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def random_rows(num_rows: int, longest: int, shortest: int, vocab_size: int, seed: int) -> Dataset:
    """Tokenized rows of random tokens and lengths."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], rng.integers(shortest, longest + 1, num_rows).cumsum()]).astype(np.int32)
    tokens = pa.ListArray.from_arrays(offsets, rng.integers(3, vocab_size, offsets[-1], dtype=np.int32))
    return Dataset(pa.table({"input_ids": tokens, "labels": tokens}))


def vocab_size_of(args: BenchmarkArguments) -> int:
    return max(args.vocab_size, SHAPES[args.shape]["vocab_size"])


def build_model(args: BenchmarkArguments, is_quantized: bool) -> LlamaForCausalLM:
    """A Llama with random weights, its linear layers quantized one after the other on the device that trains."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**{**SHAPES[args.shape], "vocab_size": vocab_size_of(args)})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if not is_quantized:
        return LlamaForCausalLM(config).to(device, dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            quantized = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            values = 0.02 * torch.randn(layer.out_features, layer.in_features, dtype=dtype, device=device)
            weight = bitsandbytes.nn.Params4bit(values.cpu(), requires_grad=False, quant_type="nf4", module=quantized)
            quantized.weight = weight.to(device)
            model.set_submodule(name, quantized)
        else:
            for name_of_part, value in list(layer.named_parameters(recurse=False)):
                values = torch.ones(value.shape) if value.dim() == 1 else 0.02 * torch.randn(value.shape)
                setattr(layer, name_of_part, torch.nn.Parameter(values.to(device, dtype)))
    # Buffers: the frequencies of the rotary embedding
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    # What Trainer and PEFT ask a quantized model for
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def run(method: str, setting: str, args: BenchmarkArguments, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Median seconds per token, those of a step, and on a GPU how often a step waits."""
    num_steps = args.num_warmup_steps + args.num_steps
    is_packed = setting.endswith("packed")
    longest, shortest = args.sequence_length, args.sequence_length // 2
    num_rows = num_steps * args.batch_size
    num_validation = 2 * args.batch_size
    if is_packed:
        longest, shortest = args.sequence_length // 4, args.sequence_length // 16
        num_rows, num_validation = 8 * num_rows, 8 * num_validation
    num_rows = max(num_rows, args.num_rows[0] if len(args.num_rows) == 1 else 0)
    training = random_rows(num_rows, longest, shortest, vocab_size_of(args), seed=1)
    validation = random_rows(num_validation, longest, shortest, vocab_size_of(args), seed=2)
    model = build_model(args, is_quantized=setting.startswith("QLoRA"))
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = StepClock()
    if method == TWO_FORWARDS:
        model = get_peft_model(model, lora)
        tokens_per_step = train_by_two_forwards(model, training, validation, args, clock)
        waits = None
    else:
        with tempfile.TemporaryDirectory() as output_dir:
            trainer = _make_trainer(method, is_packed, model, lora, clock, training, validation, args, output_dir)
            trainer.processing_class = tokenizer
            gc.collect()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train()
            waits = sum("synchronizing CUDA" in str(warning.message) for warning in caught) / num_steps
            logs = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
            tokens_per_step = logs[-1] / num_steps
    seconds = statistics.median(clock.seconds[args.num_warmup_steps :])
    return {
        "step": seconds,
        "per_token": seconds / tokens_per_step,
        "waits": waits if torch.cuda.is_available() else None,
    }


def _make_trainer(
    method: str,
    is_packed: bool,
    model: LlamaForCausalLM,
    lora: LoraConfig,
    clock: StepClock,
    training: Dataset,
    validation: Dataset,
    args: BenchmarkArguments,
    output_dir: str,
) -> SFTTrainer:
    num_steps = args.num_warmup_steps + args.num_steps
    options: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": num_steps,
        "max_length": args.sequence_length,
        "packing": is_packed,
        "train_sampling_strategy": "sequential",
        "bf16": torch.cuda.is_available(),
        "activation_checkpointing": args.shape != "tiny",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": num_steps,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    arguments: dict[str, Any] = {"model": model, "processing_class": build_tokenizer(), "peft_config": lora}
    arguments["callbacks"] = [clock]
    if method == PLAIN:
        size = args.batch_size
        if is_packed:
            rows = Dataset.from_list([*training.to_list(), *validation.to_list()])
        elif len(training) > num_steps * size:  # only their number is of interest
            rows = training
        else:
            stream = ValidationStream(len(validation), seed=42)
            mixed: list[dict[str, Any]] = []
            for step in range(num_steps):
                mixed += training.select(range(step * size, (step + 1) * size)).to_list()
                mixed += [validation[row] for row in stream.rows(step * size, (step + 1) * size)]
            rows = Dataset.from_list(mixed)
        config = SFTConfig(per_device_train_batch_size=2 * size, **options)
        trainer = SFTTrainer(args=config, train_dataset=rows, **arguments)
    else:
        trainer = BilevelSFTTrainer(
            args=BilevelSFTConfig(
                per_device_train_batch_size=args.batch_size,
                per_device_validation_batch_size=args.batch_size,
                **options,
                **METHODS[method],
            ),
            train_dataset=training,
            validation_dataset=validation,
            **arguments,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_by_two_forwards(
    model: torch.nn.Module, training: Dataset, validation: Dataset, args: BenchmarkArguments, clock: StepClock
) -> float:
    """The step of the public codes; returns the tokens of a step."""
    device = next(model.parameters()).device
    selector = torch.nn.Parameter(torch.zeros(len(training), device=device))
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizers = [torch.optim.AdamW(trained, lr=2e-5), torch.optim.Adam([selector], lr=5e-3)]
    stream = ValidationStream(len(validation), seed=42)
    num_tokens = 0

    def row_losses(rows: list[dict[str, Any]]) -> torch.Tensor:
        nonlocal num_tokens
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        num_tokens += sum(map(len, ids))
        batch = pad(ids, 0).to(device)
        mask = pad([torch.ones_like(row) for row in ids], 0).to(device)
        logits = model(input_ids=batch, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        return (losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)  # (B,)

    model.train()
    if args.shape != "tiny":
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable()
    clock.on_train_begin(None, None, None)
    num_steps = args.num_warmup_steps + args.num_steps
    for step in range(num_steps):
        rows = range(step * args.batch_size, (step + 1) * args.batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            weights = len(training) * selector.softmax(0)[rows.start : rows.stop]
            loss = 0.1 * (weights * row_losses([training[row] for row in rows])).mean()
            trusted = stream.rows(rows.start, rows.stop)
            loss = loss + 0.9 * row_losses([validation[row] for row in trusted]).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        clock.on_step_end(None, None, None)
    return num_tokens / num_steps


def peak_memory(method: str, setting: str, args: BenchmarkArguments, tokenizer: PreTrainedTokenizerFast) -> float:
    """The most MiB that tensors took while the model was built and trained; in a process that did nothing before."""
    if torch.cuda.is_available():
        run(method, setting, args, tokenizer)
        return torch.cuda.max_memory_allocated() / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run(method, setting, args, tokenizer)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]") / 2**20
