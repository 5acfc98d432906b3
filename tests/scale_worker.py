"""Run by `test_scale.py` in each process: short trainings one after the other, and what came of them, by rank."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import build_tiny_model, build_tokenizer, prompt_completion_rows
from peft import LoraConfig

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


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


class CountedCollectives:
    """Collectives that a run calls from Python, and the bytes that each process puts in."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.wrapped = {
            name: getattr(dist, name) for name in ("all_gather", "all_reduce", "all_gather_into_tensor", "broadcast")
        }

    def _counting(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name.startswith("all_gather") else args[0]
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


def run(spec: dict, folder: Path) -> dict:
    tokenizer = build_tokenizer()
    model = build_tiny_model(spec.get("family", "llama"), tokenizer)
    options = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
        "ddp_backend": "gloo",
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
        "filter_ratio": 0.25,
        **spec.get("options", {}),
    }
    validation = prompt_completion_rows(10, 1000)
    if options.get("validation_loss_type") == "dpo":
        rejected = [f" {row} no" for row in range(10)]
        validation = validation.rename_column("completion", "chosen").add_column("rejected", rejected)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = BilevelSFTTrainer(
        model=model,
        args=BilevelSFTConfig(**options),
        train_dataset=prompt_completion_rows(24),
        validation_dataset=validation,
        processing_class=tokenizer,
        peft_config=lora if spec.get("lora") else None,
    )
    with CountedCollectives() as collectives:
        trainer.train(resume_from_checkpoint=spec.get("resume_from"))
    trainer.save_model()
    return {
        "weights": trainer.data_selector.weights(),
        "scored": trainer.data_selector.scored,
        "logits": trainer.data_selector.logits,
        "logs": trainer.state.log_history,
        "has_value_function": trainer.value_function is not None,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "sharded": [type(value).__name__ for value in trainer.model.parameters()].count("DTensor"),
        "calls": dict(collectives.calls),
        "num_bytes": dict(collectives.num_bytes),
        "responses": trainer.response_store.table().to_pylist(),
    }


def main(folder: Path, specs: list[dict]) -> None:
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
