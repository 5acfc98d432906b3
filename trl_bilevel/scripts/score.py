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
from typing import Any

from trl import ModelConfig, TrlParser

from trl_bilevel.command_line import make_command_parser


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


def main(args: ScoreArguments, model_args: ModelConfig) -> None:
    from datasets import Dataset
    from pyarrow import parquet
    from trl import SFTConfig, SFTTrainer, get_quantization_config

    from trl_bilevel.amortized_selector import load_amortized_selector
    from trl_bilevel.dataset_loading import load_split
    from trl_bilevel.run_settings import read_row_options
    from trl_bilevel.scoring import RowScorer, score_to_files
    from trl_bilevel.value_function import load_value_function

    row_options = read_row_options(args.run_dir)
    dataset = load_split(args.dataset_name, args.dataset_config, args.dataset_split, streaming=args.dataset_streaming)
    first_rows = list(dataset.take(1))
    if not first_rows:
        raise ValueError(f"The dataset {args.dataset_name} is empty, so there is nothing to score.")
    model, tokenizer = _load_model(args.run_dir, model_args, get_quantization_config(model_args))
    with tempfile.TemporaryDirectory() as scratch:
        # Prepares rows as the run did; it is never trained
        trainer = SFTTrainer(
            model,
            SFTConfig(scratch, **row_options, bf16=False, gradient_checkpointing=None, report_to="none"),
            train_dataset=Dataset.from_list(first_rows),
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


def _load_model(run_dir: str, model_args: ModelConfig, quantization_config: Any) -> tuple[Any, Any]:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": quantization_config,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if not (Path(run_dir) / "adapter_config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(run_dir, **options)
    elif model_args.model_name_or_path is not None:
        base = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **options)
        model = PeftModel.from_pretrained(base, run_dir)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(run_dir, **options)
    return model, AutoTokenizer.from_pretrained(run_dir)


def make_parser(prog: str | None = None) -> TrlParser:
    return make_command_parser((ScoreArguments, ModelConfig), __doc__, prog, "RUN_DIR")
