"""Run by `test_weighted_sft.py` in each process: short trainings, whose results the main process writes."""

import os
import sys
from pathlib import Path

import torch
from conftest import QUIET_CPU_RUN, build_tiny_model, build_tokenizer, prompt_completion_rows

from trl_bilevel import WeightedSFTConfig, WeightedSFTTrainer


PACKED = {"packing": True, "max_length": 80, "batch": 2}
RUNS: list[dict] = [
    {},
    {"loss_type": "dft", "gradient_accumulation_steps": 2, "batch": 4},
    {"normalize_weights": False, "padding_free": True, "max_length": None},
    PACKED,
    {"is_streamed": True, "normalize_weights": False, "train_sampling_strategy": "sequential"},
]


def main(folder: str) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    for number, run in enumerate(RUNS):
        options = dict(run)
        weights = [(row * 7 % 5) / 2 for row in range(30)]  # a fifth of them 0
        rows = prompt_completion_rows(30).add_column("weight", weights)
        if options.pop("is_streamed", False):
            rows = rows.to_iterable_dataset()
        tokenizer = build_tokenizer()
        args = WeightedSFTConfig(
            output_dir=f"{folder}/run-{number}",
            per_device_train_batch_size=options.pop("batch", 8) // world_size,
            max_steps=3,
            learning_rate=0.3,
            optim="sgd",
            seed=7,
            ddp_backend="gloo",
            **QUIET_CPU_RUN,
            **options,
        )
        model = build_tiny_model("llama", tokenizer)
        trainer = WeightedSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        if trainer.is_world_process_zero():
            result = {
                "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                "parameters": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
            }
            torch.save(result, Path(folder) / f"{number}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    torch.distributed.destroy_process_group()  # gloo's threads may abort a process that exits within it
