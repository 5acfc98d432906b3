"""The toy problems on one page: tables of the results, and the pages of the docs that show them."""

import importlib
import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "alternatives.md"


@pytest.fixture
def overview(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("overview")


@pytest.fixture
def results(overview):
    """By seed, on two problems: ours, second round and loss difference, whose last model ranks worst."""
    by_name = {}

    def add(problem, ours, second, rival):
        for method, values in zip((*overview.OURS.values(), overview.RIVALS[0]), (ours, second, rival), strict=True):
            for seed, value in values.items():
                result = {"exact_match": value, "auroc": 1 - value}
                if method == overview.RIVALS[0]:
                    result["auroc_loss"] = 0.0
                by_name[f"{problem}/seed{seed}/{method}.json"] = result

    add("70 % bad", {0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5, 3: 0.1})
    add("20 trusted rows", {0: 0.5, 1: 0.5}, {0: 0.25}, {0: 0.25, 1: 0.75})
    by_name["10 % bad/seed0/BMO.json"] = {"exact_match": 0.125, "total_cpu_seconds": 3.0}
    return overview.Results(by_name)


def _rows(table):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line[1:] for line in lines}


def test_differences_are_of_the_seeds_that_both_have(overview, results):
    differences = overview.differences(results, "70 % bad", overview.FIRST_ROUND, overview.RIVALS[0], "exact_match")
    assert differences == pytest.approx({0: 0.25, 1: 0.2})
    rows = _rows(overview.difference_table(results, overview.AGAINST_RIVALS, "exact_match"))
    assert rows["70 % bad"][:2] == ["+0.225 (+0.200 to +0.250), 2 of 2", "+0.250 (+0.250 to +0.250), 2 of 2"]
    assert rows["20 trusted rows"][:2] == ["+0.000 (-0.250 to +0.250), 1 of 2", "+0.000 (+0.000 to +0.000), 0 of 1"]
    assert rows["10 % bad"] == ["-"] * 2
    assert len(rows["70 % bad"]) == 2  # nothing of the other rival


def test_seeds_that_the_defaults_were_chosen_on_are_apart(overview, results):
    results.by_name[f"70 % bad/seed2/{overview.RIVALS[0]}.json"] = {"exact_match": 0.4, "auroc": 0.0}
    rows = _rows(overview.seeds_table(results))
    # One run: 0.225 with 70 % bad rows, 0 with 20 trusted ones; second round 0.25 and 0
    assert [float(cell) for cell in rows["0 and 1"]] == pytest.approx([0.1125, 0.125, -0.1125], abs=6e-4)
    assert rows["2 to 4"] == ["+0.500", "-", "+0.100"]


def test_a_second_round_is_held_against_the_last_model_of_a_rival(overview, results):
    rows = _rows(overview.difference_table(results, overview.AGAINST_RIVALS, "auroc"))
    # 1 - 0.5 and 1 - 0.75, the rival's first rankings being 0.75 and 0.5
    assert rows["70 % bad"][1] == "+0.375 (+0.250 to +0.500), 2 of 2"
    differences = overview.differences(results, "70 % bad", overview.FIRST_ROUND, overview.RIVALS[0], "auroc")
    assert differences == pytest.approx({0: -0.25, 1: -0.2})
    for method in ("SFT", "SFT on the trusted rows"):
        results.by_name[f"70 % bad/seed0/{method}.json"] = {"auroc": 0.25}
    assert _rows(overview.last_model_table(results))["70 % bad"] == ["1", "0.250", "0.250", "0.000", "0.500"]


def test_verdict_counts_problems(overview, results):
    rows = _rows(overview.verdict_table(results))
    # ahead in every seed with 70 % bad rows; with 20 trusted ones in one of two seeds, and the second round in none
    assert rows[overview.RIVALS[0]] == ["1 / 1 / 0", "1 / 0 / 1", "0 / 1 / 1"]
    assert rows["SFT"] == ["-"] * 3


