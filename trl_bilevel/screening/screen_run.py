"""The screen that a training run starts with: the model as it is before its first step reads all rows once."""

from typing import Any

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm

from .answer_statistics import AnswerStatistics
from .row_screener import RowScreener
from .verdict import Verdict, conclude, read_verdict, save_verdict, summarize


logger = get_logger(__name__)

_ROWS_AT_ONCE = 10_000


def screen_run(trainer: Any, rows: Dataset, trusted: Dataset, fingerprint: str, tokens_per_batch: int) -> Verdict:
    """
    Screen the rows of a run, or read what it found before, when the run goes on.

    Args:
        trainer ([`~trl.SFTTrainer`]): before its model is prepared for several processes; all of them call this.
        rows (`datasets.Dataset`): N training rows as the user passed them.
        trusted (`datasets.Dataset`): trusted rows, likewise.
        fingerprint (`str`): of the rows.
        tokens_per_batch (`int`): of a forward pass, padding included.
    """
    found = [read_verdict(trainer.args.output_dir, fingerprint) if trainer.is_world_process_zero() else None]
    verdict = broadcast_object_list(found)[0]
    if verdict is not None:
        return verdict
    screener = RowScreener(trainer, tokens_per_batch)
    of_trusted, swapped = screener.statistics(trusted), screener.swapped_statistics(trusted)
    verdict = conclude([_in_pieces(screener, rows)], [of_trusted], [swapped])
    if trainer.is_world_process_zero():
        save_verdict(trainer.args.output_dir, verdict, fingerprint)
    said = "\n".join(summarize(verdict.facts))
    logger.info(said)
    if not trainer.args.disable_tqdm:  # what a user looks at, as the log of the steps
        trainer.accelerator.print(said)
    return verdict


def _in_pieces(screener: RowScreener, rows: Dataset) -> AnswerStatistics:
    """Statistics of all rows, of which only some are tokenized at a time."""
    found = []
    had_progress_bars = not are_progress_bars_disabled()
    disable_progress_bars()  # of the preparation of every single piece
    try:
        is_hidden = screener.trainer.args.disable_tqdm or not screener.trainer.is_local_process_zero()
        with tqdm(total=len(rows), unit="row", desc="Screening", disable=is_hidden) as progress:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                piece = rows.select(range(start, min(start + _ROWS_AT_ONCE, len(rows))))
                found.append(screener.statistics(piece))
                progress.update(len(piece))
    finally:
        if had_progress_bars:
            enable_progress_bars()
    return AnswerStatistics(*(np.concatenate(values) for values in zip(*found, strict=True)))
