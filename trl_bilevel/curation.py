"""From row weights to a curated dataset."""

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from .parquet_files import column
from .refined_rows import ORIGINAL_COLUMN, RESPONSES_COLUMN, apply_refined
from .screening.verdict import VERDICT_COLUMNS, Verdict


SAMPLE_ID_COLUMN = "sample_id"
SCORE_COLUMNS = ("weight", "rank", "scored", "response_source")
"""What [`curate_dataset`] says of every row, besides its `sample_id`."""
CURATION_COLUMNS = (*SCORE_COLUMNS, *VERDICT_COLUMNS, ORIGINAL_COLUMN, RESPONSES_COLUMN)
"""Columns that [`curate_dataset`] adds to the user's, besides `sample_id`."""


def curate_dataset(
    dataset: Dataset,
    sample_ids: pa.ChunkedArray,
    weights: np.ndarray,
    scores: np.ndarray,
    scored: np.ndarray,
    keep_ratio: float | str | None = None,
    responses: pa.Table | None = None,
    judged: np.ndarray | None = None,
    verdict: Verdict | None = None,
    good_probability: np.ndarray | None = None,
) -> Dataset:
    """
    Add each row's score to its dataset, and keep the best rows.

    The columns of the dataset come first, unchanged but for refined answers, and the rows keep their order. Added are:

    - `sample_id` (string or int): the row's id, unless the dataset has that column already;
    - `weight` (float): learned weight, mean 1 over all N rows;
    - `rank` (int): 1 for the row of the highest weight, N for the lowest; by `good_probability` where training added
      to a screen. Rows that were not scored come last;
    - `scored` (bool): False for a row whose weight was never updated, because training ended before it was seen, its
      loss was never finite, truncation left it without completion tokens, or weights were fixed
      (`selector_learning_rate=0`) and the given selector did not know it. Its weight says nothing about it. Also
      False for an answer that training never came to after a refresh changed it; such a row ranks by the weight that
      new answers get;
    - `response_source` (string): `"original"`, or `"refined"` for a row whose answer was regenerated;
    - `good_probability` (float): probability that the row is good, in [0, 1], unless weights are softmax weights,
      which are no probabilities; NaN for a row of which nothing is known;
    - of a run that began with a screen `p_value` and `screen_reason`, what it said of the row's original answer; see
      [`~trl_bilevel.screening.verdict.Verdict`];
    - with refinement `original_completion`, the answer that a refined one replaced, and `refined_responses`, all that
      were generated for the row, with their step, settings, the question's weight and the mean log-probability per
      token in nats. See [`~trl_bilevel.refined_rows.apply_refined`].

    Args:
        dataset (`datasets.Dataset`): the N training rows as the user passed them.
        sample_ids (`pyarrow.ChunkedArray`): N unique ids.
        weights (`numpy.ndarray`): shape (N,), mean 1.
        scores (`numpy.ndarray`): what to rank by, higher is better, shape (N,): the logits, which order rows whose
            weights are too small to differ.
        scored (`numpy.ndarray`): whether the row was ever scored, bool, shape (N,).
        keep_ratio (`float` or `"auto"`, *optional*): share of rows to keep, in (0, 1], those of the best rank; rounded
            to whole rows, at least one. `"auto"` leaves out those that the verdict does. If `None`, all rows.
        responses (`pyarrow.Table`, *optional*): refined responses of the run.
        judged (`numpy.ndarray`, *optional*): whether the answer that a row has now was scored, bool, shape (N,); if
            `None`, `scored`.
        verdict ([`~trl_bilevel.screening.verdict.Verdict`], *optional*): of a screen of the rows.
        good_probability (`numpy.ndarray`, *optional*): shape (N,), where there is no verdict.

    Returns:
        `datasets.Dataset`: the rows kept.

    Raises:
        `ValueError`: if `keep_ratio` is out of range.
    """
    num_rows, split = len(dataset), dataset.split
    num_kept = count_kept(num_rows, keep_ratio, 0 if verdict is None else int(verdict.left_out.sum()))
    if verdict is not None and verdict.is_learned:
        scores = verdict.good_probability
    rank = rank_rows(scores, scored, None if verdict is None else verdict.score)
    source_columns = {"response_source": pa.repeat("original", num_rows)}
    if responses is not None:
        dataset, source_columns = apply_refined(dataset.with_format(None), responses)
    columns = {
        "weight": weights.astype(np.float64),
        "rank": rank,
        "scored": scored if judged is None else judged,
        **source_columns,
    }
    if verdict is not None:
        values = (verdict.p_values, verdict.good_probability, verdict.reasons)
        columns |= dict(zip(VERDICT_COLUMNS, values, strict=True))
    elif good_probability is not None:
        columns["good_probability"] = good_probability
    if SAMPLE_ID_COLUMN not in dataset.column_names:
        columns = {SAMPLE_ID_COLUMN: sample_ids, **columns}
    # Without a format of the user's, which joining would bake into the columns
    scores_dataset = Dataset(pa.table(columns))
    dataset = concatenate_datasets([dataset.with_format(None), scores_dataset], axis=1, split=split)
    if keep_ratio is None:
        return dataset
    return dataset.select(np.flatnonzero(rank <= num_kept))


