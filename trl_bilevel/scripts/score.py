r"""
`trl-bilevel score`: rank rows that were never trained on with the model of a finished run.

```bash
trl-bilevel score Qwen3-0.6B-BilevelSFT \
    --dataset_name corpus.jsonl \
    --output_dir scored
```

Writes Parquet files with the rows and their scores. Run it again after an interruption, and it goes on.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import TrlParser

from trl_bilevel.checkpoint_files import is_checkpoint
from trl_bilevel.command_line import make_command_parser


if TYPE_CHECKING:  # imported where it is used: `--help` must not load everything
    from trl_bilevel.run_settings import RunSettings


@dataclass
class ScoreArguments:
    """
    Arguments of the script.

    Args:
        run_dir (`str`): output folder, or a checkpoint, of a run; also the first argument without a name.
        dataset_name (`str`): the rows to score: a name on the Hub, a local folder or a file.
        dataset_config (`str`, *optional*): its configuration.
        dataset_split (`str`): its split, `train` by default.
        dataset_streaming (`bool`): read the rows as a stream, without a copy of them in the cache.
        output_dir (`str`): where the scored rows go.
        batch_size (`int`): rows per forward pass.
        chunk_size (`int`): rows per output file.
    """

    run_dir: str = field(default="", metadata={"help": "Output folder, or a checkpoint, of a run."})
    dataset_name: str = field(
        default="", metadata={"help": "The rows to score: a name on the Hub, a local folder or a file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read the rows as a stream."})
    output_dir: str = field(default="", metadata={"help": "Where the scored rows go."})
    batch_size: int = field(default=8, metadata={"help": "Rows per forward pass."})
    chunk_size: int = field(default=10_000, metadata={"help": "Rows per output file."})

    def __post_init__(self) -> None:
        for name in ("run_dir", "dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`--{name}` is missing.")


@dataclass
class BaseModelArguments:
    """
    How the run's model is loaded.

    Args:
        model_name_or_path (`str`, *optional*): base model of an adapter, where it is not where the run had it.
        model_revision (`str`, *optional*): its branch, tag or commit; by default the one that the run used.
        trust_remote_code (`bool`): run the code that comes with the base model.
        dtype (`str`, *optional*): of its parameters; that of the files by default.
        attn_implementation (`str`, *optional*): which attention is used.
        load_in_8bit (`bool`): quantize it to 8 bits.
        load_in_4bit (`bool`): quantize it to 4 bits.
        bnb_4bit_quant_type (`str`): type of the 4 bits, `"nf4"` or `"fp4"`.
        use_bnb_nested_quant (`bool`): quantize their constants too.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model of an adapter, where it is not where the run had it."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the base model; by default that of the run."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the base model."})
    dtype: str | None = field(default=None, metadata={"help": "Type of the parameters; that of the files by default."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Which attention is used."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the base model to 8 bits."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base model to 4 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Type of the 4 bits, 'nf4' or 'fp4'."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the constants of 4 bits too."})


_ADAPTER_FILE_NAME = "adapter_config.json"


