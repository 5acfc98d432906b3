"""The benchmark scripts run and print their tables; here on a scale at which the numbers mean nothing."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_step_cost(capsys):
    benchmark = _load("step_cost")
    benchmark.main(
        benchmark.BenchmarkArguments(
            num_pairs=1,
            num_steps=2,
            num_warmup_steps=1,
            num_memory_runs=1,
            batch_size=2,
            hidden_size=32,
            vocab_size=99,
        )
    )
    output = capsys.readouterr().out
    assert "step time, ms" in output
    assert "peak memory, MiB" in output
    assert output.count("BDS, value function") == 2


def test_step_cost_trains_both_methods_on_the_same_rows(monkeypatch):
    benchmark = _load("step_cost")
    args = benchmark.BenchmarkArguments(num_steps=2, num_warmup_steps=1, batch_size=2, hidden_size=32, vocab_size=99)
    seen = {}
    for method, trainer_class in (("SFTTrainer", benchmark.SFTTrainer), ("BDS", benchmark.BilevelSFTTrainer)):
        batches = seen[method] = []
        original = trainer_class.get_batch_samples

        def recording(self, *arguments, original=original, batches=batches):
            result = original(self, *arguments)
            batches.extend(sorted(row[row != -100].tolist() for row in batch["labels"]) for batch in result[0])
            return result

        monkeypatch.setattr(trainer_class, "get_batch_samples", recording)
        benchmark.run(method, args, benchmark.build_tokenizer())
        monkeypatch.undo()
    assert len(seen["SFTTrainer"]) == 3
    assert seen["SFTTrainer"] == seen["BDS"]


def test_selector_scale(capsys):
    benchmark = _load("selector_scale")
    benchmark.main(benchmark.BenchmarkArguments(num_rows=[5000], batch_size=16, num_updates=3))
    printed = capsys.readouterr().out
    assert "5,000" in printed
    assert "mirror_descent" in printed


def test_real_text(tmp_path, capsys):
    benchmark = _load("real_text")
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        lines = [json.dumps({"question": f"{name} {n} + {n}?", "answer": f"#### {2 * n}"}) for n in range(40)]
        (tmp_path / name).write_text("\n".join(lines))
    for name in ("alpaca_en_1k.json", "safety_instructions.json"):
        rows = [{"instruction": f"Say {n}", "input": "", "output": f"{name} {n}"} for n in range(20)]
        (tmp_path / name).write_text(json.dumps(rows))
    benchmark.main(benchmark.BenchmarkArguments(data_dir=str(tmp_path), num_seeds=1, num_trusted_rows=12))
    assert "GSM8K over other tasks" in capsys.readouterr().out


def test_swapped_answers_are_wrong_and_the_others_are_kept():
    benchmark = _load("real_text")
    rows = Dataset.from_dict({"prompt": [f"q{n}" for n in range(10)], "completion": [f"a{n}" for n in range(10)]})
    swapped, corrupted = benchmark.swap_answers(rows, ratio=0.4, seed=0)
    assert corrupted.sum() == 4
    assert (np.array(swapped["completion"]) != np.array(rows["completion"])).tolist() == corrupted.tolist()
    assert sorted(swapped["completion"]) == sorted(rows["completion"])
    assert swapped["prompt"] == rows["prompt"]


def test_refinement_speed(capsys):
    benchmark = _load("refinement_speed")
    benchmark.main(
        benchmark.BenchmarkArguments(
            num_pairs=2, num_questions=33, max_new_tokens=4, refine_batch_size=16, hidden_size=32, use_cpu=True
        )
    )
    output = capsys.readouterr().out
    assert "33 questions, 4 tokens each, 2 pairs" in output
    assert "ratio" in output


def test_planted_faults_runs_every_method_once_and_prints_the_tables(tmp_path, capsys):
    benchmark = _load("planted_faults")
    args = benchmark.BenchmarkArguments(
        str(tmp_path), seeds=[3], num_train_epochs=1, num_train_rows=96, num_base_steps=4
    )
    benchmark.main(args)
    printed = capsys.readouterr().out
    for method in benchmark.METHODS:
        assert f"│ {method} " in printed
    files = sorted((tmp_path / "seed3").glob("*.json"))
    assert len(files) == len(benchmark.METHODS)
    result = json.loads((tmp_path / "seed3" / "1 epochs, BDS (all defaults).json").read_text())
    assert 0 <= result["auroc"] <= 1
    before = [file.stat().st_mtime_ns for file in files]
    benchmark.main(args)  # nothing is missing: nothing is trained
    assert [file.stat().st_mtime_ns for file in files] == before
    with pytest.raises(ValueError, match="Unknown methods"):
        benchmark.main(benchmark.BenchmarkArguments(methods=["magic"]))


@pytest.mark.parametrize(("values", "text"), [([0.5, 0.7], "0.600 (0.500 to 0.700)"), ([None, None], "-")])
def test_spread_over_seeds(values, text):
    assert _load("planted_faults")._spread(values) == text
