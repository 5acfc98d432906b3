"""Whether a ranking of rows can be told from noise, and what to change if it cannot."""

import math
from typing import Any

from .screening.verdict import noise_warning


_AS_GOOD_AS_EQUAL = 0.99  # normalized effective sample size of weights that differ by a tenth or so


def ranking_warning(facts: dict[str, Any], effective_sample_ratio: float) -> str | None:
    """
    What to say before anybody cuts by a ranking that may be noise; `None` if nothing speaks against it.

    Args:
        facts (`dict`): of the run, see [`~trl_bilevel.run_records.describe_run`].
        effective_sample_ratio (`float`): of the weights, (sum w)^2 / (N sum w^2), in (0, 1].
    """
    if facts.get("screening") is not None:
        return noise_warning(facts["screening"])
    if effective_sample_ratio <= _AS_GOOD_AS_EQUAL or math.isnan(effective_sample_ratio):
        return None
    return (
        "This ranking cannot be told from noise: the weights are as good as equal (normalized effective sample size "
        f"{effective_sample_ratio:.4f}). Train for longer, or rank the rows by a screen: `trl-bilevel screen`."
    )
