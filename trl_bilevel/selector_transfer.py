"""What a selector starts with: what another one knows of the rows, joined by sample id, or probabilities."""

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from scipy.special import expit

from .selector_files import Selector


_TAKEN_AT_ITS_WORD = (1e-4, 1 - 1e-4)  # probabilities; beyond them logits would not be finite in the end


def transferred_logits(selector: Selector, other: Selector) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What a selector's rows have been found to be in another.

    A sigmoid logit is the prior's and what was learned on top of it: only the second is taken over. Softmax logits
    have no prior, and are of use beside each other only.

    Args:
        selector ([`~trl_bilevel.DataSelector`]): has N rows.
        other ([`~trl_bilevel.DataSelector`]): knows some of them.

    Returns:
        The logits, shape (N,), for rows that the other does not know or never scored those of a row of which nothing
        is known; and which rows it has scored, bool of shape (N,).

    Raises:
        `ValueError`: if no row was found.
    """
    sample_ids = selector.sample_ids
    found = pa.compute.index_in(_strings(sample_ids), value_set=_strings(other.sample_ids))
    positions = torch.tensor(found.fill_null(-1).to_numpy().astype(np.int64))  # (N,)
    known = (positions >= 0) & other.scored[positions]
    if not known.any():
        raise ValueError(
            "None of the rows has a score in the given selector, so nothing can be taken over. Sample ids are like "
            f"{sample_ids[0].as_py()!r} here and like {other.sample_ids[0].as_py()!r} there. Use the same "
            "`sample_id_column` in both runs."
        )
    neutral = selector.neutral_logit if selector.activation == "sigmoid" else other.neutral_logit
    return torch.where(known, other.logits[positions] + (neutral - other.neutral_logit), neutral), known


def _strings(ids: pa.ChunkedArray) -> pa.Array:
    """Ids in one type, whatever integer or string type they were stored in."""
    return ids.cast(pa.large_string()).combine_chunks()


def logit_probabilities(logits: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Probabilities that rows are good, of sigmoid weights; float64 of shape (N,), NaN where nothing is known."""
    return np.where(scored, expit(logits.astype(np.float64)), np.nan)


def probability_logits(probabilities: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits of probabilities, no further from one half than 1e-4 from 0 and 1, and which are known, shape (N,) each.

    Args:
        probabilities (`numpy.ndarray`): shape (N,), in [0, 1]; NaN where nothing is known, which gives a logit of 0.
    """
    known = torch.from_numpy(~np.isnan(probabilities))
    return torch.from_numpy(np.nan_to_num(probabilities, nan=0.5)).double().clamp(*_TAKEN_AT_ITS_WORD).logit(), known
