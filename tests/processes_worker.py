"""Run by `test_processes.py` in each process: one short training, whose result the main process writes."""

import json
import os
import sys
from pathlib import Path

import torch
from conftest import build_tiny_model, build_tokenizer, prompt_completion_rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, screen_dataset


class LogsOnOne(TrainerCallback):
    """As users do: what one process logs by itself must not wait for the others."""

    def __init__(self, trainer: BilevelSFTTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.log({"mine": 1.0})


def main(output_dir: str, options: dict, per_device_batch_size: int, num_rows: int) -> None:
    tokenizer = build_tokenizer()
    train_dataset = prompt_completion_rows(num_rows)
    train_dataset = train_dataset.add_column("source", [str(row % 3) for row in range(num_rows)])
    if options.pop("is_streamed", False):
        ids = [f"row-{row}" for row in range(num_rows)]
        train_dataset = train_dataset.add_column("uid", ids).to_iterable_dataset()
    validation_dataset = prompt_completion_rows(10, 1000)
    if options.get("validation_loss_type") == "dpo":
        rejected = [f" {row} no" for row in range(10)]
        validation_dataset = validation_dataset.rename_column("completion", "chosen").add_column("rejected", rejected)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = build_tiny_model("llama", tokenizer)
    if options.pop("has_own_adapter", False):  # from an unseeded generator in each process
        torch.manual_seed(int(os.environ.get("RANK", "0")))
        model = get_peft_model(model, lora)
    trainer = BilevelSFTTrainer(
        model=model,
        args=BilevelSFTConfig(
            output_dir=output_dir,
            per_device_train_batch_size=per_device_batch_size,
            num_train_epochs=2,
            learning_rate=0.3,
            optim="sgd",
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            ddp_backend="gloo" if "RANK" in os.environ else None,
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=7,
            **{"filter_ratio": 0.25, **options},
        ),
        train_dataset=train_dataset,
        validation_dataset=validation_dataset,
        processing_class=tokenizer,
        peft_config=lora if "value_function" in options and not isinstance(model, PeftModel) else None,
    )
    trainer.add_callback(LogsOnOne(trainer))
    trainer.train()
    result = {
        "weights": trainer.data_selector.weights(),
        "parameters": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
        "logs": trainer.state.log_history,
        "responses": trainer.response_store.table().to_pylist(),
    }
    if options.get("screen"):
        args = SFTConfig(output_dir, use_cpu=True, bf16=False, report_to="none", activation_checkpointing=False)
        folder, model = Path(output_dir) / "screened", build_tiny_model("llama", tokenizer)
        # Chunks and batches of a few rows, which the processes share
        more = {"processing_class": tokenizer, "output_dir": folder, "chunk_size": 9, "tokens_per_batch": 64}
        result["screened"] = screen_dataset(model, train_dataset, validation_dataset, args, **more).scored["score"][:]
    torch.save(result, Path(output_dir) / f"result-{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    for run in json.loads(sys.argv[1]):
        main(**run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads may abort a process that exits within it
