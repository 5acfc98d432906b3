"""
What a refresh costs beside one bare call of `generate` over the same prompts.

```bash
python benchmarks/refinement_speed.py
```

A refresh sorts the questions by length, generates in batches, computes the log-probabilities of the responses by the
training forward, judges and stores them. Pairs of both are measured one after the other; the ratio is of their times.
"""

import logging
import os
import statistics
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from trl import TrlParser
from trl.trainer.utils import pad

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.planted_faults import build_tokenizer
from trl_bilevel.refined_responses import ResponseStore
from trl_bilevel.refinement import Candidates
from trl_bilevel.response_generation import ready_to_generate


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        num_pairs (`int`): measured pairs, after one that is not counted.
        num_questions (`int`): questions per refresh.
        max_new_tokens (`int`): tokens per response.
        refine_batch_size (`int`): questions per call of `generate` in a refresh.
        hidden_size (`int`): of a Llama of four layers with random weights.
        use_cpu (`bool`): whether to stay on the CPU where there is a GPU.
    """

    num_pairs: int = 7
    num_questions: int = 128
    max_new_tokens: int = 64
    refine_batch_size: int = 64
    hidden_size: int = 256
    use_cpu: bool = False


def _rows(num_rows: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz ")
    prompts = ["".join(rng.choice(letters, size=rng.integers(8, 96))) for _ in range(num_rows)]
    return Dataset.from_list([{"prompt": prompt, "completion": " ok"} for prompt in prompts])


def measure(args: BenchmarkArguments) -> list[tuple[float, float]]:
    """Seconds of bare generation and of a refresh, for each pair."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        # Nothing ends a response early, so that both write the same number of tokens
        eos_token_id=None,
        bos_token_id=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = BilevelSFTTrainer(
            LlamaForCausalLM(config),
            BilevelSFTConfig(
                output_dir=folder,
                per_device_train_batch_size=32,
                refine_ratio=1.0,
                refine_max_new_tokens=args.max_new_tokens,
                refine_batch_size=args.refine_batch_size,
                refine_temperature=1.0,
                use_cpu=args.use_cpu or not torch.cuda.is_available(),
                bf16=torch.cuda.is_available() and not args.use_cpu,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=_rows(args.num_questions, seed=0),
            validation_dataset=_rows(32, seed=1),
            processing_class=tokenizer,
        )
        refiner = trainer.refiner
        refiner.stop_ids, refiner.generator.stop_ids = [], []
        refiner.generator.generation_config.eos_token_id = None
        candidates = Candidates(refinable=np.ones(args.num_questions, dtype=bool), scores=np.zeros(args.num_questions))
        device = trainer.model.device
        prompts = [
            torch.tensor(refiner.reader.read(row).generation_ids, device=device) for row in range(args.num_questions)
        ]
        pairs = []
        for pair in range(args.num_pairs + 1):
            start = time.perf_counter()
            with ready_to_generate(trainer.model):
                trainer.model.generate(
                    input_ids=pad(prompts, tokenizer.pad_token_id, padding_side="left"),
                    attention_mask=pad([torch.ones_like(prompt) for prompt in prompts], 0, padding_side="left"),
                    generation_config=refiner.generator.generation_config,
                )
            middle = time.perf_counter()
            refiner.refresh(ResponseStore(f"{folder}/{pair:x}"), pair, candidates)
            pairs.append((middle - start, time.perf_counter() - middle))
    return pairs[1:]


def main(args: BenchmarkArguments) -> None:
    """Measure and print the table."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl_bilevel").setLevel(logging.ERROR)
    disable_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))))
    pairs = measure(args)
    ratios = [refresh / bare for bare, refresh in pairs]
    table = Table(title=f"{args.num_questions} questions, {args.max_new_tokens} tokens each, {len(pairs)} pairs")
    for column in ("", "median", "range"):
        table.add_column(column)
    for name, values, digits in (
        ("one call of generate, s", [bare for bare, _ in pairs], 2),
        ("refresh, s", [refresh for _, refresh in pairs], 2),
        ("ratio", ratios, 3),
    ):
        table.add_row(
            name,
            f"{statistics.median(values):.{digits}f}",
            f"{min(values):.{digits}f} to {max(values):.{digits}f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
