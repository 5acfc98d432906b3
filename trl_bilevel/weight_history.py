"""
How the weights spread at every checkpoint of a run: a histogram each time, and every row's logit the first time.

Part of each checkpoint, so that a run which is resumed from an earlier one has no entries from after it.
"""

import os
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from .data_selector import DataSelector
from .whole_files import damage_explained, write_whole


FILE_NAME = "_weight_history.safetensors"
BIN_EDGES = np.linspace(-5, 2, 57)
"""Edges of the histograms, in logarithms to base 10 of weights (mean 1); what is beyond is in the outermost bins."""
_ENTRY_FIELDS = ("steps", "seconds", "num_tokens", "effective_sample_ratios", "counts")
_MOST_ENTRIES = 200


class WeightHistory:
    """
    Entries of a run, one for each time it was saved.

    An entry takes O(N), N being the number of rows, so it belongs where the run is written to disk, which takes as
    long. There are never more than 200: the 201st makes every other one go.

    Attributes:
        steps (`numpy.ndarray`): optimizer steps of the entries, int64, shape (E,), increasing.
        seconds (`numpy.ndarray`): spent in training until then, without what an interruption lost, shape (E,).
        num_tokens (`numpy.ndarray`): that the model read in training until then, likewise, int64, shape (E,).
        effective_sample_ratios (`numpy.ndarray`): (sum w)^2 / (N sum w^2) of the weights, in (0, 1], shape (E,).
        counts (`numpy.ndarray`): rows in each bin of `BIN_EDGES`, int64, shape (E, 56).
        first_logits (`numpy.ndarray`): of all rows at the first entry, NaN for those that were not scored by then,
            fp32, shape (N,).
        first_step (`int`): of that entry.
    """

    def __init__(self) -> None:
        self.steps = np.empty(0, dtype=np.int64)
        self.seconds = np.empty(0)
        self.num_tokens = np.empty(0, dtype=np.int64)
        self.effective_sample_ratios = np.empty(0)
        self.counts = np.empty((0, len(BIN_EDGES) - 1), dtype=np.int64)
        self.first_logits = np.empty(0, dtype=np.float32)
        self.first_step = -1
        self._started = time.monotonic()
        self._ended: float | None = None
        self._seconds_before = 0.0  # in processes that were interrupted

    @property
    def last_num_tokens(self) -> int:
        """Tokens read until the last entry."""
        return int(self.num_tokens[-1]) if len(self.num_tokens) else 0

    def stop_clock(self) -> None:
        """Training is over: what is done with the trainer from now on takes none of its time."""
        self._ended = time.monotonic()

    def record(self, step: int, selector: DataSelector, num_tokens: int) -> None:
        """Add an entry, in place of those of the same step and later ones; none while the selector knows no row."""
        if selector.num_rows == 0:
            return
        weights = selector.weights().double().numpy()  # (N,)
        with np.errstate(divide="ignore"):  # a weight may underflow to 0
            logarithms = np.log10(weights)
        entry = {
            "steps": step,
            "seconds": self._seconds_before + (self._ended or time.monotonic()) - self._started,
            "num_tokens": num_tokens,
            "effective_sample_ratios": weights.sum() ** 2 / (len(weights) * np.square(weights).sum()),
            "counts": np.histogram(logarithms.clip(BIN_EDGES[0], BIN_EDGES[-1]), BIN_EDGES)[0],
        }
        num_earlier = int(np.searchsorted(self.steps, step))
        if num_earlier == 0:
            self.first_step = step
            self.first_logits = np.where(selector.scored.numpy(), selector.logits.numpy(), np.float32("nan"))
        stride = 1 if num_earlier < _MOST_ENTRIES else -2
        for name in _ENTRY_FIELDS:
            values = np.concatenate([getattr(self, name)[:num_earlier], np.asarray(entry[name])[None]])
            setattr(self, name, values if stride == 1 else values[::stride][::-1])  # the newest stays

    def forget_after(self, step: int) -> None:
        """Drop the entries of later steps, whose weights were given up; the time they took counts on."""
        num_kept = int(np.searchsorted(self.steps, step, side="right"))
        for name in _ENTRY_FIELDS:
            setattr(self, name, getattr(self, name)[:num_kept])

    def save(self, directory: str | os.PathLike) -> None:
        """Write the entries to `_weight_history.safetensors` in an existing directory, whole or not at all."""
        tensors = {name: getattr(self, name) for name in (*_ENTRY_FIELDS, "first_logits")}
        tensors["first_step"] = np.array([self.first_step])
        tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        write_whole(Path(directory) / FILE_NAME, lambda partial: save_file(tensors, partial))

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "WeightHistory":
        """
        The entries of a checkpoint; none if it has no file.

        Raises:
            `ValueError`: if the file is damaged.
        """
        history = cls()
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            return history
        with damage_explained(path, "Delete it: only the history of the weights is lost."):
            tensors = load_file(path)
            for name in (*_ENTRY_FIELDS, "first_logits"):
                setattr(history, name, tensors[name])
            history.first_step = int(tensors["first_step"][0])
            history._seconds_before = float(history.seconds[-1]) if len(history.seconds) else 0.0
        return history
