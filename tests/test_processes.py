"""Two processes see the same global batches as one, and learn the same."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes_worker
import pytest
import torch


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORKER = Path(processes_worker.__file__)
pytestmark = pytest.mark.xdist_group("processes")  # two launches serve all tests


REFINE = {
    "refine_ratio": 0.75,
    "refine_start_step": 0,
    "refine_every_steps": 3,
    "num_refined_responses": 2,
    "refine_max_new_tokens": 6,
    "refine_batch_size": 5,
    "refine_discard_flawed": False,
}


RUNS: list[dict[str, Any]] = [
    {"selection_method": "bds", "source_column": "source"},
    {"selection_method": "bmo"},
    {"value_function": "adapter", "validation_loss_type": "dpo"},
    # Both have the adapter of the first process, and so has the value function
    {"value_function": "adapter", "has_own_adapter": True},
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
    {
        "value_function": "adapter",
        "packing": True,
        "max_length": 80,
        "adaptive_validation_weight": True,
        "selector_learning_rate": 20.0,  # larger ones show the rounding of the losses
    },
    {"selection_method": "bmo", "packing": True, "max_length": 80},
    {**REFINE, "padding_free": True, "max_length": None},
    # Each process reads its share of the rows, and all have all weights
    {"screen": True},
]


def _train(folder: Path, num_processes: int) -> list[list[dict[str, Any]]]:
    """What came of each run, by rank; the same processes do one after the other."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    folders = [folder / str(number) for number in range(len(RUNS))]
    runs = []
    for options, output_dir in zip(RUNS, folders, strict=True):
        output_dir.mkdir()
        # 1 x 8 rows, or 2 packed sequences = 2 processes x 4, or 1
        batch_size = (2 if options.get("packing") else 8) // num_processes
        runs.append(
            {"output_dir": str(output_dir), "options": options, "per_device_batch_size": batch_size, "num_rows": 24}
        )
    if num_processes == 1:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the others have
        for run in copy.deepcopy(runs):
            processes_worker.main(**run)
        torch.set_num_threads(num_threads)
    else:
        command = [*launcher, str(WORKER), json.dumps(runs)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=ENVIRONMENT)
        assert result.returncode == 0, result.stderr[-3000:]
    ranks = range(num_processes)
    return [[torch.load(path / f"result-{rank}.pt", weights_only=True) for rank in ranks] for path in folders]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("two"), 2)


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_two_processes_equal_one(one_process, two_processes, number):
    """Invariant 2."""
    options = RUNS[number]
    (one,), (first, second) = one_process[number], two_processes[number]
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first["parameters"], one["parameters"], rtol=1e-5, atol=1e-5)
    logs = [run["logs"][:-1] for run in (one, first)]  # without the summary of times
    assert len(logs[1]) == len(logs[0]) > 1
    for entry, expected in zip(logs[1], logs[0], strict=True):
        assert entry == pytest.approx(expected, abs=1e-4, rel=1e-4)
    if "screen" in options:
        assert len(one["screened"]) == 24
        for screened in (first["screened"], second["screened"]):
            assert screened == pytest.approx(one["screened"], abs=1e-4)
    if "refine_ratio" in options:
        for responses in (first["responses"], second["responses"]):
            assert len(responses) == len(one["responses"]) >= 2 * 18
            for response, expected in zip(responses, one["responses"], strict=True):
                assert response.pop("log_probs") == pytest.approx(expected["log_probs"], abs=1e-4)
                assert response.pop("weight") == pytest.approx(expected["weight"], abs=1e-4)
                assert response.items() <= expected.items()
