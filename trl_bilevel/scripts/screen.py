r"""
`trl-bilevel screen`: find the bad rows of a dataset by one forward pass, before anybody trains.

```bash
trl-bilevel screen \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name mixture.jsonl \
    --validation_dataset_name trusted.jsonl \
    --output_dir screened
```

Writes `scored/train.parquet`, all rows with their scores, and `curated/train.parquet`, those to keep. Run it again
after an interruption, and it goes on. The model should not have learned the trusted rows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl import TrlParser

from trl_bilevel.command_line import make_command_parser
from trl_bilevel.curation import parse_keep_ratio


if TYPE_CHECKING:  # imported where it is used: `--help` must not load everything
    from trl_bilevel.screening.screen import Screening


_NUM_SHOWN = 5
_LONGEST_CELL = 60


@dataclass
class ScreenArguments:
    """
    Arguments of the script.

    Args:
        model_name_or_path (`list[str]`): the model that reads the rows: a name on the Hub or a folder, of an adapter
            too. Of several the evidence is added up.
        dataset_name (`str`): the rows to screen: a name on the Hub, a local folder or a file.
        validation_dataset_name (`str`): the rows you trust, likewise.
        output_dir (`str`): where the scored rows go.
        keep_ratio (`str`): which rows are kept: `auto`, all but those of which at most a tenth is good on average; or
            a share in (0, 1].
        dataset_config, validation_dataset_config (`str`, *optional*): configurations of the datasets.
        dataset_split, validation_dataset_split (`str`): their splits, `train` by default.
        dataset_streaming (`bool`): read the rows as a stream, without a copy of them in the cache.
        dataset_text_field (`str`): column of the text, for rows of text.
        max_length (`int`): tokens of a row; what is longer is cut.
        model_revision (`str`, *optional*): branch, tag or commit of the model.
        trust_remote_code (`bool`): run the code that comes with the model.
        dtype (`str`): of its parameters; that of its files by default.
        load_in_4bit (`bool`): quantize it to 4 bits.
        tokens_per_batch (`int`): of a forward pass, padding included.
        use_cpu (`bool`): whether to leave a GPU alone.
    """

    model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "The model that reads the rows: a name or folder; or several."}
    )
    dataset_name: str = field(
        default="", metadata={"help": "The rows to screen: a name on the Hub, a local folder or a file."}
    )
    validation_dataset_name: str = field(default="", metadata={"help": "The rows you trust, likewise."})
    output_dir: str = field(default="", metadata={"help": "Where the scored rows go."})
    keep_ratio: str = field(
        default="auto",
        metadata={"help": "Rows to keep: 'auto', all but those of which at most a tenth is good; or a share."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    validation_dataset_config: str | None = field(default=None, metadata={"help": "That of the trusted rows."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    validation_dataset_split: str = field(default="train", metadata={"help": "Split of the trusted rows."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read the rows as a stream."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column of the text, for rows of text."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a row; what is longer is cut."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    dtype: str = field(default="auto", metadata={"help": "Type of the parameters; that of the files by default."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the model to 4 bits."})
    tokens_per_batch: int = field(default=4096, metadata={"help": "Tokens of a forward pass, padding included."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave a GPU alone."})

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "dataset_name", "validation_dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`--{name}` is missing.")
        parse_keep_ratio(self.keep_ratio)


def main(args: ScreenArguments) -> None:
    import transformers
    from accelerate import PartialState
    from transformers import AutoTokenizer
    from trl import ModelConfig, SFTConfig, get_quantization_config

    from trl_bilevel.dataset_loading import load_split
    from trl_bilevel.parquet_files import write_parquet
    from trl_bilevel.screening.screen import SCREENED_FILE_NAME, screen_dataset

    rows = load_split(args.dataset_name, args.dataset_config, args.dataset_split, streaming=args.dataset_streaming)
    trusted = load_split(args.validation_dataset_name, args.validation_dataset_config, args.validation_dataset_split)
    transformers.logging.disable_progress_bar()
    origin = {"revision": args.model_revision or "main", "trust_remote_code": args.trust_remote_code}
    folder = Path(args.output_dir)
    options = SFTConfig(
        str(folder),
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        max_length=args.max_length,
        dataset_text_field=args.dataset_text_field,
        use_cpu=args.use_cpu,
        model_init_kwargs={
            "dtype": args.dtype,
            "quantization_config": get_quantization_config(ModelConfig(load_in_4bit=args.load_in_4bit)),
            **origin,
        },
    )
    screening = screen_dataset(
        args.model_name_or_path,
        rows,
        trusted,
        options,
        processing_class=[AutoTokenizer.from_pretrained(name, **origin) for name in args.model_name_or_path],
        output_dir=folder,
        tokens_per_batch=args.tokens_per_batch,
    )
    if not PartialState().is_main_process:
        return
    print(screening.summary())
    _print_worst(screening)
    num_kept = write_parquet(screening.curate(parse_keep_ratio(args.keep_ratio)), folder / "curated" / "train.parquet")
    print(f"📋 Scored rows: {folder / SCREENED_FILE_NAME}")
    print(f"🧹 {num_kept:,} rows kept: {folder / 'curated' / 'train.parquet'}")


def _print_worst(screening: "Screening") -> None:
    """The rows that rank last, and why."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from trl_bilevel.report_rows import plain_text

    table = Table(title="The rows that rank last", title_justify="left")
    for name in ("row", "probability that it is good", "reason"):
        table.add_column(name)
    for number in np.argsort(-np.array(screening.scored["rank"]))[:_NUM_SHOWN]:
        row = screening.scored[int(number)]
        good = row["good_probability"]
        table.add_row(
            plain_text(str(row["sample_id"]))[0][:_LONGEST_CELL],
            "-" if np.isnan(good) else f"{good:.2f}",
            row["screen_reason"] or "-",
        )
    Console().print(table)


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser(ScreenArguments, __doc__, prog)
