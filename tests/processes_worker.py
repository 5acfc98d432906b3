"""Run by `test_processes.py` in each process: one short training, whose result the main process writes."""

import sys
from pathlib import Path

import torch
from conftest import build_tiny_model, build_tokenizer, prompt_completion_rows

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


def main(output_dir: str, selection_method: str, per_device_batch_size: int, num_rows: int) -> None:
    tokenizer = build_tokenizer()
    trainer = BilevelSFTTrainer(
        model=build_tiny_model("llama", tokenizer),
        args=BilevelSFTConfig(
            output_dir=output_dir,
            per_device_train_batch_size=per_device_batch_size,
            num_train_epochs=2,
            learning_rate=0.3,
            optim="sgd",
            filter_ratio=0.25,
            selection_method=selection_method,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            ddp_backend="gloo",
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=7,
        ),
        train_dataset=prompt_completion_rows(num_rows),
        validation_dataset=prompt_completion_rows(10, 1000),
        processing_class=tokenizer,
    )
    trainer.train()
    result = {
        "weights": trainer.data_selector.weights(),
        "parameters": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
        "logs": trainer.state.log_history,
    }
    torch.save(result, Path(output_dir) / f"result-{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