def main(args: ScoreArguments, model_args: BaseModelArguments) -> None:
    from datasets import Dataset
    from pyarrow import parquet
    from trl import SFTConfig, SFTTrainer

    from trl_bilevel.amortized_selector import load_amortized_selector
    from trl_bilevel.dataset_loading import load_split
    from trl_bilevel.run_settings import read_run_settings
    from trl_bilevel.scoring import RowScorer, score_to_files
    from trl_bilevel.value_function import load_value_function

    settings = read_run_settings(args.run_dir)
    if settings.has_formatting_func:
        raise ValueError(
            f"The rows of {args.run_dir} were made by a `formatting_func`, which is not on disk. Score in the "
            "training script: `trainer.score(...)`."
        )
    dataset = load_split(args.dataset_name, args.dataset_config, args.dataset_split, streaming=args.dataset_streaming)
    first_rows = list(dataset.take(1))  # there is one
    model, tokenizer = _load_model(args.run_dir, model_args, settings)
    with tempfile.TemporaryDirectory() as scratch:
        # Prepares rows as the run did; it is never trained
        options = SFTConfig(scratch, **settings.row_options, bf16=False, gradient_checkpointing=None, report_to="none")
        options._n_gpu = min(1, options.n_gpu)  # one process, which has one GPU where there are several
        trainer = SFTTrainer(
            model,
            options,
            train_dataset=Dataset.from_list(first_rows, features=dataset.features),
            processing_class=tokenizer,
        )
        scorer = RowScorer(
            trainer,
            load_value_function(args.run_dir, trainer.model),
            load_amortized_selector(args.run_dir),
            args.batch_size,
        )
        files = score_to_files(scorer, dataset, args.output_dir, args.chunk_size)
    num_rows = sum(parquet.read_metadata(file).num_rows for file in files)
    print(f"{num_rows:,} scored rows in {args.output_dir}")


def _load_model(run_dir: str, model_args: BaseModelArguments, settings: "RunSettings") -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer
    from trl import ModelConfig, get_quantization_config
    from trl.trainer.utils import create_model_from_path

    from trl_bilevel.run_settings import read_base_model

    quantized = ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    options = {
        "dtype": model_args.dtype or "auto",
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(
            ModelConfig(dtype=model_args.dtype, **{name: getattr(model_args, name) for name in quantized})
        ),
    }
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"trust_remote_code": model_args.trust_remote_code, "device_map": None}  # the trainer moves it
    tokenizer = AutoTokenizer.from_pretrained(run_dir, trust_remote_code=model_args.trust_remote_code)
    adapter_dir, adapter_name = _find_adapter(Path(run_dir))
    if adapter_dir is None:
        for name in ("model_name_or_path", "model_revision"):
            if getattr(model_args, name) is not None:
                raise ValueError(
                    f"`--{name} {getattr(model_args, name)}` has no effect: {run_dir} holds a whole model and no "
                    "adapter. Leave it out."
                )
        return create_model_from_path(run_dir, **options), tokenizer  # of the class that the run had
    adapter = PeftConfig.from_pretrained(str(adapter_dir))
    name = model_args.model_name_or_path or read_base_model(run_dir, adapter.base_model_name_or_path)
    if model_args.model_revision is not None:
        options["revision"] = model_args.model_revision
    elif name == adapter.base_model_name_or_path and (adapter.revision or settings.model_revision) is not None:
        options["revision"] = adapter.revision or settings.model_revision
    try:
        base = create_model_from_path(name, **options)
    except OSError as error:
        raise ValueError(
            f"The base model {name!r} of {run_dir} cannot be loaded ({error}). Say where it is with "
            "`--model_name_or_path`."
        ) from error
    known = getattr(base.config.get_text_config(), "vocab_size", None)  # a model may have more embeddings than that
    if settings.vocab_size is not None and settings.vocab_size != known:
        base.resize_token_embeddings(settings.vocab_size)  # as the run had it
    return PeftModel.from_pretrained(base, str(adapter_dir), adapter_name=adapter_name), tokenizer


def _find_adapter(run_dir: Path) -> tuple[Path | None, str]:
    """Where a run's adapter is, and its name: PEFT writes one with a name of its own into a folder of that name."""
    if (run_dir / _ADAPTER_FILE_NAME).is_file():
        return run_dir, "default"
    named = sorted(path.parent for path in run_dir.glob(f"*/{_ADAPTER_FILE_NAME}") if not is_checkpoint(path.parent))
    if len(named) > 1:
        raise ValueError(
            f"{run_dir} holds the adapters {[path.name for path in named]}. Rows are scored with one: load the model "
            "in a script, with that adapter, and call `trainer.score(...)`."
        )
    return (named[0], named[0].name) if named else (None, "default")


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser((ScoreArguments, BaseModelArguments), __doc__, prog, "RUN_DIR")
