"""
Rankings of the rows by other people's tools.

Each takes the training and the trusted rows, as plain text, and gives a score per training row.
`pip install "trl-bilevel[benchmarks]"` installs the packages; a tool whose package is missing is reported as not
installed.
"""

import contextlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback
from trl import SFTTrainer

from lib.method_names import CONFIDENCE, DSIR, INFLUENCE


class NotInstalledError(ImportError):
    """The package of a method is missing."""


class TrainSFT(Protocol):
    """Plain SFT, the way a benchmark does it."""

    def __call__(
        self,
        rows: Dataset,
        *,
        epochs_of: Dataset,
        num_epochs: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> SFTTrainer:
        """
        Train on `rows` for as many steps as `num_epochs` over `epochs_of` take, the benchmark's number of them by
        default. Returns the trainer, trained.
        """
        ...


class Context(NamedTuple):
    """What a ranking is made from."""

    faulty: Dataset
    """The rows to rank, N, with the columns `prompt` and `completion`."""
    trusted: Dataset
    seed: int
    train_sft: TrainSFT
    tokenize: Callable[[Dataset], Dataset]
    """Rows to the columns `input_ids` and `labels`."""
    words: Callable[[str], str]
    """Text to what DSIR's n-grams are made of, separated by spaces."""


class Tool(NamedTuple):
    """A ranking."""

    rank: Callable[[Context], np.ndarray]
    """Scores of the training rows, shape (N,), higher is better."""
    package: str
    """The module that it needs."""

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def require(self) -> None:
        """Raises `NotInstalledError` if its package is missing."""
        if not self.is_installed:
            raise NotInstalledError(f'`{self.package}` is missing: `pip install "trl-bilevel[benchmarks]"`.')


@contextlib.contextmanager
def _quiet():
    """Without the progress bars and the notes that the packages write."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stderr(nowhere),
            contextlib.redirect_stdout(nowhere),
        ):
            yield
    finally:
        logging.disable(before)


def characters(text: str) -> str:
    """For DSIR where all words are different. It lower-cases them, and so cannot see the operation `upper`."""
    return " ".join(text.replace(" ", "_"))


def dsir_scores(faulty: Dataset, trusted: Dataset, words: Callable[[str], str]) -> np.ndarray:
    """DSIR (arXiv 2302.03169): log importance weights of hashed n-grams of prompt and answer together, shape (N,)."""
    from data_selection import HashedNgramDSIR

    def parse(row: dict[str, str]) -> str:
        return words(row["prompt"] + row["completion"])

    with tempfile.TemporaryDirectory() as folder, _quiet():
        paths = {}
        for name, rows in (("raw", faulty), ("target", trusted)):
            path = Path(folder) / f"{name}.jsonl"
            lines = [json.dumps({"prompt": r["prompt"], "completion": r["completion"]}) for r in rows]
            path.write_text("".join(line + "\n" for line in lines))
            paths[name] = str(path)
        dsir = HashedNgramDSIR(
            [paths["raw"]],
            [paths["target"]],
            cache_dir=str(Path(folder) / "cache"),
            raw_parse_example_fn=parse,
            target_parse_example_fn=parse,
            num_proc=1,  # one shard, so that the weights are in the order of the rows
            min_example_length=0,
        )
        dsir.fit_importance_estimator(num_tokens_to_fit="all")
        dsir.compute_importance_weights()
        return np.load(dsir.log_importance_weights_dir / "0.npy")


def tokenized(rows: Dataset, tokenizer: Any, max_length: int | None = None) -> Dataset:
    """`input_ids` of prompt, answer and end, the first `max_length`, and `labels` that leave the prompt out."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row in rows:
        prompt_length = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"][:max_length]
        columns["input_ids"].append(ids)
        columns["labels"].append(([-100] * prompt_length + ids[prompt_length:])[:max_length])
    return Dataset.from_dict(columns)


_PROJECTION = 16  # a module's gradient becomes 16 x 16 numbers
_ROWS_PER_BATCH = 50


def adapter_gradients(
    model: Any, rows: Dataset, adam: torch.optim.Optimizer | None = None, projection_dim: int | None = _PROJECTION
) -> np.ndarray:
    """
    Gradient of each row's loss in the adapter's parameters, by `bergson`, shape (N, parameters) or projected.

    Args:
        model (`PeftModel`): with a LoRA adapter.
        rows (`datasets.Dataset`): columns `input_ids` and `labels`.
        adam (`torch.optim.Optimizer`, *optional*): divide the gradients by the roots of its second moments.
        projection_dim (`int`, *optional*): random projection of each module's gradient to this many rows and columns.
    """
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector, load_from_optimizer
    from bergson.utils.peft import detect_peft_modules

    model.eval()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        config = IndexConfig(run_path=str(Path(folder) / "run"), loss_reduction="mean")
        config.partial_run_path.mkdir()
        modules, normalizers = detect_peft_modules(model), {}
        if adam is not None:
            path = Path(folder) / "optimizer.pt"
            torch.save(adam.state_dict(), path)
            normalizers = load_from_optimizer(model, str(path), target_modules=modules)
        collector = InMemoryCollector(
            model=model.base_model,
            data=rows,
            cfg=config,
            processor=GradientProcessor(normalizers=normalizers, projection_dim=projection_dim),
            target_modules=modules,
        )
        starts = range(0, len(rows), _ROWS_PER_BATCH)
        batches = [list(range(start, min(start + _ROWS_PER_BATCH, len(rows)))) for start in starts]
        CollectorComputer(model, rows, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
    model.zero_grad()
    return collector.builder.grad_buffer


def cosine_with_mean(gradients: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """
    Cosine of each row's gradient, (N, D), with the mean of the targets' unit gradients, (T, D): shape (N,).

    A row whose gradient is zero gets 0.
    """

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

    return unit(gradients) @ unit(unit(targets).mean(axis=0))


class _GradientInfluence(TrainerCallback):
    """Scores the rows at three points of the warm-up run; what LESS calls checkpoints."""

    def __init__(self, faulty: Dataset, trusted: Dataset):
        self.faulty, self.trusted = faulty, trusted
        self.scores = np.zeros(len(faulty))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        thirds = {-(-state.max_steps * third // 3) for third in (1, 2, 3)}
        if state.global_step not in thirds:
            return
        model = kwargs["model"]
        # LESS weighs a checkpoint by its learning rate. The schedule is linear down to zero, so that this is the rate
        # in the middle of the third that ends here, up to a factor.
        weight = 1 - (state.global_step / state.max_steps - 1 / 6)
        steps = adapter_gradients(model, self.faulty, adam=kwargs["optimizer"])
        self.scores += weight * cosine_with_mean(steps, adapter_gradients(model, self.trusted))
        model.train()


def _gradient_influence(context: Context) -> np.ndarray:
    """
    As LESS (arXiv 2402.04333): cosine of the row's adapter gradient, scaled as Adam scales it, with the plain gradient
    of the trusted rows, at checkpoints of a warm-up run. Not as there: the warm-up is one epoch over all rows, the
    model being too small to learn from 5 % of them; Adam's first moments are left out.
    """
    influence = _GradientInfluence(context.tokenize(context.faulty), context.tokenize(context.trusted))
    context.train_sft(context.faulty, epochs_of=context.faulty, num_epochs=1, callbacks=[influence])
    return influence.scores


_NUM_FOLDS = 3


def _confidence(context: Context) -> np.ndarray:
    """
    As cleanlab (arXiv 2210.03920): the smallest label quality among the tokens of the row's answer, by models that
    were trained on the other folds and the trusted rows, for as many epochs as the other methods.
    """
    scores = np.zeros(len(context.faulty))
    folds = np.random.default_rng(context.seed).permutation(len(scores)) % _NUM_FOLDS
    for fold in range(_NUM_FOLDS):
        others = context.faulty.select(np.flatnonzero(folds != fold))
        rows = concatenate_datasets([others, context.trusted])
        model = context.train_sft(rows, epochs_of=others).model
        out_of_fold = context.faulty.select(np.flatnonzero(folds == fold))
        scores[folds == fold] = label_quality(model, context.tokenize(out_of_fold))
    return scores


@torch.no_grad()
def label_quality(model: Any, rows: Dataset) -> np.ndarray:
    """
    cleanlab's score of each row's answer, in [0, 1], shape (N,); rows without an answer get the mean of the others.

    Args:
        model (`PreTrainedModel` or `PeftModel`): predicts the answers; left in eval mode.
        rows (`datasets.Dataset`): columns `input_ids` and `labels`.
    """
    from cleanlab.token_classification.rank import get_label_quality_scores

    model.eval()
    labels, probabilities = [], []
    has_answer = np.array([set(row) != {-100} for row in rows["labels"]])
    for row in rows.select(np.flatnonzero(has_answer)):
        ids = torch.tensor([row["input_ids"]])
        is_answer = torch.tensor(row["labels"])[1:] != -100
        predicted = model(input_ids=ids).logits[0, :-1].float().softmax(dim=-1)  # (L - 1, K)
        labels.append(ids[0, 1:][is_answer].tolist())
        probabilities.append(predicted[is_answer].numpy())
    sentence_scores, _ = get_label_quality_scores(labels, probabilities)
    scores = np.full(len(rows), np.mean(sentence_scores))
    scores[has_answer] = sentence_scores
    return scores


TOOLS: dict[str, Tool] = {
    DSIR: Tool(lambda context: dsir_scores(context.faulty, context.trusted, context.words), "data_selection"),
    INFLUENCE: Tool(_gradient_influence, "bergson"),
    CONFIDENCE: Tool(_confidence, "cleanlab"),
}
