"""Options of the benchmark on real models, the rows they ask for, and the files that results are in."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from trl import ModelConfig

from trl_bilevel.dataset_loading import load_split
from trl_bilevel.whole_files import write_whole


@dataclass
class RealModelConfig(ModelConfig):
    """TRL's model options, with the adapter of the paper: LoRA of rank 16 and alpha 16 on queries and values."""

    model_name_or_path: str | None = "Qwen/Qwen3-0.6B"
    dtype: str | None = "bfloat16"
    use_peft: bool = True
    lora_alpha: int = 16
    lora_target_modules: list[str] | None = field(default_factory=lambda: ["q_proj", "v_proj"])


SETTINGS: dict[str, dict[str, Any]] = {
    "quality": {
        "train_dataset_name": "yahma/alpaca-cleaned",
        "trusted_dataset_name": "Open-Orca/OpenOrca",
    },
    "safety": {
        "train_dataset_name": "Open-Orca/OpenOrca",
        "trusted_dataset_name": "Open-Orca/OpenOrca",
        "harmful_dataset_name": "PKU-Alignment/BeaverTails",
        "harmful_split": "30k_train",
        "label_column": "is_safe",
        "harmful_label": "false",
    },
}
"""
What the two settings fill in where an option is not given. RedOrca and BlueOrca are files of the SEAL repository and
not on the Hub as far as we know, so that `safety` mixes its rows as they were mixed.
"""


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark. A dataset is a name on the Hub, a local folder or a file.

    Args:
        setting (`str`): `quality` (alpaca-cleaned, OpenOrca trusted) or `safety` (OpenOrca with harmful answers, safe
            answers and OpenOrca trusted).
        output_dir (`str`): folder for results, answers and rankings.
        methods (`list[str]`): some of `METHODS`, by default all; what they build on is run too.
        seeds (`list[int]`): seeds of rows, adapters and training.
        train_dataset_name, train_split (`str`): rows of mixed quality.
        trusted_dataset_name, trusted_split (`str`): where trusted and held-out rows are drawn from.
        harmful_dataset_name, harmful_split (`str`): labelled rows; the harmful ones join the training rows, the others
            the trusted and held-out rows. Empty in `quality`.
        harmful_ratio (`float`): share of harmful rows among the training rows, where they join.
        label_column (`str`): column that says which rows are harmful; also of the training rows, if they have it.
        harmful_label (`str`): its value for harmful rows, in lower case.
        streaming (`bool`): read the first rows of a dataset, shuffled by `shuffle_buffer`, not all of it.
        shuffle_buffer (`int`): rows.
        num_train_rows, num_trusted_rows, num_held_out_rows (`int`): rows.
        num_judged_rows (`int`): of the held-out rows, those that are answered and judged.
        max_question_characters (`int`): longer questions are left out.
        keep_ratio (`float`): share of the training rows that count as kept.
        num_train_epochs (`int`): over the training rows; all methods take as many steps.
        max_steps (`int`): instead of epochs, if larger than 0.
        per_device_train_batch_size, gradient_accumulation_steps (`int`): 32 rows a step together, as in the paper.
        learning_rate (`float`): of all methods, the paper's.
        max_length (`int`): tokens of a row.
        optim (`str`): as in `transformers`.
        refine_ratio (`float`), refine_max_new_tokens (`int`): of the refined method.
        chat_template_path (`str`, *optional*): for a model without a template: a tokenizer to clone it from, by TRL.
        generation_batch_size (`int`): prompts per call of `generate`, also rows per forward pass of the losses.
        max_new_tokens (`int`): longest answer.
        judge_model (`str`): any chat model, or empty for no win rates.
        judge_load_in_4bit (`bool`): quantize the judge.
        judge_batch_size, judge_max_new_tokens (`int`): of its replies.
        use_cpu (`bool`): no GPU, fp32 unless quantized.
    """

    setting: str = "quality"
    output_dir: str = "real_models"
    methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    train_dataset_name: str | None = None
    train_split: str = "train"
    trusted_dataset_name: str | None = None
    trusted_split: str = "train"
    harmful_dataset_name: str | None = None
    harmful_split: str | None = None
    harmful_ratio: float = 0.2
    label_column: str | None = None
    harmful_label: str | None = None
    streaming: bool = True
    shuffle_buffer: int = 20_000
    num_train_rows: int = 20_000
    num_trusted_rows: int = 2_000
    num_held_out_rows: int = 500
    num_judged_rows: int = 200
    max_question_characters: int = 2_000
    keep_ratio: float = 0.7
    num_train_epochs: int = 2
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    learning_rate: float = 5e-6
    max_length: int = 1024
    optim: str = "adamw_torch"
    refine_ratio: float = 0.1
    refine_max_new_tokens: int = 256
    chat_template_path: str | None = None
    generation_batch_size: int = 32
    max_new_tokens: int = 256
    judge_model: str = "Qwen/Qwen3-8B"
    judge_load_in_4bit: bool = False
    judge_batch_size: int = 16
    judge_max_new_tokens: int = 32
    use_cpu: bool = False

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise ValueError(f"`setting` must be one of {list(SETTINGS)}, got {self.setting!r}.")
        for name, value in SETTINGS[self.setting].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not 0 < self.keep_ratio < 1:
            raise ValueError(f"`keep_ratio` must be larger than 0 and less than 1, got {self.keep_ratio}.")
        if not 0 < self.harmful_ratio < 1:
            raise ValueError(f"`harmful_ratio` must be larger than 0 and less than 1, got {self.harmful_ratio}.")
        if self.num_judged_rows > self.num_held_out_rows:
            raise ValueError(
                f"`num_judged_rows={self.num_judged_rows}` must be at most `num_held_out_rows`, "
                f"{self.num_held_out_rows}: they are some of them."
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of every method."""
        rows_per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return (
            self.max_steps if self.max_steps > 0 else self.num_train_epochs * -(-self.num_train_rows // rows_per_step)
        )


# ---- Rows ----
class Problem(NamedTuple):
    """
    Datasets of conversations with the columns `prompt`, `completion` and `chat_template_kwargs`; no question is in two
    of them.
    """

    training: Dataset
    """N rows of mixed quality, also with the column `harmful`: bool, or null where nothing says."""
    trusted: Dataset
    """Validation rows."""
    held_out: Dataset
    """Rows as the trusted ones."""

    @property
    def harmful(self) -> np.ndarray | None:
        """Bool, shape (N,), `None` if nothing says."""
        labels = self.training["harmful"][:]
        return None if None in labels else np.array(labels)


TEMPLATE_OPTIONS = {"enable_thinking": False}
"""Of the chat template, in training and for answers: the rows have no thoughts."""


class _Source:
    """The rows of one dataset, each given out once, and a question to one part of the problem only."""

    def __init__(self, name: str, split: str, args: BenchmarkArguments, seed: int, part_of_question: dict[str, str]):
        self.name, self.args, self.part_of_question = name, args, part_of_question
        try:
            rows = load_split(name, None, split, streaming=args.streaming)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The dataset {name!r} cannot be loaded. Log in if it is gated, or name another one or a local file "
                f"by `train_dataset_name`, `trusted_dataset_name` or `harmful_dataset_name`. {error}"
            ) from error
        is_stream = not isinstance(rows, Dataset)
        shuffled = rows.shuffle(seed=seed, buffer_size=args.shuffle_buffer) if is_stream else rows.shuffle(seed=seed)
        self.rows: Iterator[dict[str, Any]] = iter(shuffled)
        self.passed_over: list[dict[str, Any]] = []

    def take(self, count: int, part: str, harmful: bool | None = None) -> list[dict[str, Any]]:
        """
        The next rows for a part of the problem, only those with this label unless it is `None`; the others stay for
        later calls. Rows to a question of another part are left out: datasets have several answers to one.
        """
        waiting, self.passed_over = iter(self.passed_over), []
        taken: list[dict[str, Any]] = []
        candidates = chain(waiting, self._usable())
        while len(taken) < count and (row := next(candidates, None)) is not None:
            question = row["prompt"][-1]["content"].strip().lower()
            if harmful is not None and row["harmful"] != harmful:
                self.passed_over.append(row)
            elif self.part_of_question.setdefault(question, part) == part:
                taken.append(row)
        self.passed_over += waiting
        if len(taken) < count:
            kind = "" if harmful is None else " harmful" if harmful else " harmless"
            raise ValueError(
                f"{count}{kind} rows were asked of {self.name!r}, and {len(taken)} were left. Lower "
                "`num_train_rows`, `num_trusted_rows` or `num_held_out_rows`."
            )
        return taken

    def _usable(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            question, answer = question_and_answer(row, self.name)
            if question.strip() and answer.strip() and len(question) <= self.args.max_question_characters:
                prompt = [{"role": "user", "content": question}]
                completion = [{"role": "assistant", "content": answer}]
                label = self._label(row)
                options = {"chat_template_kwargs": TEMPLATE_OPTIONS}
                yield {"prompt": prompt, "completion": completion, "harmful": label, **options}

    def _label(self, row: dict[str, Any]) -> bool | None:
        column = self.args.label_column
        return str(row[column]).lower() == self.args.harmful_label if column in row else None


def question_and_answer(row: dict[str, Any], name: str) -> tuple[str, str]:
    """
    Of a row in any of the formats that such datasets come in: OpenOrca's, Alpaca's, prompts with a completion or
    response, conversations. A system prompt is left out, as the public codes leave it out.

    Raises:
        `ValueError`: for another format.
    """
    if "instruction" in row and "output" in row:
        return "\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
    for question in ("question", "prompt"):
        for answer in ("response", "completion", "answer"):
            if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
                return row[question], row[answer]
    messages = (
        row.get("messages") or row.get("conversations") or [*_listed(row, "prompt"), *_listed(row, "completion")]
    )
    turns = [(m.get("role") or m.get("from"), m.get("content") or m.get("value") or "") for m in messages]
    turns = [text for role, text in turns if role != "system"]
    if len(turns) >= 2:
        return turns[0], turns[1]
    raise ValueError(
        f"The rows of {name!r} have the columns {sorted(row)}. Use rows with `question` and `response`, `instruction` "
        "and `output`, `prompt` and `completion`, or `messages`."
    )


def _listed(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    return row[column] if isinstance(row.get(column), list) else []


def build_problem(args: BenchmarkArguments, seed: int) -> Problem:
    """Draw the rows; a dataset that several parts come from gives each of its rows once, and no question twice."""
    sources: dict[tuple[str, str], _Source] = {}
    part_of_question: dict[str, str] = {}

    def source(name: str, split: str) -> _Source:
        if (name, split) not in sources:
            sources[name, split] = _Source(name, split, args, seed, part_of_question)
        return sources[name, split]

    train, trusted = (
        source(args.train_dataset_name, args.train_split),
        source(args.trusted_dataset_name, args.trusted_split),
    )
    num_harmful = round(args.harmful_ratio * args.num_train_rows) if args.harmful_dataset_name else 0
    training = train.take(args.num_train_rows - num_harmful, "training")
    held = {"trusted": args.num_trusted_rows, "held_out": args.num_held_out_rows}
    if not args.harmful_dataset_name:
        parts = {part: trusted.take(count, part) for part, count in held.items()}
    else:
        labelled = source(args.harmful_dataset_name, args.harmful_split or "train")
        if train is not labelled:
            training = [{**row, "harmful": bool(row["harmful"])} for row in training]
        training += labelled.take(num_harmful, "training", harmful=True)
        parts = {
            part: trusted.take(count - count // 2, part) + labelled.take(count // 2, part, harmful=False)
            for part, count in held.items()
        }
    rows = {part: Dataset.from_list(of_part).remove_columns("harmful") for part, of_part in parts.items()}
    order = np.random.default_rng(seed).permutation(len(rows["held_out"]))  # judged are the first of them
    return Problem(Dataset.from_list(training), rows["trusted"], rows["held_out"].select(order))


def kept_rows(problem: Problem, scores: np.ndarray, keep_ratio: float) -> np.ndarray:
    """Positions of the best rows, in order."""
    return np.sort(np.argsort(-scores, kind="stable")[: round(keep_ratio * len(problem.training))])


def kept_and_trusted(problem: Problem, scores: np.ndarray, keep_ratio: float) -> Dataset:
    kept = problem.training.select(kept_rows(problem, scores, keep_ratio)).remove_columns("harmful")
    return concatenate_datasets([kept, problem.trusted])


# ---- Files ----
class SeedFiles(NamedTuple):
    """Where what a seed found is; each file is there whole or not at all."""

    folder: Path

    def result(self, method: str) -> Path:
        return self.folder / f"{_file_name(method)}.json"

    def scores(self, method: str) -> Path:
        """The method's ranking of the training rows, shape (N,), higher is better."""
        return self.folder / f"{_file_name(method)}.npy"

    def answers(self, method: str) -> Path:
        """Questions and the method's answers."""
        return self.folder / f"{_file_name(method)}, answers.json"

    def judged(self, method: str, args: BenchmarkArguments) -> Path:
        """Of one judge, and the options that its verdicts depend on."""
        judge = args.judge_model.strip("/").replace("/", "+")
        bits = ", 4 bits" if args.judge_load_in_4bit else ""
        return self.folder / f"{_file_name(method)}, judged by {judge}{bits}, {args.judge_max_new_tokens} tokens.json"


def _file_name(method: str) -> str:
    return method.replace(":", ",")


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1)
    write_whole(path, lambda partial: partial.write_text(text))


_FREE = ("output_dir", "methods", "seeds", "generation_batch_size", "judge_model", "judge_load_in_4bit",
         "judge_batch_size", "judge_max_new_tokens")  # fmt: skip


def write_settings(args: BenchmarkArguments, model_args: ModelConfig) -> None:
    """Write the options that decide what results mean."""
    path = Path(args.output_dir) / "settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _deciding(args, model_args))


def _deciding(args: BenchmarkArguments, model_args: ModelConfig) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(args).items() if name not in _FREE}
    return settings | {f"model: {name}": value for name, value in asdict(model_args).items()}


def check_same_settings(args: BenchmarkArguments, model_args: ModelConfig) -> None:
    """
    A call must have the options of the earlier ones in the folder.

    Raises:
        `ValueError`: if the folder holds results of others.
    """
    path = Path(args.output_dir) / "settings.json"
    if not path.is_file():
        return
    earlier = json.loads(path.read_text())
    current = json.loads(json.dumps(_deciding(args, model_args), default=str))
    if changed := sorted(name for name in {*earlier, *current} if earlier.get(name) != current.get(name)):
        differences = ", ".join(f"{name}: {earlier.get(name)} there, {current.get(name)} here" for name in changed)
        raise ValueError(
            f"{args.output_dir} has results of other settings ({differences}). Name another `output_dir`."
        )
