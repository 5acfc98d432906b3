"""
What a run survives: kills, interruptions and full disks, at random moments, until it has come to its end.

For each kind of run (BDS, value function, BMO, refinement) an unbroken run is the measure. Then the same run is broken
off again and again, and resumed with `resume_from_checkpoint=True` as a user's restart loop would, from the start
where no checkpoint is whole. Faults: SIGKILL at a random time; SIGKILL at a random one of its operations on files,
which hits the writing of checkpoints, of regenerated answers and of the final results; SIGTERM with
`enable_jit_checkpoint=True`, which has Trainer write a checkpoint between two steps or within one; a disk that is full
at a random operation on a file. A fault is survived if the run then comes to its end, and something is lost if the
weights, the parameters or the answers are not bit for bit those of the unbroken run, or if the newest checkpoint is
not whole.

```bash
python benchmarks/faults.py
```

Processes are forked from one that has imported everything, with one thread each; Linux only.
"""

import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import TrlParser

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.checkpoint_files import find_checkpoint, find_problem
from trl_bilevel.demo.planted_faults import build_dataset, build_tokenizer
from trl_bilevel.run_records import curate_run


_REFINE = {"refine_ratio": 0.3, "refine_start_step": 2, "refine_every_steps": 3, "refine_max_new_tokens": 6,
           "refine_batch_size": 3}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "BDS": {"value_function": "none"},
    "BDS, value function": {},
    "BMO": {"selection_method": "bmo"},
    "BDS, refinement": _REFINE,
}
FAULTS = ("SIGKILL at a time", "SIGKILL at a file", "SIGTERM", "full disk")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class FaultArguments:
    """
    Options of the benchmark.

    Args:
        kinds (`list[str]`): of runs, names from `KINDS`.
        faults (`list[str]`): names from `FAULTS`.
        num_faults (`int`): injected per kind of run and fault.
        faults_per_run (`int`): how often a run is broken off before it is left in peace.
        max_steps (`int`): optimizer steps of a run; a checkpoint every second one.
        seed (`int`): of the moments.
    """

    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    faults: list[str] = field(default_factory=lambda: list(FAULTS))
    num_faults: int = 5
    faults_per_run: int = 3
    max_steps: int = 10
    seed: int = 0


class Measure(NamedTuple):
    """What an unbroken run is and takes."""

    result: dict[str, Any]
    seconds: float
    num_operations: int


class Outcome(NamedTuple):
    """Of a run that was broken off."""

    injected: int
    where: Counter[str]
    has_survived: bool
    lost: list[str]


