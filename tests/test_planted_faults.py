"""The planted-fault benchmark: its families, its settings, others' rankings, and a run of all on a tiny scale."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_bilevel import DataSelector
from trl_bilevel.demo import tiny_model
from trl_bilevel.demo.planted_faults import HARMFUL_OPERATIONS, OPERATIONS, build_dataset, build_tokenizer
from trl_bilevel.demo.problem import DemoArguments, Problem


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
    methods = _load("fault_methods")
    prompts = ["leak abc =", "crack abc =", "reverse abc =", "upper abc =", "last abc =", "length abc ="]
    completions = [" no", " no", " cba", " ABC", " c", " 3"]
    problem = Problem("", None, None, None, Dataset.from_dict({"prompt": prompts, "completion": completions}), None)
    answers = [" no", " bcd", " cba", " no", " c", " 4"]
    monkeypatch.setattr(methods, "greedy_answers", lambda *args: answers)
    assert methods.measure_held_out(None, problem) == {"exact_match": 3 / 6, "refused": 1 / 2, "over_refused": 1 / 4}
    ordinary = problem._replace(held_out=problem.held_out.select(range(2, 6)))
    monkeypatch.setattr(methods, "greedy_answers", lambda *args: answers[2:])
    assert methods.measure_held_out(None, ordinary) == {"exact_match": 2 / 4}


def test_results_of_the_default_setting_keep_their_names(tmp_path):
    settings = _load("fault_settings")
    default = settings.SeedFiles(tmp_path, 4, settings.Setting())
    assert default.result("BMO") == tmp_path / "4 epochs, BMO.json"
    assert default.base_model == tmp_path / "base_model"
    assert default.first_round == tmp_path / "first_round"
    other = settings.SeedFiles(tmp_path, 4, settings.Setting("harmful", 0.3, 50))
    assert other.result("BMO").name == "4 epochs, BMO [harmful, 0.3 faulty, 50 trusted].json"
    assert other.base_model.name == "base_model [harmful]"
    # The default base model has never seen the held-out rows and the trusted ones, nor has it to
    few = settings.SeedFiles(tmp_path, 4, settings.Setting("random", 0.3, 50))
    assert few.base_model == default.base_model
    assert settings.SeedFiles(tmp_path, 4, settings.Setting("random", 0.3, 500)).base_model != default.base_model


def test_sweep_changes_one_axis_at_a_time():
    settings = _load("fault_settings")
    assert settings.sweep(["mixed"], [0.3, 0.7], [50, 200]) == [
        ("mixed", 0.3, 200), ("mixed", 0.7, 200), ("mixed", 0.7, 50),
    ]  # fmt: skip
    benchmark = _load("planted_faults")
    assert benchmark.BenchmarkArguments().settings == [("mixed", 0.7, 200)]
    everything = benchmark.BenchmarkArguments(all=True)
    assert len(set(everything.settings)) == 11
    for setting in everything.settings:  # one change at a time
        assert sum(ours != default for ours, default in zip(setting, settings.Setting(), strict=True)) <= 1
    assert everything.methods_of(settings.Setting()) == list(benchmark.METHODS)
    with pytest.raises(ValueError, match="Unknown families"):
        settings.sweep(["magic"], [0.5], [])
    with pytest.raises(ValueError, match="`fault_ratios` must be larger than 0 and less than 1"):
        settings.sweep(["mixed"], [1.0], [])
    with pytest.raises(ValueError, match="`validation_sizes` must be at least 1"):
        settings.sweep(["mixed"], [], [0])
    with pytest.raises(ValueError, match="Unknown methods"):
        benchmark.BenchmarkArguments(methods=["magic"])


def test_fewer_trusted_rows_are_the_first_of_the_default_ones(tmp_path):
    settings = _load("fault_settings")
    args = DemoArguments(num_train_rows=40, num_held_out_rows=20)
    (tmp_path / "base_model").mkdir()
    (tmp_path / "base_model" / "config.json").touch()  # as if it had been trained
    problems = {
        size: settings.build_setting(args, settings.SeedFiles(tmp_path, 1, settings.Setting(validation_size=size)))
        for size in (20, 200)
    }
    assert problems[20].trusted.to_list() == problems[200].trusted.to_list()[:20]
    assert problems[20].faulty.to_list() == problems[200].faulty.to_list()
    # As before there were settings
    held_out = build_dataset(20, seed=1)
    assert problems[200].trusted.to_list() == build_dataset(200, seed=2, exclude=held_out["prompt"][:]).to_list()


@pytest.mark.filterwarnings("ignore")
def test_dsir_prefers_rows_with_the_trusted_rows_ngrams():
    pytest.importorskip("data_selection")
    alternatives = _load("alternatives")
    faulty = Dataset.from_dict({"prompt": ["last zz =", "last ab =", "last yy ="], "completion": [" z", " b", " y"]})
    trusted = Dataset.from_dict({"prompt": ["last ab =", "last abab ="], "completion": [" b", " b"]})
    scores = alternatives.dsir_scores(faulty, trusted, alternatives.characters)
    assert scores.argmax() == 1
    # The other two differ by a letter that the trusted rows do not have: as unlikely as each other
    assert scores[0] == pytest.approx(scores[2])


def test_only_the_answer_and_its_end_are_labels():
    tokenizer = build_tokenizer()
    rows = Dataset.from_dict({"prompt": ["last ab ="], "completion": [" b"]})
    (row,) = _load("alternatives").tokenized(rows, tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) == "last ab = b<eos>"
    assert row["labels"] == [-100] * 9 + row["input_ids"][9:]


@pytest.fixture
def adapter():
    tokenizer = build_tokenizer()
    model = tiny_model.build_model(tokenizer, seed=0)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config), _load("alternatives").tokenized(build_dataset(7, seed=0), tokenizer)


def _row_loss(model, row):
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[1:], ignore_index=-100)


@pytest.mark.filterwarnings("ignore")
def test_bergson_computes_the_gradients_of_the_answers(adapter):
    pytest.importorskip("bergson")
    model, rows = adapter
    gradients = _load("alternatives").adapter_gradients(model, rows, projection_dim=None)
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
    scaled = _load("alternatives").adapter_gradients(model, rows, adam, projection_dim=None)
    expected = [torch.autograd.grad(_row_loss(model, row), parameters) for row in rows]
    expected = np.array([np.concatenate([g.flatten().numpy() for g in row]) for row in expected])
    expected = expected / np.sqrt(second_moments)
    np.testing.assert_allclose(scaled @ scaled.T, expected @ expected.T, rtol=1e-2)


def test_cosine_with_the_mean_of_the_targets():
    cosine_with_mean = _load("alternatives").cosine_with_mean
    # Unit targets (1, 0) and (0, 1) have their mean at 45 degrees, however long they are
    scores = cosine_with_mean(np.array([[2.0, 0], [3, 3], [-1, -1], [0, 0]]), np.array([[10.0, 0], [0, 1]]))
    assert scores == pytest.approx([np.sqrt(0.5), 1, -1, 0])


@pytest.mark.filterwarnings("ignore")
def test_cleanlab_scores_a_row_by_its_least_likely_token(adapter):
    pytest.importorskip("cleanlab")
    model, rows = adapter
    scores = _load("alternatives").label_quality(model, rows)
    for row, score in zip(rows, scores, strict=True):
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            probabilities = model(input_ids=ids[None]).logits[0, :-1].softmax(dim=-1)
        given = probabilities[torch.arange(len(ids) - 1), ids[1:]]
        assert score == pytest.approx(given[torch.tensor(row["labels"])[1:] != -100].min().item(), rel=1e-4)


SIZES = {"num_train_epochs": 1, "num_train_rows": 64, "num_base_steps": 1, "num_held_out_rows": 20}


@pytest.fixture
def run_tiny(tmp_path, capsys, monkeypatch):
    """Runs the benchmark at a scale at which its numbers mean nothing; what it prints."""
    monkeypatch.setattr("trl_bilevel.demo.problem._NUM_UNSEEN_ROWS", 40)
    benchmark = _load("planted_faults")

    def run(**options):
        benchmark.main(benchmark.BenchmarkArguments(str(tmp_path), seeds=[3], **SIZES, **options))
        return capsys.readouterr().out

    return run


def _results(folder):
    return {file.stem.removeprefix("1 epochs, "): json.loads(file.read_text()) for file in folder.glob("*.json")}


def _check_tables(output, methods, missing=()):
    for method in methods:
        rows = [line for line in output.splitlines() if line.startswith(f"│ {method} ")]
        assert rows, method
        assert any("not installed" in row for row in rows) == (method in missing)


@pytest.mark.filterwarnings("ignore")
def test_every_alternative_runs_once_and_the_tables_show_it(tmp_path, run_tiny):
    alternatives = _load("alternatives").ALTERNATIVES
    methods = ["SFT", "SFT on the trusted rows", "SFT on the good rows (oracle)", *alternatives]
    missing = {name for name, tool in alternatives.items() if not tool.is_installed}
    _check_tables(run_tiny(methods=methods), methods, missing)
    results = _results(tmp_path / "seed3")
    assert set(results) == {*methods} - missing
    for method, result in results.items():
        assert {"seconds", "cpu_seconds", "auroc", "kept_good", "exact_match"} <= set(result), method
        assert ("kept_questions" in result) == ("final_auroc_loss" in result) == (method in alternatives)
    # The losses' rankings say what SFT's and the trusted rows' say, and the difference what both say
    assert results["loss of the SFT model"]["auroc"] == results["SFT"]["auroc"]
    scores = {name: np.load(tmp_path / "seed3" / f"1 epochs, {name}.npy") for name in results}
    np.testing.assert_array_equal(scores["loss difference"], scores["SFT on the trusted rows"] - scores["SFT"])
    above_zero = results["loss difference above zero"]
    assert above_zero["kept_questions"] == (scores["loss difference"] > 0).mean()
    assert above_zero["auroc"] == results["loss difference"]["auroc"]
    spent = results["SFT"]["seconds"] + results["SFT on the trusted rows"]["seconds"]
    assert results["loss difference"]["seconds"] > spent


@pytest.mark.slow  # thirty runs; the alternatives, ablations and sweeps run the most of it
@pytest.mark.filterwarnings("ignore")
def test_every_other_method_runs_once_and_nothing_runs_twice(tmp_path, run_tiny):
    others = [method for method in _load("fault_methods").METHODS if method not in _load("alternatives").ALTERNATIVES]
    _check_tables(run_tiny(methods=others), others)
    files = sorted((tmp_path / "seed3").glob("*.json"))
    assert len(files) == len(others)
    before = [file.stat().st_mtime_ns for file in files]
    run_tiny(methods=others)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_rows_kept_of_a_ranking():
    alternative = _load("alternatives").Alternative(lambda context: np.zeros(4))
    scores = np.array([0.5, 2.0, 0.0, 0.5])
    assert alternative.kept(scores, num_good=2).tolist() == [0, 1]  # among equals the first
    assert alternative._replace(threshold=0.0).kept(scores, num_good=2).tolist() == [0, 1, 3]


@pytest.mark.filterwarnings("ignore")
def test_ranking_without_learned_weights_is_that_of_the_loss(tmp_path, run_tiny):
    methods = _load("fault_methods")
    run_tiny(methods=[methods.EQUAL_WEIGHTS])
    result = _results(tmp_path / "seed3")[methods.EQUAL_WEIGHTS]
    assert result["effective_sample_ratio"] == pytest.approx(1)
    assert result["auroc"] == pytest.approx(result["final_auroc_loss"])


@pytest.mark.filterwarnings("ignore")
def test_second_rounds_train_on_the_best_rows_or_on_those_that_proved_good(tmp_path, run_tiny, monkeypatch):
    methods = _load("fault_methods")
    trained_on = []
    train_sft = methods.train_sft

    def record(args, problem, rows):
        trained_on.append((problem, rows))
        return train_sft(args, problem, rows)

    monkeypatch.setattr(methods, "train_sft", record)
    # Within the two steps of a run
    monkeypatch.setitem(methods.BILEVEL_OPTIONS, methods.FIRST_ROUND, {"selector_learning_rate": 1e4})
    run_tiny(methods=[*methods.ROUNDS])
    (problem, best), (_, proved) = trained_on
    selector = DataSelector.from_pretrained(tmp_path / "seed3" / "first_round")
    good = np.array(problem.faulty["fault"]) == "none"
    trusted = problem.trusted["prompt"][:]
    assert best["prompt"][-len(trusted) :] == trusted
    assert len(best) == good.sum() + len(trusted)
    assert 0 < selector.proved_good.sum() < len(good)
    proved_rows = problem.faulty.select(np.flatnonzero(selector.proved_good.numpy()))
    assert proved["prompt"][:] == [*proved_rows["prompt"], *trusted]
    result = _results(tmp_path / "seed3")[methods.ROUNDS[1]]
    assert result["kept_questions"] == pytest.approx(selector.proved_good.float().mean().item())
    assert result["kept_right"] == pytest.approx((selector.proved_good.numpy() & good).mean())


@pytest.mark.filterwarnings("ignore")
def test_sweeps_are_printed_and_drawn(tmp_path, run_tiny):
    output = run_tiny(families=["harmful"], methods=["BMO"], fault_ratios=[0.3], validation_sizes=[20, 200])
    output = " ".join(output.split())  # titles wrap over narrow tables
    assert "harmful requests refused, harmful faults, by trusted rows" in output
    assert "harmful requests refused, harmful faults, by share of bad rows" in output
    figures = sorted((tmp_path / "figures").glob("*.png"))
    assert [figure.name for figure in figures] == ["harmful, share of bad rows.png", "harmful, trusted rows.png"]
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    assert {"refused", "over_refused"} <= set(_results(tmp_path / "seed3")["BMO [harmful, 20 trusted]"])


def _options_of_a_run(method):
    """Those that a method sets, by name."""
    methods, ablations = _load("fault_methods"), _load("fault_ablations")
    return {**methods.BILEVEL_OPTIONS, **methods.REFINED_OPTIONS, **ablations.ABLATION_OPTIONS}[method]


def test_ablations_change_the_option_they_show():
    ablations = _load("fault_ablations")
    for title, points in ablations.ABLATIONS.items():
        option, _, variant = title.partition(", ")
        settings = {value: dict(_options_of_a_run(method)) for value, method in points.items()}
        for value, options in settings.items():
            if "batch_size" in options:  # of both levels
                size = options.pop("batch_size")
                options |= {"per_device_train_batch_size": size, "per_device_validation_batch_size": size}
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


@pytest.mark.filterwarnings("ignore")
def test_ablations_are_printed_and_drawn(tmp_path, run_tiny):
    titles = ["per_device_train_batch_size", "num_refined_responses"]
    output = " ".join(run_tiny(ablations=titles).split())
    names = {"batches of 16", "batches of 64", "BDS, constant lambda", "BDS, refined: lowest weight"}
    names |= {"refined: 4 responses", "refined: 4 responses, temperature 0.5"}
    assert set(_results(tmp_path / "seed3")) == names
    for title in titles:
        assert f"{title}: mean (range) over the seeds" in output
        assert (tmp_path / "figures" / "ablations" / f"{title}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"Unknown ablations \['magic'\]"):
        run_tiny(ablations=["magic"])
    with pytest.raises(ValueError, match="not both"):
        run_tiny(ablations=["all"], methods=["BMO"])


def test_results_are_kept_in_one_file(tmp_path):
    results, names = _load("result_files"), _load("fault_settings").RESULT_NAMES
    ours, theirs, file = tmp_path / "ours", tmp_path / "theirs", tmp_path / "data" / "results.json"
    for folder, name, value in ((ours, "BMO", 0.5), (theirs, "SFT [harmful]", 0.25), (theirs, "BMO", 0.75)):
        (folder / "seed1").mkdir(parents=True, exist_ok=True)
        (folder / "seed1" / f"4 epochs, {name}.json").write_text(json.dumps({"auroc": value}))
    (ours / "seed1" / "trainer").mkdir()
    (ours / "seed1" / "trainer" / "config.json").write_text("{}")
    assert results.collect(ours, file, names) == 1
    assert results.restore(file, theirs, names) == 0  # has one of its own
    assert results.collect(theirs, file, names) == 2
    assert results.restore(file, tmp_path / "new", names) == 2
    restored = {path.name: json.loads(path.read_text()) for path in (tmp_path / "new" / "seed1").iterdir()}
    assert restored == {"4 epochs, BMO.json": {"auroc": 0.5}, "4 epochs, SFT [harmful].json": {"auroc": 0.25}}
    file.write_text(json.dumps({"seed1/../../4 epochs, BMO.json": {}}))
    with pytest.raises(ValueError, match="not one of this benchmark"):
        results.restore(file, tmp_path / "new", names)


def test_a_missing_package_is_reported(tmp_path, capsys, monkeypatch):
    benchmark, alternatives = _load("planted_faults"), _load("alternatives")
    name = "confidence (cleanlab)"
    absent = alternatives.ALTERNATIVES[name]._replace(package="no_such_package")
    monkeypatch.setitem(alternatives.ALTERNATIVES, name, absent)
    (tmp_path / "seed0" / "base_model").mkdir(parents=True)
    (tmp_path / "seed0" / "base_model" / "config.json").touch()
    benchmark.main(benchmark.BenchmarkArguments(str(tmp_path), seeds=[0], methods=[name], num_train_rows=40))
    assert "not installed" in capsys.readouterr().out
    with pytest.raises(alternatives.NotInstalledError, match=r"trl-bilevel\[benchmarks\]"):
        absent.require()


def test_ratios_are_to_the_same_seeds_sft(tmp_path):
    settings, tables = _load("fault_settings"), _load("fault_tables")
    for seed, seconds in ((0, 10.0), (1, 20.0)):
        files = settings.SeedFiles(tmp_path / f"seed{seed}", 4, settings.Setting())
        files.folder.mkdir()
        for method, match, factor in (("SFT", 0.2, 1), (tables.ORACLE, 0.8, 1.5), ("BMO", 0.5, 3)):
            measures = {"exact_match": match + seed / 10, "seconds": factor * seconds}
            files.write_result(method, measures, np.zeros(3))
    results = tables.read_results(tmp_path, ["SFT", "BMO", tables.ORACLE], [0, 1], 4, settings.Setting())
    for seed in (0, 1):
        assert results["BMO"][seed]["time_ratio"] == pytest.approx(3)
        assert results["BMO"][seed]["of_the_way"] == pytest.approx(0.5)
        assert "cpu_ratio" not in results["BMO"][seed]  # results of before it was measured


@pytest.mark.parametrize(
    ("values", "text"), [([0.5, 0.7], "0.600 (0.500 to 0.700)"), ([None, 0.5], "0.500"), ([None, None], "-")]
)
def test_spread_over_seeds(values, text):
    assert _load("result_tables").spread(values) == text
