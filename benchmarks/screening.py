"""
What a screen finds in real text, over many draws of rows and trusted rows.

```bash
python benchmarks/screening.py --page docs/screening.md
python benchmarks/screening.py --faults "pipeline faults" --num_draws 100
```

One forward pass of SmolLM2-135M-Instruct gives the statistics of every row that a draw may take, kept in
`--output_dir` so that the second call needs none. A draw takes good rows, bad rows in equal parts of each kind, and
trusted rows, none of them twice. Conversations have the same statistics as prompts with their completions, see
`tests/test_screen.py`. Expects `--data_dir` with the published files that `docs/real_models.md` names.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import transformers
from datasets import Dataset, disable_progress_bars
from lib import beds
from lib.faults import EDITS, PIPELINE_FAULTS, SWAPPED
from lib.problem import GOOD
from lib.results import fill_in, markdown
from lib.sealed_faults import SEALED_FAULTS
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import SFTConfig, TrlParser

from trl_bilevel.demo.comparison import area_under_roc
from trl_bilevel.demo.pretrained_model import pretrained_model
from trl_bilevel.screening.answer_statistics import AnswerStatistics
from trl_bilevel.screening.calibration import calibrate
from trl_bilevel.screening.evidence import gather_evidence


@dataclass
class ScreeningArguments:
    """
    Options of the benchmark.

    Args:
        faults (`list[str]`): some of `POOLS`.
        bad_shares (`list[float]`): shares of bad rows, where they are planted.
        num_rows (`int`): rows of a draw.
        num_trusted (`list[int]`): trusted rows.
        num_draws (`int`): of each.
        data_dir (`str`): folder of the published files.
        output_dir (`str`): folder of the statistics.
        page (`str`, *optional*): Markdown file whose tables are written anew.
    """

    faults: list[str] = field(default_factory=lambda: [*POOLS])
    bad_shares: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.25, 0.5, 0.7])
    num_rows: int = 200
    num_trusted: list[int] = field(default_factory=lambda: [60, 200])
    num_draws: int = 20
    data_dir: str = "../shared/data"
    output_dir: str = "screening"
    page: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.faults) - set(POOLS)):
            raise ValueError(f"Unknown faults {unknown}. Known are {list(POOLS)}.")


class Pool(NamedTuple):
    """Rows that draws are taken from."""

    rows: Dataset
    """Columns `prompt` and `completion`, messages."""
    kinds: np.ndarray
    """What is wrong with each, shape (P,), str."""


_PROMPT_TOKENS, _ANSWER_TOKENS = 64, 128
_PER_KIND = 140


def _pool(rows: list[tuple[str, str, str]]) -> Pool:
    """Of questions, answers and kinds."""
    columns: dict[str, list[Any]] = {
        "prompt": [[{"role": "user", "content": question}] for question, _, _ in rows],
        "completion": [[{"role": "assistant", "content": answer}] for _, answer, _ in rows],
    }
    return Pool(Dataset.from_dict(columns), np.array([kind for _, _, kind in rows]))


def _short(rows: Any, tokenizer: Any) -> list[tuple[str, str, str]]:
    lengths = [[len(ids) for ids in tokenizer(texts)["input_ids"]] for texts in (rows.questions, rows.answers)]
    fits = np.flatnonzero([asked <= _PROMPT_TOKENS and said <= _ANSWER_TOKENS for asked, said in zip(*lengths)])
    return [(rows.questions[row], rows.answers[row], str(rows.kinds[row])) for row in fits]


def planted_pool(data_dir: Path, tokenizer: Any, kinds: tuple[str, ...]) -> Pool:
    """Instructions, and for each kind of fault some of them with it."""
    generator = np.random.default_rng(0)
    good = _short(beds.read_instructions(data_dir / "alpaca_en_1k.json"), tokenizer)
    rows = list(good)
    for kind in kinds:
        chosen = generator.permutation(len(good))[:_PER_KIND]
        for place, row in enumerate(chosen):
            question, answer, _ = good[row]
            other_question, other_answer, _ = good[chosen[place - 1]]
            if kind == SWAPPED:
                bad = other_answer
            elif kind in EDITS:
                bad = EDITS[kind](answer, generator)
            else:
                bad = SEALED_FAULTS[kind](answer, question, other_question, generator)
            rows.append((question, bad, kind))
    return _pool(rows)


def judged_pool(data_dir: Path, tokenizer: Any, name: str) -> Pool:
    """Rows whose faults were found, not planted."""
    rows = _short(beds.read_judged(data_dir / name), tokenizer)
    order = np.random.default_rng(0).permutation(len(rows))[:700]
    bad = [row for row in order if rows[row][2] != GOOD][:_PER_KIND]
    return _pool([rows[row] for row in [*(row for row in order if rows[row][2] == GOOD), *bad]])


def mixed_pool(data_dir: Path, tokenizer: Any, name: str) -> Pool:
    """Instructions, among rows of another task or with harmful requests that are complied with."""
    generator = np.random.default_rng(0)
    rows = _short(beds.read_instructions(data_dir / "alpaca_en_1k.json"), tokenizer)
    if name == beds.OFF_TASK:
        others = _short(beds.read_gsm8k(data_dir / "gsm8k_train.jsonl"), tokenizer)
    else:
        requests = _short(beds.read_instructions(data_dir / "safety_instructions.json"), tokenizer)
        others = [(question, beds.comply(question, generator), name) for question, _, _ in requests]
    chosen = generator.permutation(len(others))[:_PER_KIND]
    return _pool([*rows, *((others[row][0], others[row][1], name) for row in chosen)])


POOLS = {
    beds.PIPELINE: lambda data_dir, tokenizer: planted_pool(data_dir, tokenizer, PIPELINE_FAULTS),
    beds.ARITHMETIC: lambda data_dir, tokenizer: judged_pool(data_dir, tokenizer, "arithmetic_cot"),
    beds.HALLUCINATION: lambda data_dir, tokenizer: judged_pool(data_dir, tokenizer, "halueval_general"),
    beds.OFF_TASK: lambda data_dir, tokenizer: mixed_pool(data_dir, tokenizer, beds.OFF_TASK),
    beds.HARMFUL: lambda data_dir, tokenizer: mixed_pool(data_dir, tokenizer, beds.HARMFUL),
    "sealed": lambda data_dir, tokenizer: planted_pool(data_dir, tokenizer, tuple(SEALED_FAULTS)),
}
NATURAL_SHARES = {beds.ARITHMETIC: 0.13, beds.HALLUCINATION: 0.18, beds.OFF_TASK: 0.25, beds.HARMFUL: 0.25}


def statistics_of(name: str, args: ScreeningArguments) -> tuple[AnswerStatistics, np.ndarray]:
    """Statistics of a pool's rows, and their kinds; from the output folder where they are there."""
    path = Path(args.output_dir) / f"{name}.npz"
    if not path.is_file():
        from trl_bilevel.screening.row_screener import RowScreener
        from trl_bilevel.screening.screen import preparing_trainer

        model = str(pretrained_model())
        pool = POOLS[name](Path(args.data_dir), AutoTokenizer.from_pretrained(model))
        options = SFTConfig(args.output_dir, bf16=False, activation_checkpointing=False, report_to="none")
        trainer = preparing_trainer(model, pool.rows.select(range(8)), options, None, None, args.output_dir)
        found = RowScreener(trainer, 2048).statistics(pool.rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, kinds=pool.kinds, **found._asdict())
    with np.load(path) as saved:
        return AnswerStatistics(**{key: saved[key] for key in AnswerStatistics._fields}), saved["kinds"]


