"""Many processes, started by `accelerate launch` with the configs of `examples/`, learn what one process learns."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import scale_worker
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


pytestmark = [
    pytest.mark.xdist_group("scale"),  # its fixtures are launches of many runs: once is enough
    pytest.mark.filterwarnings("ignore"),  # of the runs of one process, which are done here
]

WORKER = Path(scale_worker.__file__)
CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate_configs"
BATCH_SIZE = 12  # of all processes together, where a run does not say otherwise

SAVE = {"save_strategy": "steps", "save_steps": 2}
DISTRIBUTED_LORA = {"lora": True, "options": {"amortized_selector": True}}
POISONED = {"poisoned_rows": [0, 1, 2, 3, 4, 5, 14], "poisoned_validation": True}
SEQUENTIAL = {"train_sampling_strategy": "sequential"}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, **SAVE}

# Of 2 sharded processes
SHARDED = {
    "bds": {},
    "bmo": {"options": {"selection_method": "bmo", "gradient_accumulation_steps": 2}},
    "lora": DISTRIBUTED_LORA,
    "nan": {**POISONED, "options": SEQUENTIAL},
    "unbroken": {"options": ADAM},
    "unbroken_lora": {"lora": True, "options": ADAM},
    "resumed": {"options": ADAM, "resume_from": "unbroken/checkpoint-2"},
    "resumed_lora": {"lora": True, "options": ADAM, "resume_from": "unbroken_lora/checkpoint-2"},
    "adapter": {"lora": True, "options": {"value_function": "adapter"}},
    "dpo": {"options": {"validation_loss_type": "dpo"}},
    "refine": {"options": {"refine_ratio": 0.5}},
}
# Of 3 processes; 29 rows are 2 batches of 12 and 5 rows, which accelerate fills with 7 of the first
UNEVEN = {"num_rows": 29, "options": {"learning_rate": 0.0, "filter_ratio": 0.0}}
ONE_QUESTION = {
    "options": {
        "refine_ratio": 1 / 24,
        "refine_start_step": 0,
        "refine_every_steps": 2,
        "num_refined_responses": 2,
        "refine_max_new_tokens": 6,
        "refine_batch_size": 5,
        "refine_discard_flawed": False,
    },
}
THREE = {
    "uneven": UNEVEN,
    "dropped": {"num_rows": 29, "options": {"dataloader_drop_last": True, "gradient_accumulation_steps": 2}},
    "one_question": ONE_QUESTION,
}
TWO = {
    "one_question": ONE_QUESTION,
    "half": {"options": SAVE},
    "few_rows": {"options": {"max_steps": 2, "logging_steps": 9}},
    "many_rows": {"num_rows": 96, "options": {"max_steps": 2, "logging_steps": 9}},
}
KILLED = {"killed": {"kill": [1, 3], "options": SAVE}}
ONE = {
    **{name: SHARDED[name] for name in ("bds", "bmo", "nan")},
    "lora": {"lora": True, "options": {"amortized_selector": True, "value_function": "none"}},
    **{name: THREE[name] for name in ("uneven", "dropped", "one_question")},
    "whole": {"options": SAVE},
}


class Runs(NamedTuple):
    """Trainings that the same processes did one after the other."""

    folder: Path
    """A folder of each run's name holds what it saved."""
    results: dict[str, list[dict[str, Any]]]
    """Of each run, by rank."""


def _per_device(spec: dict[str, Any], num_processes: int) -> dict[str, Any]:
    options = spec.get("options", {})
    batch_size = BATCH_SIZE // num_processes // options.get("gradient_accumulation_steps", 1)
    return {**spec, "options": {"per_device_train_batch_size": batch_size, **options}}


def _command(folder: Path, specs: dict[str, Any], num_processes: int, config: str) -> list[str]:
    runs = [{"name": name, **_per_device(spec, num_processes)} for name, spec in specs.items()]
    for run in runs:
        if "resume_from" in run:
            run["resume_from"] = str(folder / run["resume_from"])
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
        launcher += ["--num_processes", str(num_processes), "--mixed_precision", "no", "--main_process_port", "0"]
    return [*launcher, str(WORKER), str(folder), json.dumps(runs)]


def _launch(
    folder: Path, specs: dict[str, Any], num_processes: int, config: str = "cpu_gloo", **environment: str
) -> subprocess.CompletedProcess:
    command = _command(folder, specs, num_processes, config)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=variables)


