"""A run goes on after whatever happened to it, as if nothing had."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_bilevel.value_function import OPTIMIZER_FILE_NAME, VALUE_FUNCTION_FILE_NAME


ROOT = Path(__file__).parents[1]


def _inject(*options):
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    kind, *numbers = [cell.strip() for cell in result.stdout.splitlines()[-2].strip("│ ").split("│") if cell.strip()]
    assert kind == "all"
    injected, runs, survived, lost = map(int, numbers)
    assert (survived, lost) == (runs, 0)
    return injected


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts what Linux does with files")
def test_faults_at_random_moments():
    assert _inject("--num_faults", "2", "--faults_per_run", "2", "--max_steps", "6",
                   "--kinds", "BDS, refinement") == 2 * 4  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts what Linux does with files")
def test_many_faults_at_random_moments():
    assert _inject("--num_faults", "10", "--seed", "1") == 10 * 4 * 4


def _same(first, second):
    assert torch.equal(first.data_selector.weights(), second.data_selector.weights())
    parameters = dict(second.model.named_parameters())
    for name, value in first.model.named_parameters():
        assert torch.equal(value, parameters[name]), name


@pytest.fixture
def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_damaged_files_are_named_and_an_earlier_checkpoint_serves(make_trainer, lora, tmp_path):
    options = {"peft_config": lora, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 2,
               "amortized_selector": True}  # fmt: skip
    unbroken = make_trainer(**options)
    unbroken.train()
    checkpoint = Path(unbroken.args.output_dir) / "checkpoint-4"
    names = [VALUE_FUNCTION_FILE_NAME, OPTIMIZER_FILE_NAME, "_data_selector.safetensors", "_row_scores.pq",
             "_run.json", "amortized_selector.safetensors", "bilevel_sft.json", "adapter_model.safetensors",
             "optimizer.pt"]  # fmt: skip
    resumed = make_trainer(**options)
    for name in names:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        for chosen in (True, str(checkpoint)):
            with pytest.raises(ValueError, match=rf"checkpoint-4/{name} is damaged.*'last_intact'"):
                resumed.train(resume_from_checkpoint=chosen)
        (checkpoint / name).write_bytes(content)
    (checkpoint / VALUE_FUNCTION_FILE_NAME).unlink()
    resumed.train(resume_from_checkpoint="last_intact")  # checkpoint-2
    assert resumed.state.log_history[0]["step"] == 2
    _same(resumed, unbroken)
    # It was written again, whole
    again = make_trainer(**{**options, "max_steps": 6})
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [2, 4, 6]


def test_nothing_to_resume_from_is_said_as_trainer_does(make_trainer):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="`resume_from_checkpoint='nowhere'` is no folder"):
        make_trainer().train(resume_from_checkpoint="nowhere")


def test_finished_run_that_is_resumed_stays_as_it_is(make_trainer):
    """Trainer trains on one batch more where the last step is not the last of an epoch."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    finished = make_trainer(**options)
    finished.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    _same(resumed, finished)


def test_checkpoints_are_deleted_after_the_next_one_is_whole(make_trainer, monkeypatch):
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1)
    folder = Path(trainer.args.output_dir)
    seen = []

    def look(checkpoint):
        seen.append(sorted(path.name for path in folder.glob("checkpoint-*")))

    monkeypatch.setattr("trl_bilevel.checkpointing.write_manifest", look)
    trainer.train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.args.save_total_limit == 1
    saved = torch.load(folder / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    try:
        result = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` here")
    if result.returncode != 0:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk(make_trainer, lora, small_disk):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "save_total_limit": 2}
    unbroken = make_trainer(**options)
    unbroken.train()
    broken = make_trainer(**options, output_dir=str(small_disk / "run"))
    with pytest.raises(OSError, match=r"The disk is full.*whole; make room.*resume_from_checkpoint=True"):
        broken.train()
    folder = Path(broken.args.output_dir)
    assert not list(folder.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    resumed = make_trainer(**options, output_dir=broken.args.output_dir)
    resumed.train(resume_from_checkpoint=broken.state.global_step > 1)
    _same(resumed, unbroken)
