"""The card of a published curated dataset."""

import html
import json
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import Environment
from matplotlib.figure import Figure

from .citation import PAPER_CITATION, PAPER_ID
from .curation import CURATION_COLUMNS, SAMPLE_ID_COLUMN, rows_worst_first
from .dataset_sources import source_ids, source_text
from .parquet_files import column
from .refined_rows import ORIGINAL_COLUMN
from .report_rows import read_message
from .screening.verdict import summarize


CONFIGS = ("curated", "scores", "refined")
FIGURE_PATH = "assets/weights.png"
START_MARK = "<!-- trl-bilevel: start -->"
END_MARK = "<!-- trl-bilevel: end -->"
_NUM_EXAMPLES = 5
_LONGEST_EXAMPLE = 200  # characters; of a row, in all columns, twice as many
_SHORTEST_PART = 40  # of a column, where there are many
_SMALLEST_WEIGHT = 1e-6
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
SENSITIVE_TAG = "not-for-all-audiences"
_HASHED_CONFIG = re.compile(r".*-[0-9a-f]{16}")  # of `load_dataset(..., data_files=...)`
_FROM_RUN_ON = re.compile(re.escape(START_MARK) + ".*?" + re.escape(END_MARK) + "\n?", flags=re.DOTALL)


def build_card(
    scored: Dataset,
    num_kept: int,
    facts: dict[str, Any],
    repo_id: str,
    license: str | None,
    language: list[str] | None,
    sensitive: bool,
    old_card: DatasetCard | None,
    folder: Path,
) -> DatasetCard:
    """
    The card, with what its readers wrote by hand into the old one; draws its figure.

    Args:
        scored (`datasets.Dataset`): all N rows with their scores.
        num_kept (`int`): rows published.
        facts (`dict`): of the run, see [`~trl_bilevel.run_records.describe_run`].
        repo_id (`str`): of the dataset repository.
        license (`str`, *optional*): of the dataset.
        language (`list[str]`, *optional*): of its rows, ISO 639 codes.
        sensitive (`bool`): show no rows.
        old_card (`huggingface_hub.DatasetCard`, *optional*): the one on the Hub.
        folder (`pathlib.Path`): where the figure goes.
    """
    weights = column(scored, "weight")
    kept = column(scored, "rank") <= num_kept
    refined = column(scored, "response_source") == "refined"
    sensitive = sensitive or SENSITIVE_TAG in _tags(old_card)
    draw_weights(weights, kept, folder / FIGURE_PATH)
    training, validation = facts["training"], facts["validation"]
    metadata: dict[str, Any] = {
        "license": license,
        "language": language,
        "pretty_name": repo_id.split("/")[-1],
        "task_categories": ["text-generation"],
        "annotations_creators": ["machine-generated"],
        "size_categories": [size_category(num_kept)],
        "source_datasets": source_ids(training) or None,
        "tags": ["trl", "bilevel-sft", "data-curation", *(["synthetic"] if refined.any() else [])],
        "configs": _configs(scored, bool(refined.any())),
    }
    if sensitive:
        metadata["tags"].append(SENSITIVE_TAG)
    values = {
        "start_mark": START_MARK,
        "end_mark": END_MARK,
        "pretty_name": metadata["pretty_name"],
        "repo_id": repo_id,
        "split": split_name(scored),
        "num_rows": len(scored),
        "num_kept": int(kept.sum()),
        "num_refined": int((refined & kept).sum()),
        "has_refined": bool(refined.any()),
        "num_validation": validation["num_rows"],
        "source": source_text(training),
        "validation": source_text(validation),
        "figure": FIGURE_PATH,
        "stricter": _stricter_ratio(num_kept, len(scored)),
        "source_columns": [escape(name) for name in _source_columns(scored)],
        "paper_id": PAPER_ID,
        "citation": PAPER_CITATION,
        **_how_it_was_made(facts),
        "examples": {} if sensitive else _examples(scored, kept, refined),
    }
    template = resources.files("trl_bilevel").joinpath("cards/dataset_card.md.jinja").read_text(encoding="utf-8")
    ours = Environment(keep_trailing_newline=True, trim_blocks=True).from_string(template).render(values)
    return _merge(metadata, ours, old_card)


def _how_it_was_made(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "base_model": facts["base_model"],
        "method": facts["method"],
        "options": {name: option_cell(value) for name, value in facts["options"].items()},
        "versions": ", ".join(f"{name} {number}" for name, number in facts["packages"].items()),
        "requirements": " ".join(f"{name}=={number}" for name, number in facts["packages"].items()),
        "command": _command(facts),
        "fence": _fence(_command(facts)),
        "screening": summarize(facts["screening"]) if facts.get("screening") else [],
        "warning": facts.get("warning"),
        "subcommand": "screen" if facts["method"] == "Screen" else "sft",
    }


