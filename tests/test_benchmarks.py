"""The benchmark scripts run and print their tables; here on a scale at which the numbers mean nothing."""

import dataclasses
import importlib
import importlib.util
import json
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
