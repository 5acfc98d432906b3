"""Run by `test_scale.py` in each process: short trainings one after the other, and what came of them, by rank."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import build_tiny_model, build_tokenizer, prompt_completion_rows
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


POISON = "#"  # a token whose embedding is NaN: so is the loss of its rows


def pretend_that_cpus_are_gpus() -> None:
    """
    accelerate shards on GPUs only: it takes the processes of a CPU for plain data parallelism. From this word on, all
    that it does for FSDP2 and DeepSpeed is what it does on GPUs.
    """

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        dist.init_process_group("gloo")


# What a collective sends, where the caller names it
_TENSOR_KEYWORDS = {
    "all_gather": "tensor",
    "all_reduce": "tensor",
    "all_gather_into_tensor": "input_tensor",
    "broadcast": "tensor",
}


class CountedCollectives:
    """Collectives that a run calls from Python, and the bytes that each process puts in."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.wrapped = {name: getattr(dist, name) for name in _TENSOR_KEYWORDS}

    def _counting(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            position = 1 if name.startswith("all_gather") else 0
            tensor = args[position] if len(args) > position else kwargs[_TENSOR_KEYWORDS[name]]
            self.calls[name] += 1
            self.num_bytes[name] += tensor.numel() * tensor.element_size()
            return self.wrapped[name](*args, **kwargs)

        return call

    def __enter__(self) -> "CountedCollectives":
        for name in self.wrapped:
            setattr(dist, name, self._counting(name))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, function in self.wrapped.items():
            setattr(dist, name, function)


class KillOneRank(TrainerCallback):
    """SIGKILL, as the kernel does when memory runs out."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def rows_of(spec: dict) -> Dataset:
    rows = prompt_completion_rows(spec.get("num_rows", 24))
    poisoned = spec.get("poisoned_rows", [])
    if poisoned:
        bad = [{"prompt": f"add {POISON} and {row}:", "completion": " 1"} for row in range(len(rows))]
        rows = Dataset.from_list([bad[i] if i in poisoned else row for i, row in enumerate(rows)])
    return rows


def run(spec: dict, folder: Path) -> dict:
    tokenizer = build_tokenizer()
    model = build_tiny_model(spec.get("family", "llama"), tokenizer)
    if spec.get("poisoned_rows"):
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(POISON)] = torch.nan
    options = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
        "filter_ratio": 0.25,
        **spec.get("options", {}),
    }
    validation = prompt_completion_rows(15, 1000)
    if spec.get("poisoned_validation"):
        validation = Dataset.from_list([{"prompt": f"{POISON} {row}", "completion": " 1"} for row in range(15)])
    if options.get("validation_loss_type") == "dpo":
        rejected = [f" {row} no" for row in range(15)]
        validation = validation.rename_column("completion", "chosen").add_column("rejected", rejected)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    callbacks = [KillOneRank(*spec["kill"])] if "kill" in spec else []
    trainer = BilevelSFTTrainer(
        model=model,
        args=BilevelSFTConfig(**options),
        train_dataset=rows_of(spec),
        validation_dataset=validation,
        processing_class=tokenizer,
        peft_config=lora if spec.get("lora") else None,
        callbacks=callbacks,
    )
    updates: list[tuple[list[int], list[float]]] = []  # rows of each selector update, and their losses
    update = trainer.data_selector.update

    def recorded_update(row_indices: torch.Tensor, losses: torch.Tensor) -> None:
        updates.append((row_indices.tolist(), losses.tolist()))
        update(row_indices, losses)

    trainer.data_selector.update = recorded_update
    with CountedCollectives() as collectives:
        trainer.train(resume_from_checkpoint=spec.get("resume_from"))
    trainer.save_model()
    return {
        "weights": trainer.data_selector.weights(),
        "logs": trainer.state.log_history,
        "has_value_function": trainer.value_function is not None,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "num_sharded": [type(value).__name__ for value in trainer.model.parameters()].count("DTensor"),
        "updates": updates,
        "calls": dict(collectives.calls),
        "num_bytes": dict(collectives.num_bytes),
        "responses": trainer.response_store.table().to_pylist(),
    }


def main(folder: Path, specs: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        pretend_that_cpus_are_gpus()
    rank = os.environ.get("RANK", "0")
    for spec in specs:
        try:
            result = run(spec, folder / spec["name"])
        except ValueError as error:
            result = {"error": str(error)}
        torch.save(result, folder / f"{spec['name']}-{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()  # gloo's threads may abort a process that exits within it


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
