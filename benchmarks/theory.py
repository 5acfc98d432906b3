"""
The paper's theorems as numbers: a one-layer Transformer in float64, whose optimum is known.

Sequences of symbols end with a query; the answer belongs to the symbol that the query asks for. Every question has a
*useful* training row, with its answer; questions that the validation set knows also have *useless* rows, with another
answer: no model that fits them has the best validation loss (arXiv 2511.21056, its definition). The model can fit all
useful rows at once, so that the least validation loss is 0. Both levels take full gradient steps; the selector's are
those of this package.

```bash
python benchmarks/theory.py --figure docs/figures/theory.png
```

It prints after how many steps each method's validation loss is within epsilon of the optimum, where the weights end,
and how many of the useful rows the model answers rightly ("coverage"), those that validation never saw included.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from trl import TrlParser

from trl_bilevel.losses import closed_form_log_weights
from trl_bilevel.selector_updates import mirror_descent_step


matplotlib.use("Agg")

FITTED = 0.9  # probability of a row's answer from which on the model is said to fit it


class Method(NamedTuple):
    """How rows are weighed."""

    step: float | None
    """Of the selector, in logits per nat: learned weights; closed-form ones with 0, constant ones with `None`."""
    value_function: str | None = None
    """Which rows theta-hat learns, for excess losses: "selected" or "rejected"; without it the loss itself counts."""
    validation_weight: float = 0.5
    """lambda"""


METHODS = {
    "BDS, value function": Method(0.001, "rejected"),
    "BDS, penalty form": Method(0.001, "selected"),
    "BDS, loss": Method(0.001),
    "BDS, loss, fast weights": Method(0.02),
    "BMO": Method(0.0),
    "direct mixing": Method(None),
    "validation only": Method(None, validation_weight=1.0),
}
_COLORS = dict(zip(METHODS, ("C0", "C9", "C2", "C8", "C1", "C3", "C7"), strict=True))


@dataclass
class TheoryArguments:
    """
    Options of the benchmark.

    Args:
        num_symbols (`int`): symbols that a query may ask for, each with an answer of its own.
        sequence_length (`int`): symbols before the query.
        num_questions (`int`): sequences with a useful row each; validation knows half of them.
        num_useless (`int`): useless rows for each question that validation knows.
        num_steps (`int`): steps of both levels.
        step_sizes (`list[float]`): of the model's gradient steps.
        epsilons (`list[float]`): distances to the optimum, in nats.
        seeds (`list[int]`): of data and parameters.
        figure (`str`, *optional*): PNG file.
    """

    num_symbols: int = 8
    sequence_length: int = 6
    num_questions: int = 24
    num_useless: int = 3
    num_steps: int = 8_000
    step_sizes: list[float] = field(default_factory=lambda: [0.3, 1.0, 3.0])
    epsilons: list[float] = field(default_factory=lambda: [0.3, 0.1, 0.03, 0.01])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    figure: str | None = None


class Rows(NamedTuple):
    """Questions and answers; the first `num_useful` are useful."""

    questions: torch.Tensor
    """Symbols and the query at the end, shape (N, T + 1), int64."""
    answers: torch.Tensor
    """Shape (N,), int64."""
    num_useful: int


class Course(NamedTuple):
    """A run: of each step the validation loss in nats, and what came of it."""

    validation_losses: torch.Tensor
    """Shape (number of steps,)."""
    useless_weight: torch.Tensor
    """Share of the weight on useless rows, shape (number of steps,)."""
    coverage: float
    """Share of the useful rows whose answer has a probability of `FITTED`."""
    useful_weight_range: tuple[float, float]
    """Smallest and largest weight of a useful row, in means over the useful ones."""


def draw_rows(args: TheoryArguments, seed: int) -> tuple[Rows, Rows]:
    """Validation rows and training rows. A query asks for a symbol by its place in the sequence."""
    generator = torch.Generator().manual_seed(seed)
    num_known = args.num_questions // 2
    symbols = torch.randint(args.num_symbols, (args.num_questions, args.sequence_length), generator=generator)
    places = torch.arange(args.num_questions) % args.sequence_length
    # Validation asks for even symbols only: of the others just the useful rows can tell
    asked = 2 * (torch.arange(args.num_questions) % (args.num_symbols // 2))
    asked[num_known:] += 1
    symbols[torch.arange(args.num_questions), places] = asked
    queries = args.num_symbols + places  # after the symbols in the vocabulary
    questions = torch.cat([symbols, queries[:, None]], dim=1)  # (Q, T + 1)
    answers = symbols.gather(1, places[:, None])[:, 0]  # the symbol itself
    shifts = 1 + torch.arange(args.num_useless).repeat_interleave(num_known)
    useless = (answers[:num_known].repeat(args.num_useless) + shifts) % args.num_symbols
    training = Rows(
        torch.cat([questions, questions[:num_known].repeat(args.num_useless, 1)]),
        torch.cat([answers, useless]),
        args.num_questions,
    )
    return Rows(questions[:num_known], answers[:num_known], num_known), training


class OneLayerTransformer(torch.nn.Module):
    """Attention of the last token over the sequence, with fixed embeddings: W_KQ and W_V are learned."""

    def __init__(self, args: TheoryArguments, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(1000 + seed)
        vocab_size = args.num_symbols + args.sequence_length
        num_tokens = args.sequence_length + 1
        # What a token is, and where: one-hot, next to each other
        self.dim = vocab_size + num_tokens
        self.where = torch.eye(num_tokens, dtype=torch.float64)
        self.what = torch.eye(vocab_size, dtype=torch.float64)
        init = {"generator": generator, "dtype": torch.float64}
        self.key_query = torch.nn.Parameter(0.1 * torch.randn(self.dim, self.dim, **init))
        self.value = torch.nn.Parameter(0.1 * torch.randn(self.dim, args.num_symbols, **init))

    def forward(self, questions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the answers, shape (N, symbols), of questions of shape (N, T + 1)."""
        where = self.where.expand(len(questions), -1, -1)
        tokens = torch.cat([self.what[questions], where], dim=-1)  # (N, T + 1, D)
        attention = (tokens @ self.key_query @ tokens[:, -1, :, None])[..., 0].softmax(-1)  # (N, T + 1)
        return ((attention[:, None] @ tokens)[:, 0] @ self.value).log_softmax(-1)


