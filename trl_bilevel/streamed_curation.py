"""From the weights of a stream's rows to a curated stream: nothing of the rows is kept in memory."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Features, IterableDataset, Value
from datasets.iterable_dataset import ExamplesIterable

from .curation import SAMPLE_ID_COLUMN, count_kept, rank_rows
from .paired_stream import read_sample_id
from .selector_transfer import logit_probabilities
from .streamed_selector import StreamedSelector


logger = get_logger(__name__)


def curate_stream(
    stream: IterableDataset, sample_id_column: str, selector: StreamedSelector, keep_ratio: float | str | None = None
) -> IterableDataset:
    """
    The rows of a stream that training has seen, with their scores, and only the best of them.

    The stream is read again, from its beginning, at every iteration, and no further than to the last row of the
    result. Each row comes once, in the order of the stream, with the columns that
    [`~trl_bilevel.curation.curate_dataset`] adds: `sample_id`, `weight` (mean 1 over the rows seen), `rank` among
    them, `scored` and `response_source`. They are those of this moment: training on changes nothing in the result.

    Args:
        stream (`datasets.IterableDataset`): training rows as the user passed them.
        sample_id_column (`str`): the column with the rows' ids.
        selector ([`~trl_bilevel.streamed_selector.StreamedSelector`]): knows the N rows seen.
        keep_ratio (`float`, *optional*): share of the rows seen to keep, in (0, 1]; all if `None`.

    Returns:
        `datasets.IterableDataset`: the rows kept.

    Raises:
        `ValueError`: if `keep_ratio` is out of range, or no row was seen yet.
    """
    num_rows = selector.num_rows
    num_kept = count_kept(num_rows, keep_ratio)
    if num_rows == 0:
        raise ValueError("Training has seen no row of the stream yet, so there is nothing to curate. Train first.")
    scored = selector.scored.numpy()
    weights = selector.weights().numpy().astype(np.float64)
    good_probability = None
    if selector.activation == "sigmoid":
        good_probability = logit_probabilities(selector.logits.numpy(), scored)
    rank = rank_rows(selector.logits.numpy(), scored)

    def read() -> Iterator[tuple[int, dict[str, Any]]]:
        left = rank <= num_kept  # (N,): rows to come
        num_left = num_kept
        for key, row in enumerate(stream.with_format(None)):
            sample_id = read_sample_id(row, sample_id_column)
            number = selector.number_of(sample_id)
            if number is None or number >= num_rows or not left[number]:
                continue
            left[number] = False
            num_left -= 1
            yield (
                key,
                {
                    **row,
                    SAMPLE_ID_COLUMN: sample_id,
                    "weight": float(weights[number]),
                    "rank": int(rank[number]),
                    "scored": bool(scored[number]),
                    "response_source": "original",
                    **({} if good_probability is None else {"good_probability": float(good_probability[number])}),
                },
            )
            if num_left == 0:
                return
        logger.warning(
            f"{num_left} of {num_kept} rows to keep did not come again in the stream, so they are missing in the "
            "curated dataset. The stream must give the same rows at every iteration."
        )

    return _stream_from(read, _features(stream, sample_id_column, good_probability is not None), stream)


def _stream_from(
    read: Callable[[], Iterator[tuple[int, dict[str, Any]]]], features: Features | None, like: IterableDataset
) -> IterableDataset:
    # Not `IterableDataset.from_generator`, which pickles what the generator knows, for a fingerprint
    info = like.info.copy()
    info.features = features
    return IterableDataset(ExamplesIterable(read, {}), info=info, split=like.split)


def _features(stream: IterableDataset, sample_id_column: str, has_probabilities: bool) -> Features | None:
    """Types of the columns, where the stream says those of its own."""
    if stream.features is None:
        return None
    added = {
        "weight": Value("float64"),
        "rank": Value("int64"),
        "scored": Value("bool"),
        "response_source": Value("string"),
        **({"good_probability": Value("float64")} if has_probabilities else {}),
    }
    own = {**stream.features, SAMPLE_ID_COLUMN: stream.features[sample_id_column]}  # in its place, if it is there
    return Features({**own, **added})
