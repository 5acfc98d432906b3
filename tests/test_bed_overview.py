"""The page of the real model shows what the results say."""

import importlib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture
def overview(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bed_overview")


def test_the_page_shows_what_the_results_say(overview):
    results = overview.Results.read(ROOT / "docs" / "data" / "results.json")
    tables = {name: overview.markdown(*make(results, [0])) for name, make in overview.TABLES.items()}
    page = (ROOT / "docs" / "real_models.md").read_text()
    assert overview.fill_in(page, tables) == page
    assert "| base model | 0.886 | 0.903 |" in tables["AUROC, messages"]


def test_cells_are_means_of_the_seeds_asked_for_and_dashes_without_results(overview):
    bed = str(overview.Bed(overview.PIPELINE, "messages", 0.25))
    results = overview.Results(
        {f"{bed}/seed{seed}/SFT.json": {"auroc": auroc} for seed, auroc in enumerate((0.5, 0.7, 0.1))}
    )
    header, rows = overview.across_beds(results, "messages", "auroc", [0, 1])
    assert header == ["method", "25% bad"]
    assert rows == [["SFT", "0.600 (0.500 to 0.700)"]]
    assert overview.across_beds(results, "prompt and completion", "auroc", [0]) == (["method"], [])