def solve(method: Method, args: TheoryArguments, seed: int, step_size: float) -> Course:
    """Alternate full steps of both levels: lambda L_val + (1 - lambda) (1/N) sum_i w_i l_i, and the weights."""
    validation, training = draw_rows(args, seed)
    model, value_model = OneLayerTransformer(args, seed), OneLayerTransformer(args, seed)
    logits = torch.zeros(len(training.answers), dtype=torch.float64)  # omega
    validation_losses, useless_weights = [], []
    for _ in range(args.num_steps):
        losses = row_losses(model, training)  # (N,)
        validation_loss = row_losses(model, validation).mean()
        weights = _weights(logits, method)  # (N,), mean 1
        lower_level = (weights * losses).mean()
        both = method.validation_weight * validation_loss + (1 - method.validation_weight) * lower_level
        descend(model, both, step_size)
        validation_losses.append(validation_loss.detach())
        useless_weights.append(weights[training.num_useful :].sum() / weights.sum())
        compared = losses.detach()
        if method.value_function is not None:
            value_losses = row_losses(value_model, training)
            value_weights = weights if method.value_function == "selected" else 2 * torch.sigmoid(-logits)
            descend(value_model, (value_weights * value_losses).mean(), step_size)
            compared = compared - value_losses.detach()
        if method.step == 0.0:
            logits = closed_form_log_weights(compared, temperature=1.0)
        elif method.step is not None:
            # Sigmoid weights of excess losses are each compared with 0, as in the package
            is_centered = method.value_function != "rejected"
            logits = mirror_descent_step(logits, logits, compared, method.step, is_centered)
    useful = (-losses[: training.num_useful]).exp() > FITTED
    useful_weights = weights[: training.num_useful] / weights[: training.num_useful].mean()
    return Course(
        torch.stack(validation_losses),
        torch.stack(useless_weights),
        useful.double().mean().item(),
        (useful_weights.min().item(), useful_weights.max().item()),
    )


