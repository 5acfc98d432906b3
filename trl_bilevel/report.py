"""
The report of a run: one HTML page that needs nothing else, made of what the run left on disk.

Much of it comes from the rows, so nothing is trusted: the template escapes every value, and the page's policy lets a
browser run nothing and load nothing.
"""

import json
import os
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from jinja2 import Environment, StrictUndefined

from .curation import check_keep_ratio, count_kept, rows_worst_first
from .dataset_checks import resolve_sources
from .dataset_sources import source_ids
from .model_card import validation_loss_unit
from .parquet_files import column
from .report_figures import draw_curves, draw_weights
from .report_rows import ReportRow, plain_text, report_rows
from .row_scores import find_scores
from .run_records import curate_run, num_dropped, read_facts
from .screening.verdict import summarize
from .training_log import TrainingLog, read_log
from .weight_history import WeightHistory
from .whole_files import write_whole


_NUM_ROWS = 10  # of each list
_NUM_AROUND_CUT = 5  # on either side
_MOST_SOURCES = 50
_MOST_REFRESHES = 10
_MOST_REASONS = 8
_LOSSES = {
    "training_loss": "training rows",
    "validation_loss": "trusted rows",
    "eval_loss": "evaluation",
    "loss": "objective",
}
_RATIOS = {
    "refine/importance_ratio": "mean importance ratio",
    "refine/clip_ratio": "share of tokens clipped",
    "refine/effective_sample_ratio": "effective sample ratio",
}
_REFRESH_COLUMNS = {
    "refine/questions": "questions",
    "refine/response_length": "tokens of a response",
    "refine/used_ratio": "used",
    "refine/truncated_ratio": "truncated",
    "refine/identical_ratio": "identical to the original",
}


class SourceCounts(NamedTuple):
    """Rows of a source."""

    name: str
    rows: int
    kept: int
    dropped: int
    refined: int
    unscored: int
    mean_weight: float


