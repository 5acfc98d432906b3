"""The screen that a training run starts with: the model as it is before its first step reads all rows once."""

from typing import Any

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ..scoring import row_progress
from .answer_statistics import AnswerStatistics
from .row_screener import RowScreener
from .verdict import Verdict, conclude, read_verdict, save_verdict, summarize


logger = get_logger(__name__)

_ROWS_AT_ONCE = 10_000
_TOKENS_PER_BATCH = 2048


def screen_run(
    trainer: Any, rows: Dataset, trusted: Dataset, fingerprints: tuple[str, str], is_resumed: bool
) -> Verdict:
    """
    Screen the rows of a run, or read what it found before, when the run goes on.

    Args:
        trainer ([`~trl.SFTTrainer`]): before its model is prepared for several processes; all of them call this.
        rows (`datasets.Dataset`): N training rows as the user passed them.
        trusted (`datasets.Dataset`): trusted rows, likewise.
        fingerprints (`tuple[str, str]`): of both.
        is_resumed (`bool`): whether the run goes on. Another one in the same folder may be of another model.
    """
    found: list[Verdict | None] = [None]
    if is_resumed and trainer.is_world_process_zero():
        found = [read_verdict(trainer.args.output_dir, *fingerprints)]
    verdict = broadcast_object_list(found)[0]
    if verdict is not None:
        return verdict
    of_rows = screen_rows(trainer, rows, "Screening")
    screener = RowScreener(trainer, _TOKENS_PER_BATCH)
    of_trusted, swapped = screener.statistics(trusted), screener.swapped_statistics(trusted)
    verdict = conclude([of_rows], [of_trusted], [swapped])
    if trainer.is_world_process_zero():
        save_verdict(trainer.args.output_dir, verdict, *fingerprints)
    said = "\n".join(summarize(verdict.facts))
    logger.info(said)
    if not trainer.args.disable_tqdm:  # what a user looks at, as the log of the steps
        trainer.accelerator.print(said)
    return verdict


def screen_rows(trainer: Any, rows: Dataset, description: str) -> AnswerStatistics:
    """
    Statistics of all rows under the model as it is, of which only some are tokenized at a time.

    Args:
        trainer ([`~trl.SFTTrainer`]): as for [`screen_run`].
        rows (`datasets.Dataset`): N rows as the user passed them.
        description (`str`): of the progress bar.
    """
    screener = RowScreener(trainer, _TOKENS_PER_BATCH)
    found = []
    with row_progress(trainer, len(rows), description) as progress:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            piece = rows.select(range(start, min(start + _ROWS_AT_ONCE, len(rows))))
            found.append(screener.statistics(piece))
            progress.update(len(piece))
    return AnswerStatistics(*(np.concatenate(values) for values in zip(*found, strict=True)))