def _train(folder: Path, specs: dict[str, Any], num_processes: int, config: str = "cpu_gloo", **env: str) -> Runs:
    if num_processes == 1:  # here
        _, _, _, runs = _command(folder, specs, num_processes, config)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the others have
        scale_worker.main(folder, json.loads(runs))
        torch.set_num_threads(num_threads)
    else:
        result = _launch(folder, specs, num_processes, config, **env)
        assert result.returncode == 0, result.stderr[:6000] + result.stderr[-2000:]
    return Runs(
        folder,
        {
            name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(num_processes)]
            for name in specs
        },
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Runs:
    return _train(tmp_path_factory.mktemp("one"), ONE, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Runs:
    return _train(tmp_path_factory.mktemp("two"), TWO, 2)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Runs:
    return _train(tmp_path_factory.mktemp("three"), THREE, 3)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Runs:
    return _train(tmp_path_factory.mktemp("sharded"), SHARDED, 2, "fsdp2")


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = [
        folder / name for name in ("model.safetensors", "adapter_model.safetensors") if (folder / name).exists()
    ]
    return load_file(file)


def _check_same(first: Runs, second: Runs, name: str, other_name: str | None = None, tolerance: float = 1e-5) -> None:
    """Row weights, what was saved and what was logged; and that all ranks of both hold the same row weights."""
    other_name = other_name or name
    (expected, *_), ranks = first.results[name], second.results[other_name]
    assert "error" not in expected, expected["error"]
    assert "error" not in ranks[0], ranks[0]["error"]
    for rank in ranks[1:]:
        assert torch.equal(rank["weights"], ranks[0]["weights"])
    torch.testing.assert_close(ranks[0]["weights"], expected["weights"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        _saved(second.folder / other_name),
        _saved(first.folder / name),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )
    # Without the summary of times, and what TRL counts anew in a resumed run
    left_out = {"num_tokens"} if other_name != name else set()
    logs = [
        [{key: value for key, value in entry.items() if key not in left_out} for entry in run["logs"][:-1]]
        for run in (expected, ranks[0])
    ]
    assert len(logs[1]) == len(logs[0]) > 1
    for entry, expected_entry in zip(logs[1], logs[0], strict=True):
        assert entry == pytest.approx(expected_entry, abs=1e-4, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("name", ["bds", "bmo", "lora", "nan"])
def test_fsdp2_equals_one_process(one, sharded, name):
    (first, _) = sharded.results[name]
    assert first["distributed_type"] == "DistributedType.FSDP"
    assert first["num_sharded"] > 0
    assert not first["has_value_function"]  # by default an adapter has one, but not where it is sharded
    _check_same(one, sharded, name)
    if name == "lora":
        heads = [load_file(run.folder / name / "amortized_selector.safetensors") for run in (one, sharded)]
        torch.testing.assert_close(heads[1], heads[0], rtol=1e-4, atol=1e-4)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(sharded.folder / name).state_dict()
        torch.testing.assert_close(loaded, _saved(sharded.folder / name), equal_nan=True)


@pytest.mark.parametrize("suffix", ["", "_lora"])
def test_fsdp2_resumes(sharded, suffix):
    _check_same(sharded, sharded, f"unbroken{suffix}", f"resumed{suffix}", tolerance=1e-7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter", "`value_function='adapter'` is not supported with DeepSpeed, FSDP"),
        ("dpo", "`validation_loss_type='dpo'` is not supported with DeepSpeed or FSDP"),
        ("refine", "`refine_ratio` is not supported with DeepSpeed or FSDP"),
    ],
)
def test_fsdp2_refuses(sharded, name, message):
    for rank in sharded.results[name]:
        assert message in rank["error"]


def test_last_batch_filled_with_rows_of_the_first(one, three):
    """accelerate fills it: a row of the first batch is visited once more, but no row twice in an update."""
    (expected,), ranks = one.results["uneven"], three.results["uneven"]
    for rank in ranks:
        assert torch.equal(rank["weights"], ranks[0]["weights"])
        assert rank["updates"] == ranks[0]["updates"]
    updates = ranks[0]["updates"]
    assert [len(rows) for rows, _ in updates] == 2 * [12, 12, 12]
    # With the model at rest a row's loss is the same at every visit
    loss_of = {row: loss for rows, losses in expected["updates"] for row, loss in zip(rows, losses, strict=True)}
    assert loss_of.keys() == set(range(29))
    for epoch in (updates[:3], updates[3:]):
        first, _, last = (rows for rows, _ in epoch)
        assert {row for rows, _ in epoch for row in rows} == set(range(29))
        assert len(set(last)) == len(last)
        assert len(set(last) & set(first)) == 3 * 12 - 29
    for rows, losses in updates:
        assert losses == pytest.approx([loss_of[row] for row in rows], abs=1e-5)


def test_uneven_rows_dropped(one, three):
    _check_same(one, three, "dropped")


@pytest.mark.parametrize("number", ["two", "three"])
def test_one_question_for_several_ranks(one, number, request):
    """Ranks that have nothing to generate do not wait for ever, and know the answers of the others."""
    runs = request.getfixturevalue(number)
    _check_same(one, runs, "one_question")
    (expected,) = one.results["one_question"]
    assert len(expected["responses"]) >= 2
    for rank in runs.results["one_question"]:
        names = ("row", "step", "response", "text", "completion_ids")
        answers = [[[response[name] for name in names] for response in run["responses"]] for run in (rank, expected)]
        assert answers[0] == answers[1]


def test_communication_does_not_grow_with_the_dataset(two):
    """Besides the gradients, a step sends what it knows of the rows of its batch, to each of them O(1) bytes."""
    few, many = two.results["few_rows"][0], two.results["many_rows"][0]
    assert few["calls"] == many["calls"]
    assert few["num_bytes"] == many["num_bytes"]
    assert 0 < sum(few["num_bytes"].values()) < 2 * 100 * BATCH_SIZE


def test_resume_on_fewer_processes(one, two, tmp_path):
    """2 x 6 rows up to the checkpoint, then 1 x 12."""
    shutil.copytree(two.folder / "half", tmp_path / "half")
    resumed = _train(tmp_path, {"rest": {"options": SAVE, "resume_from": "half/checkpoint-2"}}, 1)
    _check_same(one, resumed, "whole", "rest")


@pytest.mark.slow
def test_a_rank_that_dies(one, tmp_path):
    """SIGKILL after step 3: the launcher ends the others and says why; the checkpoint of step 2 goes on."""
    start = time.monotonic()
    result = _launch(tmp_path, KILLED, 2)
    assert time.monotonic() - start < 200
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr or "Signal 9" in result.stderr
    assert not (tmp_path / "killed-0.pt").exists()
    resumed = _train(tmp_path, {"rest": {"options": SAVE, "resume_from": "killed/checkpoint-2"}}, 2)
    _check_same(one, resumed, "whole", "rest")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("multi_gpu", {"multi_gpu": True}),
        ("fsdp2", {"use_fsdp": True, "fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
        ("deepspeed_zero2", {"use_deepspeed": True, "zero_stage": 2}),
        ("deepspeed_zero3", {"use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True}),
        ("cpu_gloo", {"use_cpu": True, "num_processes": 2}),
    ],
)
def test_accelerate_reads_the_configs(config, expected):
    parsed = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{config}.yaml"), "train.py"])
    args = vars(_validate_launch_command(parsed)[0])
    assert {name: args[name] for name in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["bds", "bmo", "lora", "nan"])
def test_deepspeed_equals_one_process(one, tmp_path, stage, name):
    pytest.importorskip("deepspeed")
    # One launch for each: accelerate's DeepSpeed options outlive a run
    runs = _train(tmp_path, {name: SHARDED[name]}, 2, f"deepspeed_zero{stage}", DS_ACCELERATOR="cpu")
    assert runs.results[name][0]["distributed_type"] == "DistributedType.DEEPSPEED"
    _check_same(one, runs, name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("suffix", ["", "_lora"])
def test_deepspeed_resumes(tmp_path, stage, suffix):
    pytest.importorskip("deepspeed")
    config = f"deepspeed_zero{stage}"
    for name in (f"unbroken{suffix}", f"resumed{suffix}"):
        runs = _train(tmp_path, {name: SHARDED[name]}, 2, config, DS_ACCELERATOR="cpu")
        runs.results[f"unbroken{suffix}"] = [
            torch.load(tmp_path / f"unbroken{suffix}-{rank}.pt", weights_only=True) for rank in range(2)
        ]
    _check_same(runs, runs, f"unbroken{suffix}", f"resumed{suffix}", tolerance=1e-6)


@pytest.mark.slow
def test_what_deepspeed_cannot_do_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    specs = {name: SHARDED[name] for name in ("adapter", "dpo", "refine")}
    runs = _train(tmp_path, specs, 2, "deepspeed_zero2", DS_ACCELERATOR="cpu")
    for name in specs:
        assert "is not supported with DeepSpeed" in runs.results[name][0]["error"]