class Draw(NamedTuple):
    """What a screen found in one draw."""

    auroc: float
    loss_auroc: float
    """Of the base model's mean loss."""
    noise_error: float
    dropped: float
    dropped_good: float
    found: float
    """Share of the bad rows that are dropped."""
    by_kind: dict[str, float]


def draw(
    statistics: AnswerStatistics, kinds: np.ndarray, bad_share: float, num_rows: int, num_trusted: int, seed: int
) -> Draw:
    """One draw, screened."""
    generator = np.random.default_rng(seed)
    good = generator.permutation(np.flatnonzero(kinds == GOOD))
    names = sorted(set(kinds) - {GOOD})
    num_bad = round(bad_share * num_rows)
    bad = np.concatenate(
        [
            generator.permutation(np.flatnonzero(kinds == name))[: (num_bad + len(names) - 1 - place) // len(names)]
            for place, name in enumerate(names)
        ]
    ).astype(np.int64)
    # An answer that was swapped in is in no other row: it was taken away from there
    swapped = statistics.answer_hash[bad[kinds[bad] == SWAPPED]]
    good = good[~np.isin(statistics.answer_hash[good], swapped)]
    trusted, rows = good[:num_trusted], np.concatenate([good[num_trusted:][: num_rows - num_bad], bad])
    is_bad = kinds[rows] != GOOD
    evidence, of_trusted = gather_evidence(statistics.select(rows), statistics.select(trusted), seed)
    found = calibrate(evidence.score, of_trusted.score)
    some_bad = bool(is_bad.any())
    return Draw(
        auroc=area_under_roc(-evidence.score, ~is_bad) if some_bad else float("nan"),
        loss_auroc=area_under_roc(-statistics.loss[rows], ~is_bad) if some_bad else float("nan"),
        noise_error=found.noise_rate.estimate - is_bad.mean(),
        dropped=found.dropped.mean(),
        dropped_good=(~is_bad)[found.dropped].mean() if found.dropped.any() else 0.0,
        found=found.dropped[is_bad].mean() if some_bad else float("nan"),
        by_kind={
            name: area_under_roc(-evidence.score[some], ~is_bad[some])
            for name in names
            if (some := ~is_bad | (kinds[rows] == name)).sum() > (~is_bad).sum()
        },
    )


HEADER = [
    "faults",
    "bad rows",
    "trusted rows",
    "AUROC (lowest)",
    "of the mean loss",
    "noise rate: mean error",
    "mean absolute error",
    "rows dropped",
    "good among them",
    "bad rows found",
]


def table(name: str, args: ScreeningArguments) -> tuple[list[list[str]], dict[str, float]]:
    """A row for each share of bad rows and number of trusted rows, and the mean AUROC by kind."""
    statistics, kinds = statistics_of(name, args)
    lines: list[list[str]] = []
    by_kind: dict[str, list[float]] = defaultdict(list)
    shares = [NATURAL_SHARES[name]] if name in NATURAL_SHARES else args.bad_shares
    for num_trusted in args.num_trusted:
        for share in shares:
            draws = [
                draw(statistics, kinds, share, args.num_rows, num_trusted, seed) for seed in range(args.num_draws)
            ]
            mean = {
                key: float(np.mean([getattr(one, key) for one in draws])) for key in Draw._fields if key != "by_kind"
            }
            ranked = "-" if share == 0 else f"{mean['auroc']:.3f} ({min(one.auroc for one in draws):.3f})"
            lines.append(
                [
                    name,
                    f"{share:.0%}",
                    str(num_trusted),
                    ranked,
                    "-" if share == 0 else f"{mean['loss_auroc']:.3f}",
                    f"{mean['noise_error']:+.3f}",
                    f"{np.mean([abs(one.noise_error) for one in draws]):.3f}",
                    f"{mean['dropped']:.1%}",
                    f"{mean['dropped_good']:.3f}",
                    "-" if share == 0 else f"{mean['found']:.2f}",
                ]
            )
            for one in draws:
                for kind, auroc in one.by_kind.items():
                    by_kind[kind].append(auroc)
    return lines, {kind: float(np.mean(aurocs)) for kind, aurocs in by_kind.items()}


def main(args: ScreeningArguments) -> None:
    """Print a table for all faults, and one of the kinds of faults."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    console = Console(width=170)
    lines, kinds = [], []
    for name in args.faults:
        of_name, by_kind = table(name, args)
        lines += of_name
        kinds += [[name, kind, f"{auroc:.3f}"] for kind, auroc in by_kind.items()]
    for title, header, content in (
        (f"{args.num_rows} rows, means of {args.num_draws} draws", HEADER, lines),
        ("AUROC by kind of fault", ["faults", "kind", "AUROC"], kinds),
    ):
        printed = Table(*header, title=title)
        for line in content:
            printed.add_row(*line)
        console.print(printed)
    if args.page is not None:
        page = Path(args.page)
        tables = {"screening": markdown(HEADER, lines), "kinds": markdown(["faults", "kind", "AUROC"], kinds)}
        page.write_text(fill_in(page.read_text(), tables))


if __name__ == "__main__":
    main(*TrlParser(ScreeningArguments).parse_args_and_config())
