"""The demo on a fraction of its data: what it computes, writes and prints."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_bilevel.cli import main
from trl_bilevel.demo import problem, tiny_model
from trl_bilevel.demo.comparison import area_under_roc
from trl_bilevel.demo.planted_faults import OPERATIONS, build_dataset, build_tokenizer
from trl_bilevel.demo.problem import DemoArguments
from trl_bilevel.run_records import curate_run, read_facts


pytestmark = pytest.mark.xdist_group("demo")  # one run serves all tests


def test_planted_faults_are_faults_and_nothing_else_is():
    rows = build_dataset(500, seed=0, fault_ratio=0.7)
    assert [rows["fault"][:].count(kind) for kind in ("none", "random", "wrong_rule")] == [150, 70, 280]
    for row in rows:
        name, *arguments = row["prompt"].removesuffix(" =").split()
        operation = OPERATIONS[name]
        right = row["completion"] == f" {operation.right(*arguments)}"
        assert right == (row["fault"] == "none")
        if row["fault"] == "wrong_rule" and operation.wrong(*arguments) != operation.right(*arguments):
            assert row["completion"] == f" {operation.wrong(*arguments)}"


def test_excluded_instructions_do_not_occur():
    held_out = build_dataset(200, seed=0, operations=["add"])
    others = build_dataset(600, seed=1, operations=["add"], exclude=held_out["prompt"][:])
    assert set(build_dataset(600, seed=1, operations=["add"])["prompt"]) & set(held_out["prompt"])
    assert not set(others["prompt"]) & set(held_out["prompt"])


def test_datasets_are_reproducible():
    assert build_dataset(50, seed=3, fault_ratio=0.5).to_list() == build_dataset(50, seed=3, fault_ratio=0.5).to_list()
    assert build_dataset(50, seed=3).to_list() != build_dataset(50, seed=4).to_list()


def test_area_under_roc_counts_pairs():
    generator = np.random.default_rng(0)
    scores, positive = generator.integers(0, 5, 40), generator.random(40) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert area_under_roc(scores, positive) == pytest.approx(np.mean(pairs))


def test_completion_losses_are_those_of_the_answers():
    from trl.trainer.utils import add_fused_lm_head

    tokenizer = build_tokenizer()
    model = tiny_model.build_model(tokenizer, seed=0).eval()
    add_fused_lm_head(model, outputs=("log_probs",))
    rows = build_dataset(7, seed=0)
    losses = tiny_model.completion_losses(model, tokenizer, rows, batch_size=3)
    for row, loss in zip(rows, losses, strict=True):
        tokens = torch.tensor(tokenizer(row["prompt"] + row["completion"] + "<eos>")["input_ids"])
        start = len(row["prompt"])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, start - 1 : -1]
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, tokens[start:]).item(), abs=1e-5)


def test_exact_match_of_a_model_that_always_says_the_same():
    tokenizer = build_tokenizer()

    class Parrot(torch.nn.Module):
        def generate(self, input_ids, **kwargs):
            answer = tokenizer(" AB<eos><pad>", return_tensors="pt")["input_ids"]
            return torch.cat([input_ids, answer.expand(len(input_ids), -1)], dim=1)

    rows = build_dataset(3, seed=0, operations=["upper"]).remove_columns("completion")
    rows = rows.add_column("completion", [" AB", " ABC", " AB"])
    assert tiny_model.exact_match(Parrot(), tokenizer, rows) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def demo_output(tmp_path_factory):
    """The command itself, on a small scale, with options from a YAML file and from the command line."""
    folder = tmp_path_factory.mktemp("demo")
    config = folder / "demo.yaml"
    config.write_text("num_train_rows: 320\nnum_held_out_rows: 60\nnum_train_epochs: 2\nnum_base_steps: 250\n")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["demo", "--config", str(config), "--output_dir", str(folder / "out"), "--seed", "3"]) == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder / "out"


def test_demo_writes_a_dataset_any_script_can_load(demo_output, tmp_path):
    curated = load_dataset(str(demo_output / "curated"), split="train", cache_dir=str(tmp_path))
    assert 0 < len(curated) < 320  # not as many as are good, of which nobody told the run
    assert curated.column_names == [
        "prompt", "completion", "fault", "sample_id", "weight", "rank", "scored", "response_source", "p_value",
        "good_probability", "screen_reason",
    ]  # fmt: skip
    assert sorted(curated["rank"]) == list(range(1, len(curated) + 1))


def test_demo_writes_an_adapter_that_loads_on_its_base(demo_output):
    config = json.loads((demo_output / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    model = PeftModel.from_pretrained(base, demo_output / "adapter")
    assert any("lora" in name for name, _ in model.named_parameters())
    assert config["r"] == 32


def test_demo_prints_the_scores_it_computed(demo_output):
    table = (demo_output.parent / "printed.txt").read_text()
    rows = {cells[0]: cells[1:] for line in table.splitlines() if (cells := re.findall(r"[^│ ](?:[^│]*[^│ ])?", line))}
    scored = curate_run(demo_output / "adapter")
    good = np.array(scored["fault"]) == "none"
    kept_good = good[np.array(scored["rank"]) <= good.sum()].mean()
    assert rows["bilevel SFT"][-1] == f"{kept_good:.1%}"
    for method in ("base model", "SFT", "bilevel SFT"):
        assert 0 <= float(rows[method][0]) <= 1
    assert 0 < float(rows["bilevel SFT"][1]) <= 1
    assert "seed 3" in table


def test_demo_says_what_the_run_found_and_writes_its_report(demo_output):
    printed = " ".join((demo_output.parent / "printed.txt").read_text().split())
    num_rows = len(curate_run(demo_output / "adapter"))
    kept = curate_run(demo_output / "adapter", "auto")
    curated = Dataset.from_parquet(str(demo_output / "curated" / "train.parquet"))
    assert curated["sample_id"][:] == kept["sample_id"][:]
    assert f"drops {num_rows - len(kept):,}, of which" in printed
    noise_rate = read_facts(demo_output / "adapter")["screening"]["noise_rate_after_training"]
    assert f"holds {noise_rate:.0%} of the rows to be bad" in printed
    assert "<html" in (demo_output / "report.html").read_text()


def test_demo_writes_a_figure(demo_output):
    assert (demo_output / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert (demo_output / "weights.png").stat().st_size > 10_000


def test_second_demo_trains_the_base_model_that_it_asks_for(tmp_path, monkeypatch):
    trained = []

    def train(folder, tokenizer, rows, args, on_progress):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        trained.append(args)

    monkeypatch.setattr(problem, "_train_base_model", train)
    few = {"output_dir": str(tmp_path), "num_train_rows": 30, "num_held_out_rows": 10, "num_validation_rows": 10}
    for changed in ({}, {"num_base_steps": 60}, {"seed": 1}, {"num_held_out_rows": 11}, {"num_validation_rows": 11},
                    {"fault_family": "harmful"}):  # fmt: skip
        args = DemoArguments(**{**few, **changed})
        for _ in range(2):  # the same once more takes what is there
            problem.build_problem(args, problem.base_model_folder(args), lambda share: None)
        assert trained.pop() is args
        assert not trained
    other = DemoArguments(**{**few, "fault_ratio": 0.2, "num_train_epochs": 1})
    problem.build_problem(other, problem.base_model_folder(other), lambda share: None)
    assert not trained  # nothing that it was trained on is different


def test_demo_without_faults_is_refused():
    with pytest.raises(ValueError, match=r"`fault_ratio` must be larger than 0 and less than 1, got 1.0"):
        DemoArguments(fault_ratio=1.0)