def build_report(
    run_dir: str | os.PathLike, keep_ratio: float | str | None = "auto", source_column: str | None = None
) -> str:
    """
    The report of a run on disk as HTML; no model is loaded.

    Args:
        run_dir (`str` or `os.PathLike`): output folder of a run, finished or not, or a checkpoint.
        keep_ratio (`float` or `"auto"`, *optional*, defaults to `"auto"`): which rows count as kept, see
            [`~trl_bilevel.BilevelSFTTrainer.curate`].
        source_column (`str`, *optional*): column of the rows to count them by; that of the run by default.

    Raises:
        `FileNotFoundError`: if there is no run, it has not come to its first checkpoint, or has no rows on disk.
        `TypeError` or `ValueError`: for options out of range, a run on a stream, whose rows are not on disk, or files
            that are damaged or do not belong together.
    """
    check_keep_ratio(keep_ratio)
    directory = find_scores(run_dir)
    facts = read_facts(directory)
    if facts["training"].get("is_stream"):
        raise ValueError(
            f"{directory} is of a run on a stream, whose rows are not on disk, so there is no report of it. What it "
            "logged is where `report_to` sent it. For a report load the rows without `streaming=True`."
        )
    scored = curate_run(directory)
    log = read_log(directory) or TrainingLog(0, 0, 0.0, [])
    history = WeightHistory.load(directory)
    source_column = source_column or facts["options"].get("source_column")
    num_kept = count_kept(len(scored), keep_ratio, num_dropped(facts))
    values = {
        "name": plain_text(Path(os.path.abspath(run_dir)).name)[0],
        "facts": facts,
        "trusted_ids": source_ids(facts["validation"]),
        "training_ids": source_ids(facts["training"]),
        "unit": validation_loss_unit(facts),
        "options": {name: json.dumps(value) for name, value in {**facts["options"], **facts["model_options"]}.items()},
        "log": log,
        "keep_ratio": keep_ratio,
        "verdict": [] if facts.get("screening") is None else summarize(facts["screening"]),
        "warning": facts.get("warning"),
        "reasons": _common_reasons(scored, num_kept),
        "counts": count_by_source(scored, num_kept, source_column),
        "source_column": source_column,
        "most_sources": _MOST_SOURCES,
        "costs": _costs(log, history),
        "first_step": history.first_step,
        "refresh_columns": list(_REFRESH_COLUMNS.values()),
        "refreshes": _refreshes(log),
        **_weights(scored),
        **_figures(log, history),
        **_rows(scored, history, num_kept),
        "num_saved": len(history.steps),
    }
    template = resources.files("trl_bilevel").joinpath("cards/report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(values)


def write_report(page: str, path: str | os.PathLike) -> None:
    """Write a page, whole or not at all; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_text(page, encoding="utf-8"))


def count_by_source(scored: Dataset, num_kept: int, source_column: str | None) -> list[SourceCounts]:
    """
    Counts of all rows, then those of each source, the one of the highest mean weight first.

    Args:
        scored (`datasets.Dataset`): all N rows with their scores.
        num_kept (`int`): rows kept, those of the best rank.
        source_column (`str`, *optional*): names the sources; `None` for all rows only.
    """
    counts = _counts(scored, num_kept, ["all rows"], np.zeros(len(scored), dtype=np.int64))
    if source_column is None:
        return counts
    sources = resolve_sources(scored, source_column)
    by_source = _counts(scored, num_kept, sources.names.to_pylist(), sources.of_rows.numpy())
    return counts + sorted(by_source, key=lambda source: -source.mean_weight)


def _counts(scored: Dataset, num_kept: int, names: list[str], of_rows: np.ndarray) -> list[SourceCounts]:
    """Of S sources, in the order of their names; `of_rows` says which a row is of, shape (N,)."""
    kept = column(scored, "rank") <= num_kept
    refined = column(scored, "response_source") == "refined"
    unscored = ~column(scored, "scored")
    num_rows = np.bincount(of_rows, minlength=len(names))
    num_kept_rows, num_refined, num_unscored = (
        np.bincount(of_rows[is_in], minlength=len(names)) for is_in in (kept, refined, unscored)
    )
    mean_weights = np.bincount(of_rows, weights=column(scored, "weight"), minlength=len(names)) / num_rows
    columns = (num_rows, num_kept_rows, num_rows - num_kept_rows, num_refined, num_unscored, mean_weights)
    return [
        SourceCounts(plain_text(name, longest=80)[0], *values)
        for name, *values in zip(names, *(values.tolist() for values in columns), strict=True)
    ]


def first_and_last_ranks(first_logits: np.ndarray, last_ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Ranks of rows at the first checkpoint and now, 1 the best, among those that were scored by the first.

    Args:
        first_logits (`numpy.ndarray`): of all rows, NaN where a row was not scored, shape (N,).
        last_ranks (`numpy.ndarray`): of all rows now, shape (N,).

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray]`: int64, shape (N,) each, 0 for rows that were not scored.

    Example:

    ```python
    >>> first_and_last_ranks(np.array([0.5, np.nan, 2.0, -1.0]), np.array([1, 2, 4, 3]))
    (array([2, 0, 1, 3]), array([1, 0, 3, 2]))

    ```
    """
    known = np.flatnonzero(~np.isnan(first_logits))
    first, last = np.zeros((2, len(last_ranks)), dtype=np.int64)
    first[known[np.argsort(-first_logits[known], kind="stable")]] = np.arange(1, len(known) + 1)
    last[known[np.argsort(last_ranks[known])]] = np.arange(1, len(known) + 1)
    return first, last


def _common_reasons(scored: Dataset, num_kept: int) -> list[tuple[str, int]]:
    """What the dropped rows have in common: the first words of a screen's reasons, and how many rows have them."""
    if "screen_reason" not in scored.column_names:
        return []
    dropped = scored.select(np.flatnonzero(column(scored, "rank") > num_kept))
    kinds = Counter(
        reason.partition(";")[0].partition(":")[0].strip() or "none alone stands out"
        for reason in dropped["screen_reason"]
    )
    return kinds.most_common(_MOST_REASONS)


def _weights(scored: Dataset) -> dict[str, Any]:
    weights = column(scored, "weight")
    return {
        "num_rows": len(scored),
        "effective_sample_ratio": weights.sum() ** 2 / (len(weights) * np.square(weights).sum()),
        "quantiles": dict(zip((0, 5, 25, 50, 75, 95, 100), np.percentile(weights, [0, 5, 25, 50, 75, 95, 100]))),
    }


def _rows(scored: Dataset, history: WeightHistory, num_kept: int) -> dict[str, Any]:
    """The lists of rows; around the cut there are none if all rows are kept."""
    rank, refined = column(scored, "rank"), column(scored, "response_source") == "refined"
    best_first = np.argsort(rank)
    worst_first = rows_worst_first(scored)
    changed: list[ReportRow] = []
    num_compared = 0
    if len(history.steps) > 1:
        first, last = first_and_last_ranks(history.first_logits, rank)
        num_compared = int((first > 0).sum())
        change = np.abs(last - first)
        most = np.lexsort((rank, -change))[:_NUM_ROWS]
        most = most[change[most] > 0]
        changed = report_rows(scored, most.tolist(), {row: (int(first[row]), int(last[row])) for row in most.tolist()})
    around = (slice(max(num_kept - _NUM_AROUND_CUT, 0), num_kept), slice(num_kept, num_kept + _NUM_AROUND_CUT))
    last_kept, first_dropped = (
        report_rows(scored, best_first[rows].tolist()) if num_kept < len(scored) else [] for rows in around
    )
    return {
        "last_kept": last_kept,
        "first_dropped": first_dropped,
        "best": report_rows(scored, best_first[:_NUM_ROWS].tolist()),
        "worst": report_rows(scored, worst_first[:_NUM_ROWS].tolist()),
        "changed": changed,
        "num_compared": num_compared,
        "refined": report_rows(scored, best_first[refined[best_first]][:_NUM_ROWS].tolist()),
    }


def _figures(log: TrainingLog, history: WeightHistory) -> dict[str, str | None]:
    losses = {label: log.series(name) for name, label in _LOSSES.items() if log.series(name)[0]}
    shares = log.series("validation_weight")
    panels = [("loss, log scale", losses)]
    if len(set(shares[1])) > 1:
        panels.append(("λ, validation_weight", {"λ": shares}))
    ratios = {label: log.series(name) for name, label in _RATIOS.items() if log.series(name)[0]}
    mean = {label: curve for label, curve in ratios.items() if label.startswith("mean")}
    others = {label: curve for label, curve in ratios.items() if label not in mean}
    return {
        "loss_figure": draw_curves(panels) if losses else None,
        "weight_figure": draw_weights(history, log.series("selector/effective_sample_ratio"))
        if len(history.steps)
        else None,
        "ratio_figure": draw_curves([("mean importance ratio", mean), ("share", others)]) if ratios else None,
    }


def _costs(log: TrainingLog, history: WeightHistory) -> dict[str, str]:
    costs = {"optimizer steps": f"{log.global_step:,} of {log.max_steps:,}", "epochs": f"{log.epoch:.2f}"}
    if len(history.seconds):
        seconds, tokens = float(history.seconds[-1]), history.last_num_tokens
        costs["tokens read by the model"] = f"{tokens:,}"
        costs["time"] = duration(seconds)
        if history.steps[-1] > 0:
            costs["time per optimizer step"] = f"{seconds / history.steps[-1]:.3g} s"
            costs["tokens per second"] = f"{tokens / seconds:,.0f}"
    return costs


def _refreshes(log: TrainingLog) -> list[tuple[int, list[str]]]:
    found = [entry for entry in log.entries if "refine/questions" in entry][-_MOST_REFRESHES:]
    return [
        (entry["step"], [_number(entry[name], is_share=name.endswith("_ratio")) for name in _REFRESH_COLUMNS])
        for entry in found
    ]


def _number(value: float, is_share: bool) -> str:
    return f"{value:.1%}" if is_share else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """
    Example:

    ```python
    >>> duration(7.04), duration(754), duration(93_784)
    ('7.0 s', '12 min 34 s', '26 h 3 min')

    ```
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
