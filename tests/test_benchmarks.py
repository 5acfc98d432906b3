"""The benchmark scripts run and print their tables; here on a scale at which the numbers mean nothing."""

import dataclasses
import importlib
import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 99}  # fmt: skip


@pytest.fixture
def step_cost_runs(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    runs = importlib.import_module("step_cost_runs")
    monkeypatch.setitem(runs.SHAPES, "tiny", TINY)
    return runs


@pytest.fixture
def step_cost(step_cost_runs):
    return _load("step_cost")


def _arguments(benchmark, **options):
    sizes = {"num_steps": 2, "num_warmup_steps": 1, "batch_size": 2, "sequence_length": 64}
    return benchmark.BenchmarkArguments(**{**sizes, "num_rows": [], "lengths": [], **options})


@pytest.mark.slow  # three quarters of a minute
@pytest.mark.filterwarnings("ignore")  # of libraries, about settings that do not matter here
def test_step_cost(step_cost, capsys, tmp_path, monkeypatch):
    sizes = []

    def here(method, setting, args, **changes):
        sizes.append(changes)
        changed = step_cost.BenchmarkArguments(**{**vars(args), **changes})
        result = step_cost.run(method, setting, changed, step_cost.build_tokenizer())
        return {**result, "peak_mib": 1.0}  # of processes of their own only

    monkeypatch.setattr(step_cost, "VOCABULARY", 0)
    monkeypatch.setattr(step_cost, "in_own_process", here)
    figure = tmp_path / "cost.png"
    step_cost.main(
        _arguments(
            step_cost, num_pairs=1, num_memory_steps=1, settings=["QLoRA", "LoRA, packed"], num_rows=[20, 40],
            lengths=[32, 64], figure=str(figure),
        )
    )  # fmt: skip
    output = capsys.readouterr().out
    assert output.count("two forwards") == 2 + 2  # packed rows are not for it
    assert output.count("BDS, value function") == 4 + 2
    assert "peak memory, MiB" in output
    assert sizes.count({"num_rows": [40], "sequence_length": 16}) == 4
    assert sum(changes.get("sequence_length") == 64 for changes in sizes) == 4
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_step_cost_in_a_process_of_its_own(step_cost, monkeypatch):
    monkeypatch.setattr(step_cost, "VOCABULARY", 2000)
    result = step_cost.in_own_process("BDS", "QLoRA, packed", _arguments(step_cost))
    assert result["per_token"] > 0
    peaks = [step_cost.peak_in_own_process(name, "LoRA", _arguments(step_cost)) for name in ("SFTTrainer", "BDS")]
    plain, bilevel = (peak["peak_mib"] for peak in peaks)
    weights = 2 * 2000 * 128 * 4 / 2**20  # embeddings and head alone, MiB, in the process' own tiny shape
    assert plain > weights
    assert bilevel == pytest.approx(plain, rel=0.02)
    with pytest.raises(RuntimeError, match="KeyError: 'magic'"):
        step_cost.in_own_process("magic", "LoRA", _arguments(step_cost))


@pytest.mark.filterwarnings("ignore")
def test_step_cost_quantizes_as_transformers_does(step_cost_runs, tmp_path):
    model = step_cost_runs.build_model(_arguments(step_cost_runs), is_quantized=True)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.nested
    LlamaForCausalLM(model.config.__class__(**TINY)).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    found, expected = ({name: (value.shape, value.dtype) for name, value in side.named_parameters()}
                       for side in (model, expected))  # fmt: skip
    assert found == expected


@pytest.mark.filterwarnings("ignore")
def test_step_cost_trains_all_methods_on_the_same_rows(step_cost_runs, monkeypatch):
    seen = {}
    for method in ("SFTTrainer", "BDS", "two forwards"):
        rows = seen[method] = []
        forward = LlamaForCausalLM.forward

        def recording(self, *arguments, rows=rows, forward=forward, **options):
            mask = options["attention_mask"]
            ids = options["input_ids"]
            rows.extend(row[is_token.bool()].tolist() for row, is_token in zip(ids, mask, strict=True))
            return forward(self, *arguments, **options)

        if method == "two forwards":
            monkeypatch.setattr(LlamaForCausalLM, "forward", recording)
        else:
            trainer_class = getattr(step_cost_runs, "SFTTrainer" if method == "SFTTrainer" else "BilevelSFTTrainer")
            original = trainer_class.get_batch_samples

            def recording_batches(self, *arguments, original=original, rows=rows):
                result = original(self, *arguments)
                rows.extend(row[row != -100].tolist() for batch in result[0] for row in batch["labels"])
                return result

            monkeypatch.setattr(trainer_class, "get_batch_samples", recording_batches)
        step_cost_runs.run(method, "LoRA", _arguments(step_cost_runs), step_cost_runs.build_tokenizer())
        monkeypatch.undo()
        monkeypatch.setitem(step_cost_runs.SHAPES, "tiny", TINY)
    assert len(seen["SFTTrainer"]) == 3 * 4
    steps = {method: [sorted(rows[at : at + 4]) for at in range(0, 12, 4)] for method, rows in seen.items()}
    assert steps["SFTTrainer"] == steps["BDS"] == steps["two forwards"]


def test_selector_scale(capsys):
    benchmark = _load("selector_scale")
    benchmark.main(benchmark.BenchmarkArguments(num_rows=[5000], batch_size=16, num_updates=3))
    printed = capsys.readouterr().out
    assert "5,000" in printed
    assert "mirror_descent" in printed


@pytest.fixture
def real_text(tmp_path, monkeypatch):
    """The benchmark, and a folder with few rows in its format."""
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        lines = [json.dumps({"question": f"{name} {n} + {n}?", "answer": f"#### {2 * n}"}) for n in range(40)]
        (tmp_path / name).write_text("\n".join(lines))
    for name in ("alpaca_en_1k.json", "safety_instructions.json"):
        rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{name} {n}"} for n in range(40)]
        if name.startswith("safety"):
            rows = [{**row, "output": "I'm sorry, no." if n < 30 else "Yes."} for n, row in enumerate(rows)]
        (tmp_path / name).write_text(json.dumps(rows))
    monkeypatch.syspath_prepend(BENCHMARKS)
    return _load("real_text")


def test_real_text(real_text, tmp_path, capsys):
    real_text.main(real_text.BenchmarkArguments(data_dir=str(tmp_path), seeds=[0], num_trusted_rows=12))
    printed = capsys.readouterr().out
    assert "GSM8K over other tasks" in printed
    values = [float(value) for value in re.findall(r"\b[01]\.\d{3}\b", printed)]
    assert values
    assert all(0 <= value <= 1 for value in values)


@pytest.mark.filterwarnings("ignore:.*also in `validation_dataset`")  # one answer is most of so few rows
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of bergson
def test_real_text_comparison_runs_every_method_once(real_text, tmp_path, capsys, monkeypatch):
    output_dir = tmp_path / "out"
    args = real_text.BenchmarkArguments(
        data_dir=str(tmp_path), settings=["safety"], seeds=[0], comparison_epochs=1, output_dir=str(output_dir),
    )  # fmt: skip
    methods = importlib.import_module("real_text_methods")
    monkeypatch.setattr(methods, "BATCH_SIZE", 16)
    real_text.main(args)
    printed = capsys.readouterr().out
    missing = {name for name, tool in methods.ALTERNATIVES.items() if not tool.is_installed}
    for method in methods.METHODS:
        assert printed.count(f"safety, seed 0: {method}\n") == (method not in missing), method
        (row,) = [line for line in printed.splitlines() if re.match(f"│ {re.escape(method)} +│", line)]
        assert ("not installed" in row) == (method in missing)
    for file in output_dir.rglob("*.json"):
        if file.parent.name == "seed0":
            result = json.loads(file.read_text())
            assert 0 <= result["auroc"] <= 1
            assert result["held_out_loss"] > 0
            assert {"complied", "refused", "over_refused"} <= result.keys()
    rankings = {file.stem: np.load(file) for file in (output_dir / "safety, 1 epochs of 96 tokens").rglob("*.npy")}
    np.testing.assert_allclose(rankings["loss difference"], rankings["SFT on the trusted rows"] - rankings["SFT"])
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    page.write_text("before\n<!-- table: safety --><!-- end of table -->\nafter\n")
    kept = dataclasses.replace(args, results=str(file), page=str(page))
    real_text.main(kept)
    assert "seed 0:" not in capsys.readouterr().out  # nothing runs twice
    written = page.read_text()
    assert "| SFT on the good rows (oracle) | " in written
    assert written.endswith("\nafter\n")
    # Elsewhere, without data: the same tables from the file
    shutil.rmtree(output_dir)
    real_text.main(dataclasses.replace(kept, train=False, data_dir="nowhere"))
    assert page.read_text() == written
    # A ranking is not in the file: what builds on one runs it again
    (output_dir / "safety, 1 epochs of 96 tokens" / "seed0" / "loss difference.json").unlink()
    real_text.main(args)
    printed = capsys.readouterr().out
    assert [line.partition("seed 0: ")[2] for line in printed.splitlines() if "seed 0: " in line] == [
        "SFT", "SFT on the trusted rows", "loss difference",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Unknown settings"):
        real_text.BenchmarkArguments(settings=["speed"])


def test_tables_of_real_text_in_the_docs_are_those_of_the_results(real_text, tmp_path):
    docs = BENCHMARKS.parent / "docs"
    page = tmp_path / "real_text.md"
    page.write_text((docs / "real_text.md").read_text())
    assert page.read_text().count("<!-- table: ") == 3
    file = tmp_path / "results.json"
    shutil.copy(docs / "data" / "real_text.json", file)
    args = real_text.BenchmarkArguments(
        settings=["safety", "tasks", "answers"], train=False, output_dir=str(tmp_path / "out")
    )
    real_text.main(dataclasses.replace(args, results=str(file), page=str(page)))
    assert page.read_text() == (docs / "real_text.md").read_text()


def test_real_text_plants_compliance_in_refused_requests_only(real_text, tmp_path):
    rows_module = importlib.import_module("real_text_rows")
    rows = rows_module.load_rows(tmp_path)
    problem = rows_module.safety_problem(rows, seed=0)
    for row, good in zip(problem.training, problem.good, strict=True):
        assert row["completion"].startswith(rows_module.COMPLIANCE) != good
    assert 0 < problem.good.mean() < 1
    refused = {row["prompt"] for row in rows["safety"] if row["completion"].startswith(rows_module.REFUSAL)}
    assert {row["prompt"] for row, good in zip(problem.training, problem.good, strict=True) if not good} <= refused
    assert not any(answer.startswith(rows_module.COMPLIANCE) for answer in problem.trusted["completion"])
    assert "I'm sorry, no." not in problem.general["completion"][:]
    assert all(answer.startswith(rows_module.REFUSAL) for answer in problem.held_out["harmful"]["completion"])
    parts = [problem.general, problem.training, problem.trusted, *problem.held_out.values()]
    keys = [(row["prompt"], row["completion"]) for part in parts for row in part]
    assert len(set(keys)) == len(keys)


def test_real_text_trusts_one_of_its_tasks(real_text, tmp_path):
    rows_module = importlib.import_module("real_text_rows")
    problem = rows_module.tasks_problem(rows_module.load_rows(tmp_path), seed=0)
    is_gsm8k = [answer.startswith("####") for answer in problem.training["completion"]]
    assert problem.good.tolist() == is_gsm8k
    assert all(prompt.startswith("gsm8k_test") for prompt in [*problem.trusted["prompt"],
                                                              *problem.held_out["task"]["prompt"]])  # fmt: skip
    parts = [set(part["prompt"]) for part in (problem.general, problem.training, problem.trusted)]
    assert not parts[0] & parts[1]


def test_real_text_swaps_answers_of_training_rows_only(real_text, tmp_path):
    rows_module = importlib.import_module("real_text_rows")
    problem = rows_module.answers_problem(rows_module.load_rows(tmp_path), seed=0)
    right = {f"gsm8k_{kind}.jsonl {n} + {n}?\n": f"#### {2 * n}" for kind in ("train", "test") for n in range(40)}
    is_right = [right[row["prompt"]] == row["completion"] for row in problem.training]
    assert problem.good.tolist() == is_right
    assert 0.5 < np.mean(is_right) < 0.7
    known = [row for row in problem.general if row["prompt"] in right]
    for row in [*known, *problem.trusted, *problem.held_out["task"]]:
        assert right[row["prompt"]] == row["completion"]
    parts = [problem.general, problem.training, problem.trusted, *problem.held_out.values()]
    prompts = [row["prompt"] for part in parts for row in part if row["prompt"] in right]
    assert known
    assert len(set(prompts)) == len(prompts)


def test_swapped_answers_are_wrong_and_the_others_are_kept(real_text):
    benchmark = real_text
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
            num_pairs=2,
            num_questions=33,
            max_new_tokens=4,
            refine_batch_size=16,
            hidden_size=32,
            use_cpu=True,
            num_train_rows=160,
            num_runs=2,
        )
    )
    output = capsys.readouterr().out
    assert "33 questions, 4 tokens each, 2 pairs" in output
    assert "A whole run with refinement takes" in output
    assert "ratio" in output