def _stricter_ratio(num_kept: int, num_rows: int) -> float:
    """
    A `keep_ratio` for half of the published rows, at least one; two digits are near enough not to ask for more.

    Example:

    ```python
    >>> _stricter_ratio(700, 1000), _stricter_ratio(1, 3), _stricter_ratio(2, 30_000)
    (0.35, 0.33, 3.3e-05)

    ```
    """
    return float(f"{max(1, num_kept // 2) / num_rows:.2g}")


def _tags(card: DatasetCard | None) -> list[str]:
    return [] if card is None else list(card.data.to_dict().get("tags") or [])


def _merge(metadata: dict[str, Any], ours: str, old_card: DatasetCard | None) -> DatasetCard:
    """Our part and our keys written anew, all else as it was."""
    text = ours
    if old_card is not None:
        found = old_card.data.to_dict()
        # What the rows decide is ours; the rest is a proposal, and whoever corrected it is right
        anew = {
            "size_categories": metadata["size_categories"],
            "tags": [*dict.fromkeys([*_tags(old_card), *metadata["tags"]])],
            "configs": _merge_configs(found.get("configs") or [], metadata["configs"]),
        }
        metadata = {**metadata, **found, **anew}
        if START_MARK in old_card.text and END_MARK not in old_card.text:
            raise ValueError(
                f"The card on the Hub has the mark `{START_MARK}` but no `{END_MARK}`, so that nobody can tell what "
                "was written by hand. Put the second one back where your own text starts, or remove the first."
            )
        if START_MARK in old_card.text:
            text = _FROM_RUN_ON.sub(lambda _: ours, old_card.text, count=1)
        else:
            text = f"{old_card.text.rstrip()}\n\n{ours}" if old_card.text.strip() else ours
    data = DatasetCardData(**{name: value for name, value in metadata.items() if value is not None})
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text.lstrip()}")


def _merge_configs(found: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours, with the splits that other runs published, then those of others, whose default stays the default."""
    published = {entry["split"] for config in ours for entry in config["data_files"]}
    new, old = ({config["config_name"]: config for config in configs} for configs in (ours, found))
    merged = []
    for name in CONFIGS:
        entries = [entry for entry in old.get(name, {}).get("data_files") or [] if isinstance(entry, dict)]
        splits = {entry["split"]: entry for entry in entries}
        if name in new:
            splits |= {entry["split"]: entry for entry in new[name]["data_files"]}
        else:  # a split without refined rows says nothing of the others
            splits = {split: entry for split, entry in splits.items() if split not in published}
        if splits:
            merged.append({**(new[name] if name in new else old[name]), "data_files": list(splits.values())})
    others = [other for other in found if other["config_name"] not in CONFIGS]
    if any(other.get("default") or other["config_name"] == "default" for other in others):
        for config in merged:  # with two of them nothing in the repository could be loaded
            config.pop("default", None)
    return merged + others


def _configs(scored: Dataset, has_refined: bool) -> list[dict[str, Any]]:
    split = split_name(scored)
    configs = []
    for name in CONFIGS if has_refined else CONFIGS[:-1]:
        config: dict[str, Any] = {"config_name": name}
        if name == "curated":
            config["default"] = True
        configs.append({**config, "data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"}]})
    return configs


def _source_columns(scored: Dataset) -> list[str]:
    return [name for name in scored.column_names if name not in (SAMPLE_ID_COLUMN, *CURATION_COLUMNS)]


def split_name(dataset: Dataset) -> str:
    """The split that a dataset is of; `train` if it does not say, or of a part of one."""
    name = str(dataset.split) if dataset.split else "train"
    return name if name.isidentifier() else "train"


def size_category(num_rows: int) -> str:
    """
    The Hub's name for a number of rows.

    Example:

    ```python
    >>> size_category(999), size_category(1000), size_category(25_000_000)
    ('n<1K', '1K<n<10K', '10M<n<100M')

    ```
    """
    return next((name for limit, name in _SIZES if num_rows < limit), "10M<n<100M")


def _command(facts: dict[str, Any]) -> str:
    options = {name: value for name, value in facts["options"].items() if value is not None}
    split = "dataset_split" if facts["method"] == "Screen" else "dataset_train_split"
    named = {
        "model_name_or_path": [name or "MODEL" for name in (facts["base_model"], *facts.get("other_models", ()))],
        **_dataset_options(facts["training"], "dataset", split, "TRAINING_ROWS"),
        **_dataset_options(facts["validation"], "validation_dataset", "validation_dataset_split", "TRUSTED_ROWS"),
        "output_dir": "out",
        **facts["model_options"],
        **options,
    }
    written = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in named.items()}
    words = {name: value if isinstance(value, list) else [value] for name, value in written.items()}
    return " \\\n".join(f"    --{name} {shlex.join(map(str, values))}" for name, values in words.items())


def _dataset_options(description: dict[str, Any], prefix: str, split_option: str, placeholder: str) -> dict[str, Any]:
    """Options that load a described dataset again; a placeholder if it is not one repository's."""
    split = description["split"]
    sources = description["sources"]
    is_whole = (
        len(sources) == 1
        and not description["has_other_rows"]
        and not description.get("has_unnamed_source")
        and not description.get("is_derived")
        and (split is None or split.isidentifier())
    )
    if not is_whole or _HASHED_CONFIG.fullmatch(sources[0]["config"]):
        return {f"{prefix}_name": placeholder}
    (source,) = sources
    options = {f"{prefix}_name": source["id"]}
    if source["config"] != "default":
        options[f"{prefix}_config"] = source["config"]
    if split not in (None, "train"):
        options[split_option] = split
    return options


def escape(text: str, longest: int = _LONGEST_EXAMPLE) -> str:
    """
    Text of a row as one cell of a Markdown table: shortened, and nothing in it is markup.

    Example:

    ```python
    >>> escape("a|b\\n<script>")
    'a&#124;b &#60;script&#62;'

    ```
    """
    text = " ".join(text.split())
    text = text if len(text) <= longest else f"{text[:longest]}…"
    return "".join(
        character if character.isalnum() or character in " .,…" or ord(character) > 127 else f"&#{ord(character)};"
        for character in html.unescape(text)
        if character.isprintable()
    )


def option_cell(value: Any) -> str:
    """
    The value of an option as one cell of a Markdown table.

    Example:

    ```python
    >>> option_cell(0.5), option_cell("a|b")
    ('`0.5`', '<code>a&#124;b</code>')

    ```
    """
    text = str(value)
    return f"`{text}`" if text.isprintable() and not {"|", "`"} & set(text) else f"<code>{escape(text)}</code>"


def _fence(code: str) -> str:
    """What code begins and ends with in Markdown: more backticks than it has itself."""
    return "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", code)), default=0))


