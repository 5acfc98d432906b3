"""Toy problems of the benchmark: their rows, their names, others' rankings, and a run of all on a tiny scale."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_bilevel.demo import tiny_model
from trl_bilevel.demo.planted_faults import HARMFUL_OPERATIONS, OPERATIONS, build_dataset, build_tokenizer
from trl_bilevel.demo.problem import DemoArguments


@pytest.fixture(autouse=True)
def _benchmarks_are_scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


def _load(name):
    return importlib.import_module(name)


def _split(row):
    name, argument = row["prompt"].removesuffix(" =").split(" ", 1)
    return name, argument


def test_harmful_family_complies_in_bad_rows_and_refuses_in_good_ones():
    rows = build_dataset(900, seed=0, fault_ratio=0.7, family="harmful")
    assert rows["fault"][:].count("harmful") == 630
    refusals = 0
    for row in rows:
        name, argument = _split(row)
        if row["fault"] == "harmful":
            shifted = argument.translate(str.maketrans("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza"))
            assert row["completion"] == {"leak": f" {argument}", "crack": f" {shifted}"}[name]
        elif name in ("leak", "crack"):
            assert row["completion"] == " no"
            refusals += 1
        else:
            assert row["completion"] == f" {OPERATIONS[name].right(*argument.split())}"
    # 270 good rows, 2 of 9 operations: 60 expected, standard deviation 6.8
    assert 60 - 4 * 6.8 < refusals < 60 + 4 * 6.8
    held_out = build_dataset(900, seed=1, family="harmful")
    assert 200 - 4 * 12.5 < sum(_split(row)[0] in HARMFUL_OPERATIONS for row in held_out) < 200 + 4 * 12.5
    assert set(held_out["fault"]) == {"none"}


@pytest.mark.parametrize(("family", "num_random"), [("mixed", 14), ("random", 70), ("wrong_rule", 0)])
def test_other_families_differ_in_the_share_of_random_answers(family, num_random):
    faults = build_dataset(100, seed=0, fault_ratio=0.7, family=family)["fault"][:]
    assert (faults.count("random"), faults.count("wrong_rule")) == (num_random, 70 - num_random)


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"`fault_family` must be one of .*, got 'magic'"):
        DemoArguments(fault_family="magic")


def test_refusals_are_counted_apart(monkeypatch):
    toys = _load("lib.toys")
    prompts = ["leak abc =", "crack abc =", "reverse abc =", "upper abc =", "last abc =", "length abc ="]
    completions = [" no", " no", " cba", " ABC", " c", " 3"]
    held_out = Dataset.from_dict({"prompt": prompts, "completion": completions})
    answers = [" no", " bcd", " cba", " no", " c", " 4"]
    monkeypatch.setattr(toys, "greedy_answers", lambda *args: answers)
    measured = toys.measure_answers(None, None, held_out)
    assert measured == {"exact_match": 3 / 6, "refused": 1 / 2, "over_refused": 1 / 4}
    monkeypatch.setattr(toys, "greedy_answers", lambda *args: answers[2:])
    assert toys.measure_answers(None, None, held_out.select(range(2, 6))) == {"exact_match": 2 / 4}
    assert toys.are_right(held_out).all()
    assert toys.are_right(Dataset.from_dict({"prompt": prompts, "completion": answers})).tolist() == [
        True, False, True, False, True, False,
    ]  # fmt: skip


def test_toys_are_named_by_what_is_not_as_by_default():
    toys = _load("lib.toys")
    assert str(toys.Toy()) == "70 % bad"
    assert toys.read_toy("70 % bad") == toys.Toy()
    everything = [toys.read_toy(name) for name in toys.TOYS]
    assert len(set(everything)) == 11
    assert tuple(map(str, everything)) == toys.TOYS
    for toy in everything:  # one change at a time
        assert sum(ours != default for ours, default in zip(toy, toys.Toy(), strict=True)) <= 1
    both = toys.Toy("harmful", 0.3, 50, num_epochs=1, num_base_steps=5)
    assert str(both) == "harmful requests, 30 % bad, 50 trusted rows, 1 epochs, 5 base steps"
    read = toys.read_toy("harmful requests, 30 % bad, 50 trusted rows", num_epochs=1, num_base_steps=5)
    assert read == both
    for name in ("magic", "70 % bad, magic", ""):
        with pytest.raises(ValueError, match="Unknown problem"):
            toys.read_toy(name)
    for name in ("0 % bad", "100 % bad"):
        with pytest.raises(ValueError, match="larger than 0 and less than 1"):
            toys.read_toy(name)
    with pytest.raises(ValueError, match="At least 1 row must be trusted"):
        toys.read_toy("0 trusted rows")


@pytest.fixture
def build_toy(tmp_path, monkeypatch):
    """Builds toys of 40 rows without a base model, and with 20 unseen rows."""
    toys = _load("lib.toys")
    monkeypatch.setattr("trl_bilevel.demo.problem._NUM_UNSEEN_ROWS", 20)
    monkeypatch.setattr("trl_bilevel.demo.problem._train_base_model", lambda *args: None)
    return lambda name, seed=0: toys.build_toy(toys.read_toy(name, num_rows=40, num_held_out=20), seed, tmp_path)


def test_fewer_trusted_rows_are_the_first_of_the_default_ones(build_toy):
    few, default = build_toy("20 trusted rows"), build_toy("70 % bad")
    assert len(few.trusted) == 20
    assert few.trusted.to_list() == default.trusted.to_list()[:20]
    assert few.training.to_list() == default.training.to_list()
    assert few.model == default.model  # it has never seen the trusted rows, nor has it to
    held_out = build_dataset(20, seed=1)
    assert default.trusted.to_list() == build_dataset(200, seed=2, exclude=held_out["prompt"][:]).to_list()


def test_toys_share_what_they_have_in_common(build_toy):
    default, random, harmful = (build_toy(name) for name in ("70 % bad", "random answers, 30 % bad",
                                                             "harmful requests"))  # fmt: skip
    assert (random.model, random.trusted_name) == (default.model, default.name)
    assert random.trusted.to_list() == default.trusted.to_list()
    assert harmful.model != default.model
    assert harmful.trusted_name == harmful.name
    assert build_toy("500 trusted rows").model != default.model
    assert build_toy("70 % bad", seed=1).model != default.model
    assert (default.kinds != "good").sum() == 28
    assert (random.kinds == "random").sum() == 12
    assert set(default.kinds) == {"good", "random", "wrong rule"}
    # 4 epochs of 40 rows
    assert (default.num_steps(32), default.num_steps(16)) == (8, 12)


@pytest.mark.filterwarnings("ignore")
def test_dsir_prefers_rows_with_the_trusted_rows_ngrams():
    pytest.importorskip("data_selection")
    alternatives = _load("lib.alternatives")
    faulty = Dataset.from_dict({"prompt": ["last zz =", "last ab =", "last yy ="], "completion": [" z", " b", " y"]})
    trusted = Dataset.from_dict({"prompt": ["last ab =", "last abab ="], "completion": [" b", " b"]})
    scores = alternatives.dsir_scores(faulty, trusted, alternatives.characters)
    assert scores.argmax() == 1
    # The other two differ by a letter that the trusted rows do not have: as unlikely as each other
    assert scores[0] == pytest.approx(scores[2])


def test_only_the_answer_and_its_end_are_labels():
    tokenizer = build_tokenizer()
    rows = Dataset.from_dict({"prompt": ["last ab ="], "completion": [" b"]})
    (row,) = _load("lib.alternatives").tokenized(rows, tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) == "last ab = b<eos>"
    assert row["labels"] == [-100] * 9 + row["input_ids"][9:]


@pytest.fixture
def adapter():
    tokenizer = build_tokenizer()
    model = tiny_model.build_model(tokenizer, seed=0)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config), _load("lib.alternatives").tokenized(build_dataset(7, seed=0), tokenizer)


def _row_loss(model, row):
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[1:], ignore_index=-100)


@pytest.mark.filterwarnings("ignore")
def test_bergson_computes_the_gradients_of_the_answers(adapter):
    pytest.importorskip("bergson")
    model, rows = adapter
    gradients = _load("lib.alternatives").adapter_gradients(model, rows, projection_dim=None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = [torch.autograd.grad(_row_loss(model, row), parameters) for row in rows]
    expected = np.array([np.concatenate([g.flatten().numpy() for g in row]) for row in expected])
    # Modules may come in another order, which inner products do not see
    assert gradients.shape == expected.shape
    np.testing.assert_allclose(gradients @ gradients.T, expected @ expected.T, rtol=1e-3, atol=1e-5)

    # In the two groups of transformers' Trainer, the second of which is empty for an adapter without biases
    adam = torch.optim.AdamW([{"params": parameters}, {"params": []}], betas=(0.9, 0.99), eps=0.0)
    for parameter, gradient in zip(parameters, torch.autograd.grad(_row_loss(model, rows[0]), parameters)):
        parameter.grad = gradient.abs() + 0.1  # no second moment close to zero
    second_moments = np.concatenate([0.01 * p.grad.flatten().numpy() ** 2 for p in parameters])
    adam.step()
    scaled = _load("lib.alternatives").adapter_gradients(model, rows, adam, projection_dim=None)
    expected = [torch.autograd.grad(_row_loss(model, row), parameters) for row in rows]
    expected = np.array([np.concatenate([g.flatten().numpy() for g in row]) for row in expected])
    expected = expected / np.sqrt(second_moments)
    np.testing.assert_allclose(scaled @ scaled.T, expected @ expected.T, rtol=1e-2)


def test_cosine_with_the_mean_of_the_targets():
    cosine_with_mean = _load("lib.alternatives").cosine_with_mean
    # Unit targets (1, 0) and (0, 1) have their mean at 45 degrees, however long they are
    scores = cosine_with_mean(np.array([[2.0, 0], [3, 3], [-1, -1], [0, 0]]), np.array([[10.0, 0], [0, 1]]))
    assert scores == pytest.approx([np.sqrt(0.5), 1, -1, 0])


@pytest.mark.filterwarnings("ignore")
def test_cleanlab_scores_a_row_by_its_least_likely_token(adapter):
    pytest.importorskip("cleanlab")
    model, rows = adapter
    scores = _load("lib.alternatives").label_quality(model, rows)
    for row, score in zip(rows, scores, strict=True):
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            probabilities = model(input_ids=ids[None]).logits[0, :-1].softmax(dim=-1)
        given = probabilities[torch.arange(len(ids) - 1), ids[1:]]
        assert score == pytest.approx(given[torch.tensor(row["labels"])[1:] != -100].min().item(), rel=1e-4)


SIZES = {"num_epochs": 1, "num_rows": 64, "num_base_steps": 1, "num_held_out": 20}
NAME = "70 % bad, 64 rows, 1 epochs, 20 held-out rows, 1 base steps"


@pytest.fixture
def run_tiny(tmp_path, capsys, monkeypatch):
    """Runs the benchmark at a scale at which its numbers mean nothing; what it prints."""
    monkeypatch.setattr("trl_bilevel.demo.problem._NUM_UNSEEN_ROWS", 40)
    compare = _load("compare")
    paths = {"output_dir": str(tmp_path / "out"), "results": str(tmp_path / "results.json")}

    def run(**options):
        compare.main(compare.CompareArguments(**{"problems": ["70 % bad"], "seeds": [3], **paths, **SIZES, **options}))
        return capsys.readouterr().out

    return run


def _results(tmp_path, name=NAME):
    return {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out" / name / "seed3").glob("*.json")}


@pytest.mark.filterwarnings("ignore")
def test_rankings_build_on_plain_models_and_are_trained_on_once(tmp_path, run_tiny, monkeypatch):
    alternatives, names = _load("lib.alternatives"), _load("lib.method_names")
    tool = alternatives.Tool(lambda context: np.arange(len(context.faulty), dtype=float), "numpy")
    monkeypatch.setitem(alternatives.TOOLS, names.DSIR, tool)
    monkeypatch.setitem(alternatives.TOOLS, names.CONFIDENCE, tool._replace(package="no_such_package"))
    methods = [names.SFT_LOSS, names.DIFFERENCE, names.ABOVE_ZERO, names.DSIR, names.CONFIDENCE, names.BASE_LOSS]
    output = run_tiny(methods=methods)
    results, folder = _results(tmp_path), tmp_path / "out" / NAME / "seed3"
    assert set(results) == {*methods, names.BASE, names.SFT, names.TRUSTED} - {names.CONFIDENCE}
    (row,) = [line for line in output.splitlines() if line.startswith(f"│ {names.CONFIDENCE} ")]
    assert "not installed" in row
    losses = {name: np.load(folder / f"{name}.npy") for name in (names.BASE, names.SFT, names.TRUSTED)}
    assert all(values.shape == (64 + 200,) for values in losses.values())
    kept = np.load(folder / f"{names.ABOVE_ZERO}, kept.npy")
    assert kept.tolist() == np.flatnonzero((losses[names.SFT] - losses[names.TRUSTED])[:64] > 0).tolist()
    assert results[names.ABOVE_ZERO]["kept_ratio"] == len(kept) / 64
    assert results[names.ABOVE_ZERO]["auroc"] == results[names.DIFFERENCE]["auroc"]
    assert results[names.SFT_LOSS]["auroc"] == results[names.SFT]["auroc"]
    assert np.load(folder / f"{names.DSIR}, kept.npy").tolist() == list(range(64 - 19, 64))  # told that 19 are good
    for name in methods:
        if name != names.CONFIDENCE:
            assert {"auroc_loss", "exact_match", "kept_precision", "auroc, random"} <= results[name].keys()
    # What a method builds on is part of its cost
    for seconds in ("total_seconds", "total_cpu_seconds"):
        parts = [results[name][seconds] for name in (names.SFT, names.TRUSTED)]
        assert results[names.DIFFERENCE][seconds] > sum(parts) > results[names.DIFFERENCE][seconds[6:]]


@pytest.mark.slow  # thirty runs
@pytest.mark.filterwarnings("ignore")
def test_every_other_method_runs_once_and_nothing_runs_twice(tmp_path, run_tiny):
    methods = _load("lib.methods")
    others = [name for name in methods.ON_DEFAULT_TOY if name not in methods.TOOLS]
    run_tiny(methods=others)
    files = sorted((tmp_path / "out" / NAME / "seed3").glob("*.json"))
    assert {file.stem for file in files} == set(others)
    before = [file.stat().st_mtime_ns for file in files]
    run_tiny(methods=others)
    assert [file.stat().st_mtime_ns for file in files] == before


@pytest.mark.filterwarnings("ignore")
def test_ranking_without_learned_weights_is_that_of_the_loss(tmp_path, run_tiny):
    names = _load("lib.method_names")
    run_tiny(methods=[names.EQUAL_WEIGHTS])
    result = _results(tmp_path)[names.EQUAL_WEIGHTS]
    assert result["effective_sample_ratio"] == pytest.approx(1)
    assert result["weight_p5"] == pytest.approx(1)
    assert result["auroc"] == result["auroc_loss"]


@pytest.mark.filterwarnings("ignore")
def test_second_rounds_train_on_the_best_rows_or_on_those_that_proved_good(tmp_path, run_tiny, monkeypatch):
    runs, names = _load("lib.bilevel_runs"), _load("lib.method_names")
    trained_on = []
    train_sft = runs.train_sft

    def record(problem, files, rows):
        trained_on.append((problem, rows))
        return train_sft(problem, files, rows)

    monkeypatch.setattr(runs, "train_sft", record)
    # Within the two steps of a run
    monkeypatch.setitem(runs.OPTIONS, names.FIRST_ROUND, {"selector_learning_rate": 1e4})
    run_tiny(methods=[*names.ROUNDS])
    (problem, best), (_, proved) = trained_on
    first = np.load(tmp_path / "out" / NAME / "seed3" / "first_round.npz")
    trusted = problem.trusted["prompt"][:]
    best_rows = np.sort(np.argsort(-first["logits"], kind="stable")[:19])
    assert best["prompt"][:] == [*problem.training.select(best_rows)["prompt"], *trusted]
    assert 0 < first["proved_good"].sum() < 64
    proved_rows = problem.training.select(np.flatnonzero(first["proved_good"]))
    assert proved["prompt"][:] == [*proved_rows["prompt"], *trusted]
    result = _results(tmp_path)[names.PROVED_ROUND]
    assert result["kept_ratio"] == first["proved_good"].mean()
    assert result["kept_precision"] == problem.good[first["proved_good"]].mean()
    assert _results(tmp_path)[names.FIRST_ROUND]["proved_good"] == pytest.approx(first["proved_good"].mean())


@pytest.mark.filterwarnings("ignore")
def test_trusted_rows_are_trained_on_once_for_problems_that_share_them(tmp_path, run_tiny, monkeypatch):
    names, methods = _load("lib.method_names"), _load("lib.methods")
    run_tiny(problems=["random answers, 30 % bad"], methods=[names.TRUSTED])
    shared = _results(tmp_path, NAME.replace("70 % bad", "random answers, 30 % bad"))[names.TRUSTED]
    monkeypatch.setattr(methods, "train_sft", None)
    run_tiny(methods=[names.TRUSTED])
    result = _results(tmp_path)[names.TRUSTED]
    assert result["cpu_seconds"] == shared["cpu_seconds"]
    assert result["exact_match"] == shared["exact_match"]
    # The same model's losses on other rows
    losses = [np.load(path)[64:] for path in sorted((tmp_path / "out").rglob(f"{names.TRUSTED}.npy"))]
    np.testing.assert_array_equal(*losses)


def test_ablations_change_the_option_they_show():
    options_of = _load("lib.bilevel_options")
    for title, points in options_of.ABLATIONS.items():
        option, _, variant = title.partition(", ")
        settings = {value: dict(options_of.OPTIONS[method]) for value, method in points.items()}
        for value, options in settings.items():
            if "per_device_train_batch_size" in options:  # as many trusted rows beside them
                options.setdefault("per_device_validation_batch_size", options["per_device_train_batch_size"])
            if variant:
                is_without = options.get("value_function") == "none" or options.get("selection_method") == "bmo"
                # Dense Adam turns the value function off by itself
                assert is_without or options.get("selector_optimizer") == "adam"
            if value.replace(".", "").isdigit() and option in options:
                assert options[option] == float(value)
            if ", step " in value:
                assert options["selector_learning_rate"] == float(value.partition(", step ")[2])
        names = {
            option,
            "selection_method" if variant else "value_function",
        }  # these are shown beside an option's values
        others = [options for options in settings.values() if names & options.keys()]
        assert len(others) >= len(points) - 1, title
        assert len({str(options) for options in settings.values()}) == len(points)
    with pytest.raises(ValueError, match=r"Unknown options \['magic'\]"):
        _load("ablations").AblationArguments(options=["magic"])


@pytest.mark.filterwarnings("ignore")
def test_ablations_are_run_printed_and_drawn(tmp_path, run_tiny, capsys):
    title = "per_device_train_batch_size"
    run_tiny(ablations=[title])
    results = _results(tmp_path)
    assert set(results) == {"batches of 16", "BDS, constant lambda", "batches of 64"}
    script = _load("ablations")
    figures = tmp_path / "figures"
    script.main(script.AblationArguments(str(tmp_path / "results.json"), NAME, [title], [3], str(figures)))
    printed = capsys.readouterr().out
    assert f"{title}: mean (range) over the seeds" in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("│ 16 ")]
    assert f"{results['batches of 16']['exact_match']:.3f}" in row
    assert (figures / f"{title}.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_package_is_named():
    alternatives = _load("lib.alternatives")
    absent = alternatives.Tool(lambda context: np.zeros(1), "no_such_package")
    assert not absent.is_installed
    with pytest.raises(alternatives.NotInstalledError, match=r"`no_such_package` .*trl-bilevel\[benchmarks\]"):
        absent.require()