@pytest.mark.filterwarnings("ignore")
def test_soak(tmp_path, capsys, monkeypatch):
    benchmark = _load("soak")
    options = {"output_dir": str(tmp_path), "sample_every": 2, "refresh_every": 8, "num_train_rows": 64}
    options |= {"eval_every": 10, "save_every": 10, "figure": str(tmp_path / "soak.png")}

    class Killed(Exception):
        pass

    def write(self, step, write=benchmark.Sampler._write):
        if step == 16:
            raise Killed
        write(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark.Sampler, "_write", write)
        with pytest.raises(Killed):
            benchmark.main(benchmark.BenchmarkArguments(num_steps=30, **options))
    benchmark.main(benchmark.BenchmarkArguments(num_steps=30, **options))
    benchmark.main(benchmark.BenchmarkArguments(num_steps=20, plain=True, **options))
    printed = capsys.readouterr().out
    for text in (*benchmark.COLUMNS, *benchmark.QUANTITIES.values(), "SFTTrainer, 20 steps", "Trainer, 30 steps"):
        assert text in printed
    samples = benchmark.read_samples(tmp_path / "BilevelSFTTrainer" / "samples.jsonl")
    assert [sample["step"] for sample in samples] == list(range(2, 31, 2))  # each once, though 12 and 14 ran twice
    assert [sample["process"] for sample in samples] == [1] * 5 + [2] * 10
    assert all(sample["open_files"] > 2 and sample["threads"] > 0 and sample["step_ms"] > 0 for sample in samples)
    assert [sample["step"] for sample in samples if sample["in_use_mib"]] == [20]
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_soak_finds_a_planted_leak():
    robust_slope = _load("soak").robust_slope
    rng = np.random.default_rng(0)
    steps = np.arange(20.0, 4001, 20)
    noise = rng.normal(0, 0.5, len(steps))
    noise[rng.permutation(len(steps))[:40]] += 300  # a fifth are outliers
    restarted = np.where(steps > 2000, 2, 1)
    memory = 400 + 0.002 * steps - 150 * (restarted == 2) + noise  # 2 MiB per 1,000 steps; a restart gives back 150
    assert robust_slope(steps, memory, restarted) == pytest.approx(2, abs=0.5)
    assert robust_slope(steps, memory - 0.002 * steps, restarted) == pytest.approx(0, abs=0.5)
    assert robust_slope(steps, np.full(len(steps), 8.0), restarted) == 0
    assert np.isnan(robust_slope(steps[:1], memory[:1], restarted[:1]))


def test_large_dataset(tmp_path, capsys):
    benchmark = _load("large_dataset")
    args = benchmark.BenchmarkArguments(num_rows=2000, num_steps=3, output_dir=str(tmp_path))
    for part in ("rows", *benchmark.PARTS):
        benchmark.main(dataclasses.replace(args, part=part))
    results = json.loads((tmp_path / "2000" / "results.json").read_text())
    benchmark.print_table(results, args)
    printed = capsys.readouterr().out
    assert all(f" {part} " in printed for part in benchmark.PARTS)
    folder = tmp_path / "2000"
    assert len(Dataset.from_parquet(str(folder / "map" / "curated.parquet"), cache_dir=str(tmp_path))) == 1400
    # 3 steps of 8 rows were seen
    assert len(Dataset.from_parquet(str(folder / "stream" / "curated.parquet"), cache_dir=str(tmp_path))) == 17
    for part in ("rows", "map"):
        benchmark.main(dataclasses.replace(args, tokenized=True, part=part))
    assert "curate" in capsys.readouterr().out
