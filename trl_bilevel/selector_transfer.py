"""What a selector knows of another dataset's rows: joined by sample id."""

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch

from .selector_files import Selector


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