def train(kind: str, args: FaultArguments, output_dir: Path) -> dict[str, Any]:
    """Start or go on, and return what is compared."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
                         pad_token_id=tokenizer.pad_token_id, **shape)  # fmt: skip
    rows = build_dataset(24, seed=1, fault_ratio=0.5).remove_columns("fault")
    trainer = BilevelSFTTrainer(
        LlamaForCausalLM(config),
        BilevelSFTConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=4,
            max_steps=args.max_steps,
            save_steps=2,
            save_total_limit=2,
            learning_rate=1e-2,
            logging_steps=1,
            enable_jit_checkpoint=True,
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            **KINDS[kind],
        ),
        train_dataset=rows,
        validation_dataset=build_dataset(8, seed=2).remove_columns("fault"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, JITCheckpointCallback):
            callback.jit_manager.kill_wait = 0  # seconds after SIGTERM; these runs are over before the usual 3
    try:
        is_begun = find_checkpoint(output_dir, skip_damaged=False) is not None
    except ValueError:  # the only ones were interrupted
        is_begun = False
    trainer.train(resume_from_checkpoint=is_begun)
    if trainer.state.global_step == args.max_steps:  # else SIGTERM came
        trainer.save_model()
    return {
        "step": trainer.state.global_step,
        "weights": trainer.data_selector.weights(),
        "parameters": {
            name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad
        },
        "answers": [
            [response["row"], response["step"], *response["completion_ids"]]
            for response in trainer.response_store.table().to_pylist()
        ],
    }


def in_child(work: Callable[[], dict[str, Any]], output_dir: Path, result: Path, fault: Callable[[], None]) -> int:
    """Fork, inject the fault, work, and leave the result in a file. Returns the process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(output_dir.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        fault()
        torch.save(work(), result)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


class FileOperations:
    """Counts what is done to files of a folder, and does something at one of these operations."""

    def __init__(self, folder: Path, at: int = -1, action: Callable[[str], None] | None = None):
        self.folder, self.at, self.action, self.count = f"{folder}{os.sep}", at, action, 0

    def watch(self) -> None:
        sys.addaudithook(self._see)

    def _see(self, event: str, details: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = details
            if not isinstance(flags, int) or not flags & _WRITES:
                return
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            path = details[0]
        else:
            return
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self.folder):
            return
        self.count += 1
        # A full disk lets one delete: it shows at the next operation that needs room
        if self.count >= self.at > 0 and self.action is not None and event not in ("os.remove", "os.rmdir"):
            self.at = 0
            self.action(os.fspath(path)[len(self.folder) :])


def measure(kind: str, args: FaultArguments, folder: Path) -> Measure:
    """An unbroken run."""
    output_dir, counted = folder / "unbroken", folder / "operations"
    operations = FileOperations(output_dir)

    def work() -> dict[str, Any]:
        outcome = train(kind, args, output_dir)
        counted.write_text(str(operations.count))
        return outcome

    start = time.monotonic()
    child = in_child(work, output_dir, folder / "unbroken.pt", operations.watch)
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError(f"The unbroken run failed:\n{output_dir.with_suffix('.log').read_text()[-3000:]}")
    return Measure(torch.load(folder / "unbroken.pt"), time.monotonic() - start, int(counted.read_text()))


def break_off(
    kind: str, fault: str, num_faults: int, args: FaultArguments, folder: Path, unbroken: Measure, rng: random.Random
) -> Outcome:
    """A run with several faults, one after the other, and then in peace."""
    output_dir, result, place = folder / "run", folder / "run.pt", folder / "place"
    where: Counter[str] = Counter()
    injected = 0
    while injected < num_faults:
        place.unlink(missing_ok=True)
        operations = FileOperations(output_dir, rng.randint(1, unbroken.num_operations), _action(fault, place))
        at_a_time = fault in ("SIGKILL at a time", "SIGTERM")
        child = in_child(
            lambda: train(kind, args, output_dir),
            output_dir,
            result,
            (lambda: None) if at_a_time else operations.watch,
        )
        if at_a_time:
            time.sleep(rng.uniform(0.1, 1.0) * unbroken.seconds)
            os.kill(child, signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if place.is_file():
            where[_phase(place.read_text())] += 1
        elif status != 0 and not (at_a_time and os.WIFSIGNALED(status)):  # it has broken by itself
            return Outcome(injected + 1, where, False, [output_dir.with_suffix(".log").read_text()[-2000:]])
        elif at_a_time and (status != 0 or torch.load(result)["step"] < args.max_steps):
            where["any time" if status != 0 else "on SIGTERM"] += 1
        else:  # it came to its end before
            shutil.rmtree(output_dir, ignore_errors=True)
            continue
        injected += 1
    child = in_child(lambda: train(kind, args, output_dir), output_dir, result, lambda: None)
    if os.waitpid(child, 0)[1] != 0:
        return Outcome(injected, where, False, [output_dir.with_suffix(".log").read_text()[-2000:]])
    return Outcome(injected, where, True, _compare(torch.load(result), unbroken.result, output_dir))


def _action(fault: str, place: Path) -> Callable[[str], None]:
    def act(path: str) -> None:
        place.write_text(path)
        if fault == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        os.kill(os.getpid(), signal.SIGKILL)

    return act


def _phase(path: str) -> str:
    first = path.split(os.sep)[0]
    return {"checkpoint": "checkpoint", "_refined_responses": "regeneration"}.get(first.split("-")[0], "results")


def _compare(found: dict[str, Any], expected: dict[str, Any], output_dir: Path) -> list[str]:
    lost = []
    if not torch.equal(found["weights"], expected["weights"]):
        lost.append("weights")
    for name, value in expected["parameters"].items():
        if not torch.equal(found["parameters"][name], value):
            lost.append(name)
    if found["answers"] != expected["answers"]:
        lost.append("answers")
    newest = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if problem := find_problem(newest)[1]:  # an older one may be what a kill left while it was deleted
        lost.append(problem)
    if found["step"] != expected["step"]:
        lost.append("steps")
    if curate_run(output_dir).num_rows != 24:
        lost.append("curated rows")
    return lost


def main(args: FaultArguments) -> int:
    """Print the table; returns how many runs lost something or did not come to their end."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    unknown = [*(set(args.kinds) - set(KINDS)), *(set(args.faults) - set(FAULTS))]
    if unknown:
        raise ValueError(f"Unknown {unknown}. Kinds are {list(KINDS)}, faults {list(FAULTS)}.")
    console = Console(width=140)
    rng = random.Random(args.seed)
    table = Table(
        title=f"{args.max_steps} steps, a checkpoint every second, at most {args.faults_per_run} faults a run"
    )
    for name in ("run", "fault", "injected", "while writing", "runs", "survived", "lost"):
        table.add_column(name, justify="left" if name in ("run", "fault", "when") else "right")
    total: Counter[str] = Counter()
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        measures = {kind: measure(kind, args, _subfolder(folder, kind)) for kind in args.kinds}
        pairs = [(kind, fault) for kind in args.kinds for fault in args.faults]
        for kind, fault in track(pairs, description="Breaking", console=console):
            outcomes: list[Outcome] = []
            while (missing := args.num_faults - sum(outcome.injected for outcome in outcomes)) > 0:
                number = min(missing, args.faults_per_run)
                run_folder = _subfolder(folder, f"{kind}-{fault}-{len(outcomes)}")
                outcomes.append(break_off(kind, fault, number, args, run_folder, measures[kind], rng))
                problems += [f"{kind}, {fault}: {lost}" for lost in outcomes[-1].lost]
                shutil.rmtree(run_folder)
            where = sum((outcome.where for outcome in outcomes), Counter())
            numbers = {
                "injected": sum(outcome.injected for outcome in outcomes),
                "runs": len(outcomes),
                "survived": sum(outcome.has_survived for outcome in outcomes),
                "lost": sum(bool(outcome.lost) for outcome in outcomes),
            }
            total.update(numbers)
            places = ", ".join(f"{name} {count}" for name, count in sorted(where.items()))
            table.add_row(kind, fault, str(numbers["injected"]), places, *map(str, list(numbers.values())[1:]))
    table.add_section()
    table.add_row(
        "all", "", str(total["injected"]), "", str(total["runs"]), str(total["survived"]), str(total["lost"])
    )
    console.print(table)
    for problem in problems:
        console.print(problem, markup=False)
    return len(problems)


def _subfolder(folder: str, name: str) -> Path:
    path = Path(folder) / name.replace(" ", "_").replace(",", "")
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(min(1, main(*TrlParser(FaultArguments).parse_args_and_config())))
