"""The curated dataset: ranks, ids, flags and columns."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from trl_bilevel.curation import count_kept, curate_dataset, rows_worst_first
from trl_bilevel.hub import load_curated_dataset, publish_curated_dataset
from trl_bilevel.report import build_report
from trl_bilevel.scripts.sft import BilevelScriptArguments


ROWS = Dataset.from_dict({"text": ["a", "b", "c", "d", "e"], "extra": [[1], [], [2, 3], [4], None]})
WEIGHTS = np.array([0.5, 2.0, 1.0, 1.0, 0.5], dtype=np.float32)
SCORES = np.array([-3.0, 2.0, 0.0, 1.0, -4.0], dtype=np.float32)
SCORED = np.array([True, True, False, True, True])
IDS = pa.chunked_array([["r0", "r1"], ["r2", "r3", "r4"]])


def test_all_rows_scored():
    curated = curate_dataset(ROWS, IDS, WEIGHTS, SCORES, SCORED)
    assert curated.column_names == ["text", "extra", "sample_id", "weight", "rank", "scored", "response_source"]
    assert curated.select_columns(["text", "extra"]).to_list() == ROWS.to_list()
    assert curated["sample_id"] == ["r0", "r1", "r2", "r3", "r4"]
    assert curated["weight"] == [0.5, 2, 1, 1, 0.5]
    # by score, which orders the two rows of weight 0.5; the row that was not scored comes last
    assert curated["rank"] == [3, 1, 5, 2, 4]
    assert set(curated["response_source"]) == {"original"}


@pytest.mark.parametrize(
    ("keep_ratio", "kept"),
    [(1.0, "abcde"), (0.8, "abde"), (0.6, "abd"), (0.4, "bd"), (0.2, "b"), (0.001, "b"), (0.5, "bd")],
)
def test_best_rows_are_kept_in_their_order(keep_ratio, kept):
    assert curate_dataset(ROWS, IDS, WEIGHTS, SCORES, SCORED, keep_ratio)["text"] == list(kept)


def test_rows_without_a_score_are_not_the_worst():
    curated = curate_dataset(ROWS, IDS, WEIGHTS, SCORES, SCORED)
    assert [curated["text"][row] for row in rows_worst_first(curated)] == ["e", "a", "d", "b"]  # "c" was not scored
    nothing_known = curate_dataset(ROWS, IDS, WEIGHTS, SCORES, np.zeros(5, dtype=bool))
    assert len(rows_worst_first(nothing_known)) == 5


def test_id_column_of_the_dataset_is_kept_as_it_is():
    rows = ROWS.add_column("sample_id", [10, 11, 12, 13, 14])
    curated = curate_dataset(rows, pa.chunked_array([[10, 11, 12, 13, 14]]), WEIGHTS, SCORES, SCORED, 0.4)
    assert curated["sample_id"] == [11, 13]


def test_source_dataset_is_not_changed():
    curate_dataset(ROWS, IDS, WEIGHTS, SCORES, SCORED, 0.4)
    assert ROWS.column_names == ["text", "extra"]


def test_selected_source_keeps_its_own_rows():
    """A dataset with an indices mapping, as after `shuffle` or `select`."""
    rows = ROWS.select([4, 2, 0, 1, 3])
    curated = curate_dataset(rows, IDS, WEIGHTS, SCORES, SCORED, 0.4)
    assert curated["text"] == ["c", "b"]


def test_transform_of_the_source_is_not_baked_in():
    rows = ROWS.select([4, 2, 0, 1, 3]).with_transform(lambda batch: {"text": [text * 2 for text in batch["text"]]})
    assert curate_dataset(rows, IDS, WEIGHTS, SCORES, SCORED, 0.4)["text"] == ["c", "b"]


def test_equal_scores_keep_the_order_of_the_rows():
    curated = curate_dataset(ROWS, IDS, np.ones(5), np.zeros(5), np.ones(5, dtype=bool))
    assert curated["rank"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "cut",
    [
        lambda ratio: count_kept(5, ratio),
        lambda ratio: curate_dataset(ROWS, IDS, WEIGHTS, SCORES, SCORED, ratio),
        lambda ratio: publish_curated_dataset(ROWS, {}, "me/rows", ratio),
        lambda ratio: load_curated_dataset("me/rows", keep_ratio=ratio),
        lambda ratio: build_report("nowhere", ratio),
        lambda ratio: BilevelScriptArguments(keep_ratio=str(ratio)),
    ],
)
@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, float("nan")])
def test_one_rule_of_what_a_share_may_be(cut, ratio):
    with pytest.raises(ValueError, match=rf"'auto', or larger than 0 and at most 1, got {ratio}\. 1 keeps all rows"):
        cut(ratio)
