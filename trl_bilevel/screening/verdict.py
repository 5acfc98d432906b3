"""From the statistics of answers to what a screen says: scores, calibrated, with reasons, and a few sentences."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ..whole_files import damage_explained, write_whole
from .answer_statistics import AnswerStatistics
from .calibration import PROMISE, Calibrated, calibrate, trusted_rows_needed
from .evidence import gather_evidence
from .positive_control import SEES, SUFFICES, Control, run_control
from .reasons import give_reasons


VERDICT_FILE_NAME = "_screening.pq"  # Parquet; the Hub's client warns of `.parquet` in a model repository
VERDICT_COLUMNS = ("p_value", "good_probability", "screen_reason")
"""What a curated dataset says of every row, where there was a screen."""
_NO_ANSWER = "no answer left after truncation"
_FACTS, _ROWS, _TRUSTED = b"facts", b"rows_fingerprint", b"trusted_fingerprint"


class Verdict(NamedTuple):
    """What a screen says of N rows."""

    score: np.ndarray
    """Evidence against each row, shape (N,), nats, higher is worse; NaN without an answer."""
    p_values: np.ndarray
    """Shape (N,), see [`~trl_bilevel.screening.calibration.conformal_p_values`]."""
    good_probability: np.ndarray
    """Shape (N,), in [0, 1]; NaN without an answer."""
    dropped: np.ndarray
    """Rows of which at most a tenth is good on average, bool of shape (N,)."""
    reasons: list[str]
    facts: dict[str, Any]
    """JSON values: `noise_rate`, `num_rows`, `num_dropped`, `num_left_out`, `num_trusted`, `control_auroc`..."""

    @property
    def left_out(self) -> np.ndarray:
        """What `keep_ratio="auto"` leaves out: the rows dropped, and those without an answer; bool of shape (N,)."""
        return self.dropped | np.isnan(self.score)

    @property
    def model_sees(self) -> bool:
        """Whether the model tells a trusted answer from one that belongs to another prompt."""
        return bool(self.facts["control_auroc"] >= SEES)

    @property
    def is_learned(self) -> bool:
        """Whether training has added to it, see [`~trl_bilevel.screening.training_evidence.after_training`]."""
        return "noise_rate_after_training" in self.facts

    @property
    def suffices(self) -> bool:
        """Whether the model sees so much that training need not add evidence of its own."""
        return bool(self.facts["control_power"] >= SUFFICES)


def conclude(
    statistics: list[AnswerStatistics], trusted: list[AnswerStatistics], swapped: list[AnswerStatistics]
) -> Verdict:
    """
    Join the evidence of one model, or of several, and calibrate it.

    The evidence of several models is added up (Fisher's method), for trusted rows as for the others, and calibrated
    as that of one is.

    Args:
        statistics (`list[AnswerStatistics]`): of the N rows, by each model.
        trusted (`list[AnswerStatistics]`): of the trusted rows.
        swapped (`list[AnswerStatistics]`): of the trusted rows with each other's answers, see
            [`~trl_bilevel.screening.positive_control.swap_answers`].

    Raises:
        `ValueError`: if no row has an answer, or too few trusted rows have one.
    """
    known = np.flatnonzero(~np.isnan([of.loss for of in statistics]).any(axis=0))
    known_trusted = np.flatnonzero(~np.isnan([of.loss for of in trusted]).any(axis=0))
    num_rows = len(statistics[0].loss)
    if len(known) == 0:
        raise ValueError("No row has an answer left after truncation. Raise `max_length`.")
    score, of_trusted, controls = np.zeros(len(known)), np.zeros(len(known_trusted)), []
    reasons = np.full(num_rows, _NO_ANSWER, dtype=object)
    for model, (of_rows, reference, control) in enumerate(zip(statistics, trusted, swapped, strict=True)):
        answers, trusted_answers = of_rows.select(known), reference.select(known_trusted)
        evidence, trusted_evidence = gather_evidence(answers, trusted_answers)
        score += evidence.score
        of_trusted += trusted_evidence.score
        controls.append(run_control(control.select(np.flatnonzero(~np.isnan(control.loss))), trusted_answers))
        if model == 0:
            reasons[known] = give_reasons(evidence, answers, trusted_answers)
    scores = np.full(num_rows, np.nan)
    scores[known] = score
    calibrated = calibrate(scores, of_trusted)
    facts = _facts(calibrated, len(known_trusted), max(controls))
    return Verdict(
        scores, calibrated.p_values, calibrated.good_probability, calibrated.dropped, reasons.tolist(), facts
    )


def _facts(calibrated: Calibrated, num_trusted: int, control: Control) -> dict[str, Any]:
    return {
        "noise_rate": calibrated.noise_rate._asdict(),
        "num_rows": len(calibrated.dropped),
        "num_dropped": int(calibrated.dropped.sum()),
        "num_left_out": int((calibrated.dropped | np.isnan(calibrated.p_values)).sum()),
        "num_trusted": num_trusted,
        "control_auroc": control.auroc,
        "control_power": control.power,
        "is_informative": bool(calibrated.is_informative),
        "promise": PROMISE,
    }


def summarize(facts: dict[str, Any]) -> list[str]:
    """
    What was found, a sentence each, with what is promised and under which assumption.

    Args:
        facts (`dict`): of a [`Verdict`].
    """
    rate, num_rows, num_dropped = facts["noise_rate"], facts["num_rows"], facts["num_dropped"]
    sentences = [
        f"{num_rows:,} rows screened against {facts['num_trusted']:,} trusted ones.",
        f"Noise rate: {rate['estimate']:.0%} of the rows look unlike the trusted ones "
        f"(90 % interval {rate['low']:.0%} to {rate['high']:.0%}).",
        f"Positive control: given a trusted answer and one of another prompt, the model tells them apart in "
        f"{facts['control_auroc']:.0%} of the pairs (chance: 50%).",
    ]
    if (warning := noise_warning(facts)) is not None:
        sentences.append(warning)
    learned = facts.get("noise_rate_after_training")
    if learned is not None:
        sentences.append(f"Noise rate after training, which added evidence of its own: {learned:.0%}.")
    if num_dropped:
        assumption = (
            "if good rows are like the trusted ones"
            if learned is None
            else "if the probabilities that training ends with are right"
        )
        sentences.append(
            f'`keep_ratio="auto"` drops {num_dropped:,} rows and keeps {num_rows - num_dropped:,}: of those dropped '
            f"at most {facts['promise']:.0%} are good on average, {assumption}."
        )
    elif facts["is_informative"] and learned is None:
        needed = trusted_rows_needed(max(rate["estimate"], 1 / num_rows))
        sentences.append(
            f"No row can be dropped with the promise that at most {facts['promise']:.0%} of those dropped are good"
            + (f": that takes about {needed:,} trusted rows." if needed > facts["num_trusted"] else ".")
        )
    return sentences


def noise_warning(facts: dict[str, Any]) -> str | None:
    """Why the ranking cannot be told from noise, and what to change; `None` if it can."""
    if facts["control_auroc"] < SEES:
        return (
            "That is too few: whether an answer fits its prompt cannot be told from noise by this model. Screen with "
            "a larger model, or one that was trained on such text."
        )
    if not facts["is_informative"]:
        return (
            "Nothing in this ranking can be told from noise: the rows look like the trusted ones. Either they are as "
            "good, or their faults are of a kind that this model does not see. Do not cut by it; a larger model, or "
            "trusted rows of the same kind as the dataset, may see more."
        )
    return None


def save_verdict(directory: str | os.PathLike, verdict: Verdict, rows: str, trusted: str) -> None:
    """Write a verdict, whole or not at all; `rows` and `trusted` are fingerprints of what it is about."""
    table = pa.table(
        {
            "score": verdict.score,
            "p_value": verdict.p_values,
            "good_probability": verdict.good_probability,
            "dropped": verdict.dropped,
            "screen_reason": verdict.reasons,
        }
    ).replace_schema_metadata({_FACTS: json.dumps(verdict.facts), _ROWS: rows, _TRUSTED: trusted})
    path = Path(directory) / VERDICT_FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: pyarrow.parquet.write_table(table, partial))


def read_verdict(directory: str | os.PathLike, rows: str, trusted: str | None = None) -> Verdict | None:
    """
    What [`save_verdict`] wrote; `None` if there is nothing, or it is of other rows, or of other trusted ones.

    Raises:
        `ValueError`: if the file is damaged.
    """
    path = Path(directory) / VERDICT_FILE_NAME
    if not path.is_file():
        return None
    with damage_explained(path, "Delete it, and the rows are screened again."):
        table = pyarrow.parquet.read_table(path)
        metadata = table.schema.metadata
        if metadata[_ROWS].decode() != rows or (trusted is not None and metadata[_TRUSTED].decode() != trusted):
            return None
        score, p_values, good, dropped = (table.column(name).to_numpy() for name in table.column_names[:4])
        return Verdict(
            score, p_values, good, dropped, table.column("screen_reason").to_pylist(), json.loads(metadata[_FACTS])
        )