def _weights(logits: torch.Tensor, method: Method) -> torch.Tensor:
    mass = torch.sigmoid(logits) if method.value_function == "rejected" else logits.softmax(0)
    return mass / mass.mean()


def row_losses(model: OneLayerTransformer, rows: Rows) -> torch.Tensor:
    """Negative log-likelihood of each answer, shape (N,), nats."""
    return torch.nn.functional.nll_loss(model(rows.questions), rows.answers, reduction="none")


def descend(model: OneLayerTransformer, loss: torch.Tensor, step_size: float) -> None:
    """One step of gradient descent."""
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter -= step_size * gradient


def steps_to(course: Course, epsilon: float) -> int | None:
    """The first step from which on the validation loss stays within `epsilon` of 0, `None` if it never does."""
    above = (course.validation_losses > epsilon).nonzero()
    first = int(above.max()) + 1 if len(above) else 0
    return first if first < len(course.validation_losses) else None


def main(args: TheoryArguments) -> None:
    """Print the table and draw the figure."""
    console = Console(width=160)
    courses: dict[tuple[str, float], list[Course]] = {}
    runs = [(name, size) for name in METHODS for size in args.step_sizes]
    for name, size in track(runs, description="Solving", console=console):
        courses[name, size] = [solve(METHODS[name], args, seed, size) for seed in args.seeds]
    table = Table(title=f"steps until the validation loss stays within epsilon of its optimum; seeds {args.seeds}")
    for column in ("method", "step size", *(f"epsilon {epsilon:g}" for epsilon in args.epsilons)):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    for column in ("validation loss at the end", "weight on useless rows", "useful weights", "coverage"):
        table.add_column(column, justify="right")
    for (name, size), per_seed in courses.items():
        steps = [_range([steps_to(course, epsilon) for course in per_seed]) for epsilon in args.epsilons]
        lowest = min(course.useful_weight_range[0] for course in per_seed)
        highest = max(course.useful_weight_range[1] for course in per_seed)
        table.add_row(
            name,
            f"{size:g}",
            *steps,
            f"{max(course.validation_losses[-1].item() for course in per_seed):.2g}",
            f"{max(course.useless_weight[-1].item() for course in per_seed):.2g}",
            f"{lowest:.2f} to {highest:.2f}",
            _range([course.coverage for course in per_seed]),
        )
    console.print(table)
    if args.figure is not None:
        draw(courses, args)


def _range(values: list[int] | list[float] | list[int | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "never" if not known else f"never for {len(values) - len(known)} of {len(values)}"
    low, high = (f"{value:,}" if isinstance(value, int) else f"{value:.2f}" for value in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


def draw(courses: dict[tuple[str, float], list[Course]], args: TheoryArguments) -> None:
    """Validation loss and the weight on useless rows, over the steps; a line per seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = dict(zip(sorted(args.step_sizes, reverse=True), ("-", "--", ":", "-."), strict=False))
    for (name, size), per_seed in courses.items():
        for number, course in enumerate(per_seed):
            label = f"{name}, step {size:g}" if number == 0 and size in (max(args.step_sizes),) else None
            style = {"color": _COLORS[name], "linestyle": styles[size], "linewidth": 1, "label": label}
            steps = range(1, args.num_steps + 1)
            axes[0].plot(steps, course.validation_losses, **style)
            axes[1].plot(steps, course.useless_weight, **style)
    axes[0].set(xscale="log", yscale="log", xlabel="step", ylabel="validation loss minus its optimum, nats")
    axes[1].set(xscale="log", xlabel="step", ylabel="share of the weight on useless rows", ylim=(0, None))
    axes[1].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    Path(str(args.figure)).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(args.figure), dpi=110)


if __name__ == "__main__":
    main(*TrlParser(TheoryArguments).parse_args_and_config())