def test_closest_methods_are_compared_on_the_same_seeds(overview, results):
    assert "70 % bad" not in overview.closest_table(results, "auroc")  # plain SFT is missing
    assert "second round" not in _rows(overview.closest_table(results, "auroc"))["problem"]
    others = {
        "SFT": 0.1,
        "SFT on the trusted rows": 0.2,
        "SFT on the good rows (oracle)": 0.8,
        overview.RIVALS[1]: 0.3,
    }
    for method, value in others.items():
        for seed in range(4):
            results.by_name[f"70 % bad/seed{seed}/{method}.json"] = {"exact_match": value, "total_cpu_seconds": value}
    row = _rows(overview.closest_table(results, "exact_match"))["70 % bad"]
    assert row[0] == "2"
    assert row[3] == "0.375 (0.250 to 0.500)"
    assert row[5:7] == ["0.600 (0.500 to 0.700)", "0.625 (0.500 to 0.750)"]
    costs = _rows(overview.cost_table(results))
    assert costs["SFT on the trusted rows"] == ["4", "2.000 (2.000 to 2.000)"]
    assert "BMO" not in costs  # of another problem


def test_rows_that_proved_good_are_held_against_the_known_number(overview, results):
    proved = overview.PROVED_ROUND
    for seed, (kept, right, exact_match) in {0: (0.4, 0.3, 0.5), 1: (0.25, 0.25, 0.7), 4: (1.0, 0.1, 0.1)}.items():
        measures = {"kept_ratio": kept, "kept_precision": right / kept, "exact_match": exact_match}
        results.by_name[f"70 % bad/seed{seed}/{proved}.json"] = measures
    # Seed 4 has no run that was told the number
    assert _rows(overview.TABLES["proved"](results))["70 % bad"] == [
        "2", "0.3", "0.325 (0.250 to 0.400)", "0.875 (0.750 to 1.000)", "0.600 (0.500 to 0.700)",
        "0.625 (0.500 to 0.750)",
    ]  # fmt: skip


def test_rows_never_trained_on(overview, results):
    for seed in (0, 1):
        measures = {"proved_good": 0.5 + seed / 4, "unseen_auroc": 0.75, "unseen_auroc_loss": 1 - seed / 2}
        measures |= {"auroc_score": 0.5, "auroc_loss": 0.25} if seed else {"auroc_score": 0.5}
        results.by_name[f"10 % bad/seed{seed}/{overview.FIRST_ROUND}.json"] = measures
    rows = _rows(overview.unseen_table(results))
    assert rows["10 % bad"] == [
        "2", "0.625 (0.500 to 0.750)", "0.750 (0.750 to 0.750)", "0.750 (0.500 to 1.000)", "0.500 (0.500 to 0.500)",
        "0.250, 1",
    ]  # fmt: skip
    assert list(rows) == ["problem", "---", "10 % bad"]


def test_table_of_all_methods_has_all_seeds(overview, results):
    rows = _rows(overview.all_methods_table(results, "exact_match", ["10 % bad", "70 % bad"]))
    assert rows.pop("method") == ["10 % bad", "70 % bad"]
    assert rows.pop("BMO") == ["0.125, 1", "-"]
    assert rows[overview.FIRST_ROUND] == ["-", "0.700 (0.500 to 0.900)"]
    assert rows[overview.SECOND_ROUND] == ["-", "0.625 (0.500 to 0.750), 2"]
    assert rows.keys() == {"---", *overview.OURS.values(), overview.RIVALS[0]}
    assert sorted([*overview.SHARES, *overview.OTHER_PROBLEMS]) == sorted(overview.TOYS)
    assert [f"{share} % bad" for share in (10, 30, 50, 70, 80)] == overview.SHARES