def check_keep_ratio(keep_ratio: float | str | None) -> None:
    """Raise a `ValueError` for a share out of (0, 1], and for another word than "auto"."""
    if keep_ratio is None or keep_ratio == "auto":
        return
    if isinstance(keep_ratio, str) or not 0 < keep_ratio <= 1:
        raise ValueError(
            f"`keep_ratio` must be 'auto', or larger than 0 and at most 1, got {keep_ratio}. 1 keeps all rows, scored."
        )


def parse_keep_ratio(text: str) -> float | str:
    """
    A share or "auto", as the command line has it.

    Example:

    ```python
    >>> parse_keep_ratio("0.7"), parse_keep_ratio("auto")
    (0.7, 'auto')

    ```
    """
    try:
        keep_ratio: float | str = text if text == "auto" else float(text)
    except ValueError:
        keep_ratio = text
    check_keep_ratio(keep_ratio)
    return keep_ratio


def count_kept(num_rows: int, keep_ratio: float | str | None, num_dropped: int = 0) -> int:
    """
    How many of some rows a share keeps: rounded to whole rows, at least one; all if it is `None`, and all but
    `num_dropped` if it is "auto".

    Raises:
        `ValueError`: if `keep_ratio` is out of range.

    Example:

    ```python
    >>> count_kept(10, 0.72), count_kept(10, 0.01), count_kept(10, None), count_kept(10, "auto", num_dropped=4)
    (7, 1, 10, 6)

    ```
    """
    check_keep_ratio(keep_ratio)
    if keep_ratio is None or isinstance(keep_ratio, str):
        return max(1, num_rows - num_dropped) if keep_ratio == "auto" else num_rows
    return max(1, round(keep_ratio * num_rows))


def rank_rows(scores: np.ndarray, scored: np.ndarray, evidence: np.ndarray | None = None) -> np.ndarray:
    """
    Ranks from 1, the best row's, int64 of shape (N,); rows that were not scored come last.

    Rows of equal scores are ranked by the evidence against them, shape (N,), if it is given.
    """
    ties = np.zeros(len(scores)) if evidence is None else np.nan_to_num(evidence)
    best_first = np.lexsort((ties, -scores, ~scored))  # (N,): by the last key first; equal rows keep their order
    rank = np.empty(len(scores), dtype=np.int64)
    rank[best_first] = np.arange(1, len(scores) + 1)
    return rank


def rows_worst_first(curated: Dataset) -> np.ndarray:
    """
    Positions of a curated dataset's rows, the worst first, shape (M,). Rows without a score, which rank last and of
    which nothing is known, are among them only if there are no others.
    """
    order = np.argsort(-column(curated, "rank"))
    has_score = column(curated, "scored")[order]
    return order[has_score] if has_score.any() else order
