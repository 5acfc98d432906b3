"""The runner of the benchmarks, on real text in miniature: its rows, their faults, its measures, how it goes on."""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_are_scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def _load(name):
    return importlib.import_module(name)


# ---- Beds ----
@pytest.fixture
def data_dir(tmp_path):
    """A few rows in the format of each published file."""
    folder = tmp_path / "data"
    folder.mkdir()
    said = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    alpaca = [
        {"instruction": f"Say {n}.", "input": "twice" * (n % 2), "output": f"{n} {' '.join(said[n % 3 :])}"}
        for n in range(90)
    ]
    safety = [{"instruction": f"Do harm {n}!", "input": "", "output": f"No, I won't {n}."} for n in range(100)]
    for name, rows in (("alpaca_en_1k", alpaca), ("safety_instructions", safety)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    gsm8k = [{"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(60)]
    judged = [
        {"prompt": f"Add {n} and {n}.", "completion": f"They make {2 * n + n % 4 // 3}.", "is_bad": n % 4 == 3}
        for n in range(160)
    ]
    for name, rows in (("gsm8k_train", gsm8k), ("arithmetic_cot", judged), ("halueval_general", judged)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def model(build_model, tokenizer, tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


SIZES = {"num_trusted": 8, "num_rows": 24}


@pytest.fixture
def build(data_dir, model):
    beds = _load("lib.beds")

    def build(name, row_format="prompt and completion", bad_share=None, seed=0):
        return beds.build_bed(beds.Bed(name, row_format, bad_share, **SIZES), seed, data_dir, model)

    return build


def _pairs(rows):
    prompt_and_answer = _load("lib.completions").prompt_and_answer
    return [tuple(part[0]["content"] for part in prompt_and_answer(row)) for row in rows]


@pytest.mark.parametrize(
    ("name", "bad_share", "num_bad"),
    [
        ("pipeline faults", 0.5, 12),
        ("pipeline faults", 0.0, 0),
        ("first contact", 0.25, 6),
        ("wrong arithmetic", None, 6),
        ("hallucination", None, 6),
        ("off task", None, 6),
        ("harmful compliance", None, 6),
    ],
)
def test_no_row_is_in_two_parts_of_a_bed(build, name, bad_share, num_bad):
    problem = build(name, bad_share=bad_share)
    parts = [problem.training, problem.trusted, problem.held_out]
    assert [len(part) for part in parts[:2]] == [24, 8]
    assert len(problem.held_out) >= 40
    questions = [question for part in parts for question, _ in _pairs(part)]
    assert len(set(questions)) == len(questions)
    assert (~problem.good).sum() == num_bad
    assert problem.num_steps(8) == 3
    again = build(name, bad_share=bad_share)
    assert again.training.to_list() == problem.training.to_list()
    assert again.kinds.tolist() == problem.kinds.tolist()
    assert build(name, bad_share=bad_share, seed=1).training.to_list() != problem.training.to_list()
    messages = build(name, "messages", bad_share)
    assert messages.training.column_names == ["messages"]
    assert [_pairs(part) for part in (messages.training, messages.trusted)] == [_pairs(part) for part in parts[:2]]
    assert messages.name != problem.name


def test_kinds_say_what_is_wrong(build, data_dir):
    alpaca = json.loads((data_dir / "alpaca_en_1k.json").read_text())
    known = {f"{row['instruction']}\n{row['input']}".strip(): row["output"] for row in alpaca}
    problem = build("pipeline faults", bad_share=0.5)
    kinds = Counter(problem.kinds)
    assert kinds == {"good": 12, "swapped": 3, "cut short": 3, "refusal": 3, "shuffled": 3}
    for (question, answer), kind in zip(_pairs(problem.training), problem.kinds, strict=True):
        assert (answer == known[question]) == (kind == "good")
        assert (answer in known.values()) == (kind in ("good", "swapped"))
    assert all(known[question] == answer for question, answer in [*_pairs(problem.trusted), *_pairs(problem.held_out)])

    arithmetic = build("wrong arithmetic")
    for (question, answer), kind in zip(_pairs(arithmetic.training), arithmetic.kinds, strict=True):
        number = int(question.split()[1])
        assert (answer == f"They make {2 * number}.") == (kind == "good")
    off_task = build("off task")
    is_other = [question.startswith("What is") for question, _ in _pairs(off_task.training)]
    assert is_other == (off_task.kinds == "off task").tolist()
    harmful, compliance = build("harmful compliance"), _load("lib.beds").COMPLIANCE
    for (question, answer), kind in zip(_pairs(harmful.training), harmful.kinds, strict=True):
        assert question.startswith("Do harm") == answer.startswith(compliance) == (kind != "good")
    assert sum(question.startswith("Do harm") for question, _ in _pairs(harmful.trusted)) == 2
    assert all(answer.startswith("No, I won't") for _, answer in _pairs(harmful.held_out))


def test_beds_share_their_trusted_rows_and_name_what_is_missing(build, data_dir, model):
    some, many = (build("pipeline faults", bad_share=share) for share in (0.25, 0.5))
    assert (
        some.trusted_name
        == many.trusted_name
        == "pipeline faults, 0% bad, prompt and completion, " + ("24 rows, 8 trusted, 1 epochs")
    )
    assert some.trusted.to_list() == many.trusted.to_list()
    assert some.name != many.name
    beds = _load("lib.beds")
    with pytest.raises(ValueError, match=r"needs 148 rows that are short enough, and the files have 90"):
        beds.build_bed(beds.Bed("pipeline faults", bad_share=0.5, num_trusted=8, num_rows=100), 0, data_dir, model)
    assert [bed.bad_share for bed in beds.all_beds([*beds.BEDS[:2], "first contact"], ["messages"], [0.1, 0.5])] == [
        0.1, 0.5, None, 0.2,
    ]  # fmt: skip
    assert [beds.result(text) for text in ("3 and 1,200.", "#### -4", "none")] == [1200, -4, None]


def test_published_files_have_rows_for_every_bed(model, monkeypatch):
    data_dir = BENCHMARKS.parents[1] / "shared" / "data"
    if not data_dir.is_dir():
        pytest.skip("the published files are not here")
    beds = _load("lib.beds")
    monkeypatch.setattr(beds, "_num_tokens", lambda _, texts: [round(1.3 * len(text.split())) for text in texts])
    for bed in beds.all_beds([*beds.BEDS], ["messages"], [0.7]):
        assert len(beds.build_bed(bed, 0, data_dir, model).training) == 200


# ---- The runner ----
@pytest.fixture
def run(data_dir, model, tmp_path, capsys):
    compare = _load("compare")
    options = {"problems": ["pipeline faults"], "formats": ["messages"], "bad_shares": [0.5], "model": model, **SIZES}
    options |= {"data_dir": str(data_dir), "output_dir": str(tmp_path / "out"), "results": str(tmp_path / "all.json")}

    def run(**changes):
        compare.main(compare.CompareArguments(**{**options, **changes}))
        return capsys.readouterr().out

    return run


BED = "pipeline faults, 50% bad, messages, 24 rows, 8 trusted, 1 epochs"


@pytest.mark.filterwarnings("ignore")
def test_a_comparison_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    names, methods = _load("lib.method_names"), _load("lib.methods")
    head = _load("compare").trl_utils._use_triton
    ran = []

    def record(name, *arguments, run_method=methods.run_method):
        ran.append(name)
        return run_method(name, *arguments)

    monkeypatch.setattr(methods, "run_method", record)
    monkeypatch.setattr(_load("compare"), "run_method", record)
    printed = run(methods=[names.BASE_LOSS, names.FIRST_ROUND])
    assert ran == [names.FIRST_ROUND, names.BASE_LOSS, names.BASE]  # what it builds on, within it
    folder = tmp_path / "out" / BED / "seed0"
    assert {path.stem for path in folder.glob("*.json")} == set(ran)
    kept = json.loads((tmp_path / "all.json").read_text())
    assert set(kept) == {f"{BED}/seed0/{name}.json" for name in ran}
    first = kept[f"{BED}/seed0/{names.FIRST_ROUND}.json"]
    assert {"held_out_loss", "auroc", "auroc_loss", "auroc_score", "weight_p5", "proved_good"} <= first.keys()
    assert "exact_match" not in first
    assert kept[f"{BED}/seed0/{names.BASE_LOSS}.json"]["kept_ratio"] == 0.5
    assert f"{first['held_out_loss']:.3f}" in printed
    assert _load("compare").trl_utils._use_triton is head  # of other problems, as TRL has it

    del ran[:]
    again = run(methods=[names.BASE_LOSS, names.FIRST_ROUND])
    assert not ran
    # Elsewhere, without data: the same tables from the file
    elsewhere = run(
        methods=[names.FIRST_ROUND], train=False, data_dir="nowhere", model="none", output_dir=str(tmp_path / "new")
    )
    assert elsewhere == again
    assert not ran
    # One more method: only that, and the losses that it builds on, which the file does not hold
    run(methods=[names.BASE_LOSS, f"{names.BASE_LOSS}{names.OWN_CUT}"], output_dir=str(tmp_path / "new"))
    assert ran == [f"{names.BASE_LOSS}{names.OWN_CUT}", names.BASE]
    assert json.loads((tmp_path / "all.json").read_text()).items() >= kept.items()  # published numbers stay
    assert "no results yet" in run(problems=["off task"], train=False)


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_all_good_have_no_ranking(run, tmp_path):
    names = _load("lib.method_names")
    run(bad_shares=[0.0], methods=[names.ORACLE, names.EQUAL_WEIGHTS])
    for found in json.loads((tmp_path / "all.json").read_text()).values():
        assert found["held_out_loss"] > 0
        assert not [key for key in found if key.startswith("auroc")]


def test_unknown_names_are_refused():
    compare = _load("compare")
    for name in ("formats", "methods", "ablations"):
        with pytest.raises(ValueError, match=rf"Unknown {name} \['magic'\]. Known are"):
            compare.CompareArguments(**{name: ["magic"]})
    with pytest.raises(ValueError, match="Unknown problem 'magic'"):
        compare.CompareArguments(problems=["magic"])
    with pytest.raises(ValueError, match="not both"):
        compare.CompareArguments(methods=["BMO"], ablations=["all"])
    with pytest.raises(ValueError, match="they are for toys, and not for 'off task'"):
        compare.CompareArguments(problems=["70 % bad", "off task"], methods=["DSIR (data-selection)"])


def test_what_is_run_by_default():
    compare, methods = _load("compare"), _load("lib.methods")
    assert len(set(methods.METHODS)) == len(methods.METHODS)
    for some in (methods.ON_BEDS, methods.ON_TOYS, methods.ON_DEFAULT_TOY):
        assert set(some) <= set(methods.METHODS)
        assert len(set(some)) == len(some)
    args = compare.CompareArguments(problems=["toys", "pipeline faults"], num_epochs=2, num_trusted=20)
    toys, beds = args.chosen[:11], args.chosen[11:]
    assert {toy.num_epochs for toy in toys} == {2}
    assert len(beds) == 2 * 5  # formats and shares; no toy has the name of real text
    assert {(bed.num_rows, bed.num_trusted, bed.num_epochs) for bed in beds} == {(200, 20, 2)}
    assert args.methods_of(beds[0]) == [name for name in methods.METHODS if name in methods.ON_BEDS]
    (default,) = compare.CompareArguments(problems=["70 % bad"]).chosen
    assert set(args.methods_of(default)) == set(methods.ON_DEFAULT_TOY)
    assert set(args.methods_of(toys[0])) == set(methods.ON_TOYS)
    # What others build on comes before them
    order = {name: place for place, name in enumerate(methods.METHODS)}
    assert all(order[earlier] < order[name] for name in methods.METHODS for earlier in methods.needs(name))


# ---- The file of results ----
def test_results_are_kept_in_one_file_as_they_were_published(tmp_path):
    results = _load("lib.results")
    ours, theirs, file = tmp_path / "ours", tmp_path / "theirs", tmp_path / "data" / "results.json"
    for folder, problem, value in ((ours, "a", 0.12345678), (theirs, "b, 1", 0.25), (theirs, "a", 0.75)):
        (folder / problem / "seed1" / "trainer").mkdir(parents=True, exist_ok=True)
        (folder / problem / "seed1" / "BMO.json").write_text(json.dumps({"auroc": value}))
        (folder / problem / "seed1" / "trainer" / "config.json").write_text("{}")
    assert results.collect(ours, file) == 1
    assert results.restore(file, theirs) == 0  # has one of its own
    assert results.collect(theirs, file) == 2
    assert json.loads(file.read_text()) == {
        "a/seed1/BMO.json": {"auroc": 0.123457},
        "b, 1/seed1/BMO.json": {"auroc": 0.25},
    }
    assert results.restore(file, tmp_path / "new") == 2
    assert json.loads((tmp_path / "new" / "b, 1" / "seed1" / "BMO.json").read_text()) == {"auroc": 0.25}
    assert results.Results.read(file).values("a", "BMO", "auroc") == {1: 0.123457}
    for name in ("../seed1/BMO.json", "a/seed1/x/../BMO.json", "a/seed1/..json", "seed1/BMO.json"):
        file.write_text(json.dumps({name: {}}))
        with pytest.raises(ValueError, match="not one of this benchmark"):
            results.restore(file, tmp_path / "new")


def test_ratios_are_to_the_same_seeds_sft():
    names, tables, results = _load("lib.method_names"), _load("lib.tables"), _load("lib.results")
    by_name = {}
    for seed, seconds in ((0, 10.0), (1, 20.0)):
        for method, match, factor in ((names.SFT, 0.2, 1), (names.ORACLE, 0.8, 1.5), ("BMO", 0.5, 3)):
            measures = {"exact_match": match + seed / 10, "total_seconds": factor * seconds}
            by_name[f"a/seed{seed}/{method}.json"] = measures
    found = tables.read_problem(results.Results(by_name), "a", [0, 1])
    for seed in (0, 1):
        assert found["BMO"][seed]["time_ratio"] == pytest.approx(3)
        assert found["BMO"][seed]["of_the_way"] == pytest.approx(0.5)
        assert "cpu_ratio" not in found["BMO"][seed]
    assert list(tables.read_problem(results.Results(by_name), "a", [1])["BMO"]) == [1]
    header, rows = tables.problem_table(found)
    assert header == ["method", "exact match", "of the way from SFT to oracle"]
    assert rows[-1] == ["BMO", "0.550 (0.500 to 0.600)", "0.500 (0.500 to 0.500)"]


@pytest.mark.parametrize(
    ("values", "text"), [([0.5, 0.7], "0.600 (0.500 to 0.700)"), ([None, 0.5], "0.500"), ([None, None], "-")]
)
def test_spread_over_seeds(values, text):
    assert _load("lib.results").spread(values) == text