def _examples(scored: Dataset, kept: np.ndarray, refined: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    worst_first = rows_worst_first(scored)
    groups = {
        "Kept, of the highest weight": np.argsort(column(scored, "rank"))[:_NUM_EXAMPLES],
        "Dropped, of the lowest weight": worst_first[~kept[worst_first]][:_NUM_EXAMPLES],
        "Regenerated, and the answers they replaced": np.flatnonzero(refined)[:_NUM_EXAMPLES],
    }
    columns = _source_columns(scored)
    examples: dict[str, list[dict[str, Any]]] = {}
    for title, indices in groups.items():
        examples[title] = []
        for row in scored.select(indices):
            cell = {"weight": row["weight"], "text": _example([row[name] for name in columns])}
            if title.startswith("Regenerated"):
                cell["original"] = escape(_plain(row[ORIGINAL_COLUMN]))
            examples[title].append(cell)
    return examples


def _example(values: list[Any]) -> str:
    """Each column, and question and answer of a conversation, cut by itself: a long question hides no answer."""
    longest = max(_SHORTEST_PART, 2 * _LONGEST_EXAMPLE // len(values))
    parts = []
    for value in values:
        if isinstance(value, list) and len(value) > 1 and isinstance(value[0], dict):
            question, answer = (escape(_plain([message]), longest // 2) for message in value[-2:])
            parts += [*["…"] * (len(value) > 2), question, answer]
        else:
            parts.append(escape(_plain(value), longest))
    return " / ".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return " / ".join(": ".join(read_message(entry) or [str(entry)]) for entry in value)
    return "" if value is None else str(value)


def draw_weights(weights: np.ndarray, kept: np.ndarray, path: Path) -> None:
    """
    Draw how the weights of kept and dropped rows spread, and save it as a PNG.

    Args:
        weights (`numpy.ndarray`): shape (N,), mean 1.
        kept (`numpy.ndarray`): bool, shape (N,).
        path (`pathlib.Path`): file to write.
    """
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    logarithms = np.log10(np.clip(weights.astype(np.float64), _SMALLEST_WEIGHT, None))
    bins = np.linspace(logarithms.min() - 1e-9, logarithms.max() + 1e-9, 50).tolist()
    for rows, label, color in ((kept, "kept", "#2a78b5"), (~kept, "dropped", "#d1495b")):
        axes.hist(logarithms[rows], bins=bins, label=f"{label} ({rows.sum():,} rows)", color=color, alpha=0.6)
    axes.xaxis.set_major_formatter(lambda logarithm, _: f"{10**logarithm:.2g}")
    axes.set(xlabel="learned weight of a row (mean 1)", ylabel="rows")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and version that would make every push a new file
    figure.savefig(path, dpi=100, metadata={"Software": None})
