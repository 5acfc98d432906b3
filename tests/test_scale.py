"""Training that is spread over processes by accelerate: its configs, and FSDP2 against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate_configs"
WORKER = Path(__file__).with_name("scale_worker.py")
TYPES = {"cpu": "MULTI_CPU", "multi_gpu": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def test_every_config_is_listed_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_loads_the_config(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == TYPES[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def _launch(folder: Path, launcher: list[str], specs: list[dict], per_device: int, num_processes: int) -> list:
    folder.mkdir()
    for spec in specs:
        spec["options"] = {**spec.get("options", {}), "per_device_train_batch_size": per_device}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, str(WORKER), str(folder), json.dumps(specs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [[torch.load(folder / f"{spec['name']}-{rank}.pt") for rank in range(num_processes)] for spec in specs]


def test_fsdp2_on_two_processes_equals_one_process(tmp_path):
    specs = [
        {"name": "bds"},
        {"name": "bmo", "options": {"selection_method": "bmo"}},
        {"name": "lora", "lora": True},
    ]
    refused = [
        {"name": "value_function", "lora": True, "options": {"value_function": "adapter"}},
        {"name": "dpo", "options": {"validation_loss_type": "dpo"}},
        {"name": "refine", "options": {"refine_ratio": 0.5}},
    ]
    plain = ["torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    one_process = [{**spec, "options": {**spec.get("options", {})}} for spec in specs]
    one_process[2]["options"]["value_function"] = "none"  # what FSDP falls back to
    one = _launch(tmp_path / "one", plain, one_process, 8, 1)
    sharded = ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIGS / "fsdp2.yaml")]
    sharded += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    two = _launch(tmp_path / "two", sharded, specs + refused, 4, 2)

    for spec, (expected,), (first, second) in zip(specs, one, two[:3], strict=True):
        assert first["distributed_type"] == "DistributedType.FSDP"
        assert first["sharded"] > 0
        assert not first["has_value_function"]
        assert torch.equal(first["weights"], second["weights"])
        torch.testing.assert_close(first["weights"], expected["weights"], rtol=1e-5, atol=1e-5)
        for name in ("loss", "validation_loss", "training_loss", "num_tokens", "grad_norm", "selector/entropy"):
            values = [[entry[name] for entry in run["logs"] if name in entry] for run in (expected, first)]
            assert len(values[0]) == 6
            assert values[1] == pytest.approx(values[0], abs=1e-5, rel=1e-5), name
        file_name = "adapter_model.safetensors" if spec.get("lora") else "model.safetensors"
        saved = load_file(tmp_path / "two" / spec["name"] / file_name)
        torch.testing.assert_close(saved, load_file(tmp_path / "one" / spec["name"] / file_name), rtol=1e-5, atol=1e-5)
    for spec, (first, _) in zip(refused, two[3:], strict=True):
        assert "not supported with DeepSpeed" in first["error"], spec["name"]