def test_figure_has_a_dot_per_seed(overview, results):
    exact_match, auroc, *second = overview.difference_figure(results).axes
    assert not [x for axes in second for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()]
    dots = [x for line in exact_match.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert sorted(dots) == pytest.approx([-0.25, 0, 0.2, 0.25, 0.25, 0.25, 0.25])
    ranked = [x for line in auroc.lines if line.get_marker() == "o" for x in line.get_xdata()]
    # One run: the mirrored differences; the second round: its own values, as the rival's last model has 0
    assert sorted(ranked) == pytest.approx(sorted([-0.25, -0.2, -0.25, 0.25, 0.5, 0.25, 0.75]))


def test_page_is_filled_in(overview, results, tmp_path, capsys):
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    file.write_text(json.dumps(results.by_name))
    page.write_text("before\n<!-- table: verdict -->\nold\n<!-- end of table -->\nafter\n")
    arguments = overview.OverviewArguments(str(file), page=str(page), figures=str(tmp_path / "figures"))
    overview.main(arguments)
    written = page.read_text()
    assert overview.verdict_table(results) in written
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("\nafter\n")
    assert overview.verdict_table(results) in capsys.readouterr().out
    figure = tmp_path / "figures" / "against_losses.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    overview.main(arguments)
    assert page.read_text() == written
    with pytest.raises(ValueError, match=r"asks for the table 'magic'\. Known are \['verdict'"):
        overview.fill_in("<!-- table: magic --><!-- end of table -->", {"verdict": "", "cost": ""})


@pytest.mark.parametrize("page", [PAGE, ROOT / "docs" / "results.md"])
def test_the_docs_show_what_the_results_say(overview, page):
    text = page.read_text()
    assert text.count("<!-- table: ") >= 4
    results = overview.Results.read(ROOT / "docs" / "data" / "results.json")
    assert overview.fill_in(text, overview.all_tables(results)) == text


def test_default_problem(overview):
    """Of the way from SFT to oracle by seed, and how many seeds a cell has where others have more."""
    values = {"SFT": {0: 0.25, 1: 0.5}, "SFT on the good rows (oracle)": {0: 0.75, 1: 1.0}, "BMO": {1: 0.625}}
    by_name = {
        f"70 % bad/seed{seed}/{method}.json": {"exact_match": value, "auroc": 0.5}
        for method, by_seed in values.items()
        for seed, value in by_seed.items()
    }
    by_name["70 % bad/seed1/BMO.json"]["effective_sample_ratio"] = 0.75
    tables = overview.all_tables(overview.Results(by_name))
    rows = [line.strip("| ").split(" | ") for line in tables["default: training"].splitlines()[2:]]
    assert rows == [
        ["SFT", "0.375 (0.250 to 0.500)", "0.000 (0.000 to 0.000)", "0.500 (0.500 to 0.500)", "-"],
        ["BMO", "0.625, 1", "0.250, 1", "0.500, 1", "-"],
        ["SFT on the good rows (oracle)", "0.875 (0.750 to 1.000)", "1.000 (1.000 to 1.000)", "0.500 (0.500 to 0.500)",
         "-"],
    ]  # fmt: skip
    assert "| BMO | 0.750 | - | 0.500 | - |" in tables["default: weights"]


# ---- Tables that are written by hand ----


def _published(method, measure, seeds=range(5)):
    results = json.loads((ROOT / "docs" / "data" / "results.json").read_text())
    return [results[f"70 % bad/seed{seed}/{method}.json"][measure] for seed in seeds]


def _tables(path):
    """Rows of all tables of a page by their first cell, the first of each."""
    rows = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|│").split("│" if line.startswith("│") else "|")]
        if len(cells) > 2:
            rows.setdefault(cells[0], cells[1:])
    return rows


def test_readme_shows_the_published_results():
    """The real model's table, and the demo's, which is the default toy with seed 0."""
    rows = _tables(ROOT / "README.md")
    published = json.loads((ROOT / "docs/data/results.json").read_text())
    simple = ("loss of the base model", "loss of the SFT model", "loss of the trusted rows' model", "loss difference")
    for share in (0, 10, 25, 50, 70):
        bed = f"pipeline faults, {share}% bad, prompt and completion, 200 rows, 60 trusted, 1 epochs/seed0"

        def of(method, measure, bed=bed):
            return published[f"{bed}/{method}.json"][measure]

        best = max(of(method, "auroc") for method in simple) if share else None
        default = "BDS (all defaults)"
        expected = ["-", "-"] if best is None else [f"{best:.3f}", f"{of(default, 'auroc'):.3f}"]
        expected += [f"{of(default, 'noise_rate'):.2f}"]
        expected += [f"{of(method, 'held_out_loss'):.3f}" for method in ("SFT", default)]
        assert list(rows[f"{share} %"]) == expected
    for label, method in (("SFT", "SFT"), ("bilevel SFT", "BDS (all defaults)")):
        exact_match, auroc, _ = rows[label]
        ((match,), (area,)) = (_published(method, name, [0]) for name in ("exact_match", "auroc"))
        assert float(exact_match) == pytest.approx(match, abs=5e-4)
        assert float(auroc) == pytest.approx(area, abs=5e-4)
