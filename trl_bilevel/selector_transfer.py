"""What a selector knows of another dataset's rows: joined by sample id."""

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch

from .selector_files import Selector


def transferred_logits(sample_ids: pa.ChunkedArray, other: Selector) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The logits of some rows in another selector.

    Args:
        sample_ids (`pyarrow.ChunkedArray`): of N rows.
        other ([`~trl_bilevel.DataSelector`]): knows some of them.

    Returns:
        The logits, shape (N,), those of the mean weight for rows that the other does not know or never scored; and
        which rows it has scored, bool of shape (N,).

    Raises:
        `ValueError`: if no row was found.
    """
    found = pa.compute.index_in(_strings(sample_ids), value_set=_strings(other.sample_ids))
    positions = torch.tensor(found.fill_null(-1).to_numpy().astype(np.int64))  # (N,)
    known = (positions >= 0) & other.scored[positions]
    if not known.any():
        raise ValueError(
            "None of the rows has a score in the given selector, so nothing can be taken over. Sample ids are like "
            f"{sample_ids[0].as_py()!r} here and like {other.sample_ids[0].as_py()!r} there. Use the same "
            "`sample_id_column` in both runs."
        )
    return torch.where(known, other.logits[positions], other.mean_logit), known


def _strings(ids: pa.ChunkedArray) -> pa.Array:
    """Ids in one type, whatever integer or string type they were stored in."""
    return ids.cast(pa.large_string()).combine_chunks()
