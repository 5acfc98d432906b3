"""Two processes see the same global batches as one, and learn the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORKER = Path(__file__).with_name("processes_worker.py")


def _train(folder: Path, options: dict, num_processes: int, per_device_batch_size: int) -> list[dict]:
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [*launcher, str(WORKER), str(folder), json.dumps(options), str(per_device_batch_size), "24"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(num_processes)]


REFINE = {
    "refine_ratio": 0.75,
    "refine_start_step": 0,
    "refine_every_steps": 3,
    "num_refined_responses": 2,
    "refine_max_new_tokens": 6,
    "refine_batch_size": 5,
    "refine_discard_flawed": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {"selection_method": "bds", "source_column": "source"},
        {"selection_method": "bmo"},
        {"value_function": "adapter", "validation_loss_type": "dpo"},
        # Each process divides by its own rows, so all must keep as many
        {
            "value_function": "adapter",
            "average_tokens_across_devices": False,
            "loss_normalization": "row",
            "filter_ratio": 0.0,
        },
        # A stream is cut into the same global batches; 24 rows three times
        {"is_streamed": True, "sample_id_column": "uid", "value_function": "adapter", "max_steps": 9},
        REFINE,
        # Sequences of several rows, not as many in one process as in the other
        {"value_function": "adapter", "packing": True, "max_length": 80},
        {"selection_method": "bmo", "packing": True, "max_length": 80},
        {**REFINE, "padding_free": True, "max_length": None},
    ],
)
def test_two_processes_equal_one(tmp_path, options):
    """Invariant 2: 1 x 8 rows, or 2 packed sequences = 2 processes x 4, or 1."""
    batch_size = 2 if options.get("packing") else 8
    (one,) = _train(tmp_path / "one", options, 1, batch_size)
    first, second = _train(tmp_path / "two", options, 2, batch_size // 2)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first["parameters"], one["parameters"], rtol=1e-5, atol=1e-5)
    for name in ("loss", "validation_loss", "training_loss", "num_tokens", "selector/filtered_ratio"):
        values = [[entry[name] for entry in run["logs"] if name in entry] for run in (one, first)]
        assert values[1] == pytest.approx(values[0], abs=1e-5), name
    if "refine_ratio" in options:
        for responses in (first["responses"], second["responses"]):
            assert len(responses) == len(one["responses"]) >= 2 * 18
            for response, expected in zip(responses, one["responses"], strict=True):
                assert response.pop("log_probs") == pytest.approx(expected["log_probs"], abs=1e-4)
                assert response.pop("weight") == pytest.approx(expected["weight"], abs=1e-4)
                assert response.items() <= expected.items()
