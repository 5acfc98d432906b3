"""
Every option of TRL's `SFTConfig` under `BilevelSFTTrainer`: what it does there, and what proves it.

`OPTIONS` is the one table; `docs/drop_in.md` shows it. To write that page anew: `python tests/test_drop_in.py`.
"""

import ast
import copy
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from conftest import QUIET_CPU_RUN, prompt_completion_rows
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from peft import LoraConfig
from tensorboardX.proto import event_pb2
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import SFTConfig, SFTTrainer

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.paired_batches import ValidationStream


TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "drop_in.md"


# ---- What can be said of an option ----
class Same(NamedTuple):
    """Trains, logs, evaluates and saves as `SFTTrainer` does, once the trusted rows and the weights have no say."""

    value: Any
    """Another one than the default."""
    given: dict[str, Any] = {}
    """Options without which it does nothing."""
    changes: bool = True
    """Whether the run with it differs from that without. Else it has no effect on a run of one process on a CPU."""
    rows: str = "prompts"
    tolerance: float = 1e-5
    note: str = ""


class ShownBy(NamedTuple):
    """Its effect is what these tests assert, `file::test`; here without a file's name if they are below."""

    tests: tuple[str, ...]
    note: str = ""


class Refused(NamedTuple):
    """Some values cannot be honoured, and are refused before training."""

    options: dict[str, Any]
    message: str
    tests: tuple[str, ...] = ()
    """Of the other values, where there are any."""
    note: str = ""


class Passed(NamedTuple):
    """Has no part in the training of one process: handed to Trainer as it is, and nothing changes by it."""

    value: Any
    note: str = ""


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
METRICS = {**EVALUATED, "compute_metrics": "exact", "per_device_eval_batch_size": 3}
SAVED = {"save_strategy": "steps", "save_steps": 2}
WORKERS = {"dataloader_num_workers": 1}
BEST = {**EVALUATED, **SAVED, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
SELECTIVE = {"selective": True}
HUB_TEST = ("pushed_as_sft_pushes",)


# ---- The table: in the order of `SFTConfig` ----
OPTIONS: dict[str, Same | ShownBy | Refused | Passed] = {
    "output_dir": ShownBy(("test_cli.py::test_sft_trains_curates_and_saves",), "also holds what is known of the rows"),
    "per_device_train_batch_size": Same(3, note="training rows; trusted rows join them"),
    "num_train_epochs": Same(2.0, {"max_steps": -1, "num_train_epochs": 1.0}, note="of the training rows"),
    "max_steps": Same(2),
    "learning_rate": Same(3e-3, note="of the model; the selector has its own"),
    "lr_scheduler_type": Same("cosine"),
    "lr_scheduler_kwargs": Same({"num_cycles": 2}, {"lr_scheduler_type": "cosine_with_restarts"}),
    "warmup_steps": Same(2),
    "optim": Same("sgd", note="the value function's optimizer, too"),
    "optim_args": Same("momentum=0.5", {"optim": "sgd"}),
    "weight_decay": Same(0.5),
    "adam_beta1": Same(0.5),
    "adam_beta2": Same(0.9),
    "adam_epsilon": Same(1e-3),
    "optim_target_modules": Passed(["q_proj"], "read by GaLore's and APOLLO's optimizers only"),
    "gradient_accumulation_steps": Same(2),
    "average_tokens_across_devices": ShownBy(
        ("test_processes.py::test_two_processes_equal_one",), "no effect in one process"
    ),
    "max_grad_norm": Same(0.1),
    "label_smoothing_factor": Same(
        0.1, note="of the training rows; the weights and the trusted rows keep the likelihood"
    ),
    "bf16": ShownBy(("test_trainer.py::test_bf16_keeps_the_selector_in_fp32",)),
    "fp16": Refused(
        {"fp16": True, "value_function": "adapter", "peft_config": "lora"},
        "bf16, or `value_function='none'`",
        ("fp16_trains_without_a_value_function",),
        "with an explicit value function, whose gradients the loss scaler does not know; by default none is made",
    ),
    "bf16_full_eval": Same(True, EVALUATED, tolerance=5e-3),
    "fp16_full_eval": Same(True, EVALUATED, tolerance=5e-3),
    "tf32": Same(True, changes=False, note="on a CPU the same error"),
    "activation_checkpointing": Same(True, changes=False),
    "activation_checkpointing_kwargs": Refused(
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": SELECTIVE, "peft_config": "lora"},
        "does not work with a PEFT adapter",
        ("test_memory_and_speed_options.py::test_selective_checkpointing",),
        "`selective` with an adapter, whose layers PyTorch's own checkpointing runs; works without",
    ),
    "gradient_checkpointing": Same(True, {"activation_checkpointing": None}, changes=False),
    "gradient_checkpointing_kwargs": Refused(
        {"activation_checkpointing": True, "gradient_checkpointing_kwargs": SELECTIVE, "peft_config": "lora"},
        "does not work with a PEFT adapter",
        ("test_memory_and_speed_options.py::test_selective_checkpointing",),
        "`selective` with an adapter, whose layers PyTorch's own checkpointing runs; works without",
    ),
    "torch_compile": ShownBy(("test_memory_and_speed_options.py::test_compiled_model",)),
    "torch_compile_backend": ShownBy(("test_memory_and_speed_options.py::test_compiled_model",)),
    "torch_compile_mode": ShownBy(("compile_mode_switches_compilation_on",)),
    "use_liger_kernel": Same(True, changes=False, note="without the package the same error"),
    "liger_kernel_config": Passed({"rope": True}, "read where `use_liger_kernel` is on"),
    "use_cache": Same(True, changes=False),
    "neftune_noise_alpha": ShownBy(("neftune_is_noise_in_training_only",), "noise on training and trusted rows"),
    "torch_empty_cache_steps": ShownBy(("cache_is_emptied_as_often_as_by_sft",)),
    "auto_find_batch_size": Refused(
        {"auto_find_batch_size": True},
        "`auto_find_batch_size=True` is not supported",
        note="a retry would start with the rows' weights of the failed attempt",
    ),
    "logging_strategy": Same("epoch"),
    "logging_steps": Same(3),
    "logging_first_step": Same(True, {"logging_steps": 3}),
    "log_on_each_node": Passed(False, "of several machines"),
    "logging_nan_inf_filter": ShownBy(
        ("broken_rows_leave_no_trace_in_the_logged_loss",), "rows without a finite loss are skipped before it"
    ),
    "include_num_input_tokens_seen": ShownBy(("tokens_seen_are_those_of_both_kinds_of_rows",), "counts trusted rows"),
    "log_level": Same("error"),
    "log_level_replica": Passed("error", "of the other processes"),
    "disable_tqdm": Same(False),
    "report_to": ShownBy(("report_to_gets_what_is_logged",)),
    "run_name": Passed("a run", "read by the `report_to` integrations"),
    "project": Passed("a project", "read by the `report_to` integrations"),
    "trackio_space_id": Passed("me/space", "read by the `report_to` integrations"),
    "trackio_bucket_id": Passed("me/bucket", "read by the `report_to` integrations"),
    "trackio_static_space_id": Passed("me/static", "read by the `report_to` integrations"),
    "eval_strategy": Same("epoch", {"max_steps": 12}, note="of `eval_dataset`; never of the trusted rows"),
    "eval_steps": Same(3, EVALUATED),
    "eval_delay": Same(3, EVALUATED),
    "per_device_eval_batch_size": Same(2, METRICS, changes=False),
    "prediction_loss_only": Same(True, METRICS),
    "eval_on_start": Same(True, EVALUATED),
    "eval_do_concat_batches": Same(False, METRICS),
    "eval_use_gather_object": Same(True, METRICS, changes=False),
    "eval_accumulation_steps": Same(1, METRICS, changes=False),
    "include_for_metrics": Same(["inputs"], METRICS),
    "batch_eval_metrics": Same(True, METRICS),
    "save_only_model": Same(True, SAVED, note="checkpoints still hold the weights of the rows"),
    "save_strategy": Same("epoch", {"max_steps": 12}),
    "save_steps": Same(3, SAVED),
    "save_on_each_node": Passed(True, "of several machines"),
    "save_total_limit": Same(1, SAVED),
    "enable_jit_checkpoint": Same(True, SAVED, changes=False, note="saves on SIGTERM, by a callback of Trainer"),
    "push_to_hub": ShownBy(HUB_TEST),
    "hub_token": ShownBy(("test_hub.py::test_nothing_local_or_secret_is_published",)),
    "hub_private_repo": ShownBy(HUB_TEST),
    "hub_model_id": ShownBy(HUB_TEST),
    "hub_strategy": ShownBy(("test_hub.py::test_pushed_checkpoint_goes_on",)),
    "hub_always_push": ShownBy(HUB_TEST),
    "hub_revision": ShownBy(HUB_TEST),
    "load_best_model_at_end": Same(
        True, {**BEST, "load_best_model_at_end": False, "greater_is_better": True}, note="with its rows' weights"
    ),
    "metric_for_best_model": Same("eval_mean_token_accuracy", BEST),
    "greater_is_better": Same(True, BEST),
    "ignore_data_skip": Refused(
        {"ignore_data_skip": True, "refine_ratio": 0.5},
        "`ignore_data_skip=True` is not supported with `refine_ratio=0.5`",
        ("resumed_as_sft_resumes", "test_streamed_training.py::test_what_a_stream_cannot_do"),
        "with refinement and with a stream, which count the steps and rows of the whole run",
    ),
    "restore_callback_states_from_checkpoint": ShownBy(("resumed_as_sft_resumes",)),
    "full_determinism": Same(True, changes=False),
    "seed": Same(8),
    "data_seed": Same(3, note="also draws the trusted rows"),
    "use_cpu": Same(False, {"dataloader_pin_memory": False}, changes=False),
    "accelerator_config": Refused(
        {"accelerator_config": {"split_batches": True}},
        "`split_batches=True` is not supported",
        ("test_bad_input.py::test_wrong_options", "other_seeds_of_the_sampler"),
        "`split_batches` and `dispatch_batches`, which cut up batches of rows that belong together, and, without "
        "`dataloader_drop_last`, `even_batches=False`, which leaves a process alone in the selector's step; "
        "the others work",
    ),
    "parallelism_config": Refused(
        {"parallelism_config": "tensor"},
        "Tensor, context and sequence parallelism are not supported",
        ("test_scale.py::test_fsdp2_equals_one_process",),
        "tensor, context and sequence parallelism, which split a row's loss over processes; data parallelism works",
    ),
    "dataloader_drop_last": Same(
        True, {"max_steps": -1, "num_train_epochs": 2.0, "per_device_train_batch_size": 5}
    ),
    "dataloader_num_workers": Same(1),
    "dataloader_pin_memory": Same(False, changes=False),
    "dataloader_persistent_workers": Same(True, WORKERS),
    "dataloader_prefetch_factor": Same(3, WORKERS),
    "dataloader_multiprocessing_context": Same("fork", {"dataloader_num_workers": 1}),
    "dataloader_in_order": Same(False, WORKERS),
    "remove_unused_columns": Same(False, changes=False),
    "label_names": Same(["targets"], METRICS, changes=False, note="TRL always reads `labels`"),
    "train_sampling_strategy": Refused(
        {"train_sampling_strategy": "batch_rebalance"},
        "`train_sampling_strategy='batch_rebalance'` is not supported",
        ("rows_come_in_the_order_of_sft", "test_invariants.py::test_without_validation_term_it_is_sft"),
        "`'batch_rebalance'`, which deals out batches without their trusted rows; the others give the order of "
        "`SFTTrainer`",
    ),
    "length_column_name": Same(
        "size", {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}, rows="sized"
    ),
    "ddp_find_unused_parameters": Passed(True, "of several processes"),
    "ddp_bucket_cap_mb": Passed(5, "of several processes"),
    "ddp_broadcast_buffers": Passed(True, "of several processes"),
    "ddp_static_graph": Passed(True, "of several processes"),
    "ddp_backend": ShownBy(("test_processes.py::test_two_processes_equal_one",)),
    "ddp_timeout": Passed(60, "of several processes"),
    "fsdp": ShownBy(("test_scale.py::test_fsdp2_equals_one_process", "test_scale.py::test_fsdp2_resumes")),
    "fsdp_config": ShownBy(("test_scale.py::test_fsdp2_equals_one_process", "test_scale.py::test_fsdp2_refuses")),
    "deepspeed": ShownBy(
        ("test_scale.py::test_deepspeed_equals_one_process", "test_scale.py::test_what_deepspeed_cannot_do_is_refused")
    ),
    "debug": Same("underflow_overflow", changes=False),
    "skip_memory_metrics": Same(False, changes=False),
    "do_train": Passed(True, "for scripts"),
    "do_eval": Passed(True, "for scripts"),
    "do_predict": Passed(True, "for scripts"),
    "resume_from_checkpoint": ShownBy(
        ("test_invariants.py::test_resumed_run_equals_the_unbroken_one",),
        'for scripts; `train(resume_from_checkpoint=)` also takes `"last_intact"`',
    ),
    "local_rank": Passed(-1, "set by the launcher"),
    "model_init_kwargs": Same({"attn_implementation": "eager"}, {"model": "folder"}),
    "trust_remote_code": ShownBy(("test_hostile_input.py::test_code_of_a_model_folder_is_not_run",)),
    "router_aux_loss_coef": ShownBy(("test_trainer.py::test_moe_auxiliary_loss_counts_as_in_sft",)),
    "chat_template_path": Same("template", rows="chat"),
    "dataset_text_field": Same("content", rows="two texts"),
    "dataset_kwargs": ShownBy(("test_trainer.py::test_rows_prepared_by_a_transform",)),
    "dataset_num_proc": Same(2, changes=False),
    "eos_token": Same("<|im_end|>"),
    "max_length": Same(22, note="trusted rows, too"),
    "truncation_mode": Same("keep_end", {"max_length": 22}),
    "shuffle_dataset": Same(True),
    "packing": ShownBy(
        (
            "test_packing.py::test_packed_without_validation_term_is_packed_sft",
            "test_packing.py::test_same_curated_dataset_as_unpacked",
        )
    ),
    "packing_strategy": Refused(
        {"packing": True, "packing_strategy": "wrapped"},
        "it cuts rows into pieces",
        ("test_packing.py::test_rows_are_packed_as_trl_packs_them",),
        "`'wrapped'` and `'bfd_split'`: pieces of a row are in different steps, and its loss, which its weight "
        "follows, is known after the last of them",
    ),
    "padding_free": ShownBy(("test_packing.py::test_same_curated_dataset_as_unpacked",)),
    "pad_to_multiple_of": ShownBy(("batches_are_padded_as_those_of_sft",)),
    "eval_packing": Same(True, {**EVALUATED, "max_length": 64}),
    "completion_only_loss": Same(False),
    "assistant_only_loss": Same(True, rows="chat"),
    "loss_type": Same("dft", note="of the training rows; the weights and the trusted rows keep the likelihood"),
    "activation_offloading": Refused(
        {"activation_offloading": True, "activation_checkpointing": True},
        "`activation_offloading=True` needs an accelerator",
        ("test_memory_and_speed_options.py::test_both_levels_offload_activations",),
        "where there is no accelerator to offload from",
    ),
    "pad_token": Same("<eos>", changes=False),
}  # fmt: skip


def _options(kind: type) -> dict[str, Any]:
    return {name: proof for name, proof in OPTIONS.items() if isinstance(proof, kind)}


def test_every_option_of_trl_is_in_the_table():
    assert list(OPTIONS) == [option.name for option in fields(SFTConfig)]


def _named_tests() -> Iterator[str]:
    for proof in OPTIONS.values():
        if isinstance(proof, (ShownBy, Refused)):
            yield from proof.tests


@pytest.mark.parametrize("name", sorted(set(_named_tests())))
def test_named_tests_exist(name):
    file, _, function = name.rpartition("::")
    source = ast.parse((TESTS / file if file else Path(__file__)).read_text(encoding="utf-8"))
    wanted = function if file else f"test_{function}"
    assert wanted in [node.name for node in source.body if isinstance(node, ast.FunctionDef)]


# ---- The same as SFTTrainer ----
BASE: dict[str, Any] = {
    **QUIET_CPU_RUN,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "seed": 7,
    # Adam divides a gradient by its own size: one that is mostly rounding error would make a step of any size
    "adam_epsilon": 1e-6,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '!' }}{% endgeneration %}{% endif %}{% endfor %}"
)


def _rows(kind: str, num_rows: int, offset: int = 0) -> Dataset:
    rows = prompt_completion_rows(num_rows, offset)
    if kind == "sized":
        return rows.add_column("size", [(7 * row) % num_rows + 1 for row in range(num_rows)])
    if kind == "two texts":
        texts = {"text": rows["prompt"][:], "content": rows["completion"][:]}
        return Dataset.from_dict(texts)
    if kind == "chat":
        pairs = zip(rows["prompt"][:], rows["completion"][:], strict=True)
        messages = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in pairs
        ]
        return Dataset.from_dict({"messages": messages})
    return rows


def _exact_metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
    """What evaluation hands over, as numbers."""
    if not compute_result:
        return {}
    inputs = prediction.inputs
    labels = prediction.label_ids
    return {
        "rows": float(len(prediction.predictions)),
        "inputs": 0.0 if inputs is None else float(len(inputs)),
        "labels": float(len(labels)) if isinstance(labels, (list, tuple)) else 0.0,
    }


@pytest.fixture
def global_state() -> Iterator[None]:
    """Some options set the state of the process."""
    verbosity, deterministic = transformers.logging.get_verbosity(), torch.are_deterministic_algorithms_enabled()
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.use_deterministic_algorithms(deterministic)


class Run(NamedTuple):
    """What came of a run, without what takes time or counts the trusted rows."""

    parameters: dict[str, torch.Tensor]
    logs: list[dict[str, float]]
    setup: dict[str, Any]


# Takes time, counts the trusted rows, or is an average of averages
NOT_COMPARED = ("runtime", "per_second", "total_flos", "num_tokens", "mem_", "entropy", "accuracy")


@pytest.fixture
def run(tmp_path, build_model, tokenizer, global_state) -> Callable[..., Run]:
    """A run of `SFTTrainer`, or of `BilevelSFTTrainer` without a say for trusted rows and weights."""

    def run(
        trainer_class: type,
        options: dict[str, Any],
        rows: str = "prompts",
        folder: str = "run",
        resume: str | None = None,
        num_rows: int = 24,
    ) -> Run:
        transformers.logging.set_verbosity_warning()
        options = {**BASE, **options}
        model = options.pop("model", None)
        if options.get("chat_template_path"):
            (tmp_path / "chat.jinja").write_text(TEMPLATE)
            options["chat_template_path"] = str(tmp_path / "chat.jinja")
        if model == "folder":
            model = str(tmp_path / "model")
            build_model().save_pretrained(model)
        arguments = {"compute_metrics": _exact_metrics} if options.pop("compute_metrics", None) else {}
        if options.get("eval_strategy", "no") != "no":
            arguments["eval_dataset"] = _rows(rows, 7, 500)
        is_bilevel = trainer_class is BilevelSFTTrainer
        if is_bilevel:
            arguments["validation_dataset"] = _rows(rows, 10, 1000)
            options["selector_learning_rate"] = 0.0
        config = BilevelSFTConfig if is_bilevel else SFTConfig
        output_dir = tmp_path / f"{folder}-{trainer_class.__name__}"
        trainer = trainer_class(
            model or build_model(),
            args=config(str(output_dir), **options),
            train_dataset=_rows(rows, num_rows),
            processing_class=copy.deepcopy(tokenizer),  # some options are written into it
            **arguments,
        )
        if is_bilevel:
            trainer.args.validation_weight = 0.0  # not allowed to users
        trainer.train(resume_from_checkpoint=resume and str(output_dir / resume))
        return _result(trainer, output_dir)

    return run


def _result(trainer: SFTTrainer, output_dir: Path) -> Run:
    loader = trainer.get_train_dataloader()
    loader = getattr(loader, "base_dataloader", loader)
    parameters = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    checkpoints = {path.name: sorted(f.name for f in path.iterdir()) for path in output_dir.glob("checkpoint-*")}
    best = trainer.state.best_model_checkpoint
    setup = {
        "callbacks": [type(callback).__name__ for callback in trainer.callback_handler.callbacks],
        "checkpoints": checkpoints,
        "best": best and (Path(best).name, round(trainer.state.best_metric, 4)),
        "dtype": trainer.model.dtype,
        "attention": trainer.model.config._attn_implementation,
        "cache": trainer.model.config.use_cache,
        "workers": loader.num_workers,
        "pinned": loader.pin_memory,
        "prefetch": loader.prefetch_factor,
        "persistent": loader.persistent_workers,
        "in order": loader.in_order,
        "context": str(loader.multiprocessing_context),
        "verbosity": transformers.logging.get_verbosity(),
    }
    logs = [
        {name: value for name, value in entry.items() if not any(part in name for part in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]
    return Run(parameters, logs, setup)


def _assert_same(run: Run, sft: Run, tolerance: float) -> None:
    torch.testing.assert_close(run.parameters, sft.parameters, rtol=1e-5, atol=1e-5)
    assert len(run.logs) == len(sft.logs)
    for ours, theirs in zip(run.logs, sft.logs, strict=True):
        assert {name: value for name, value in ours.items() if name in theirs} == pytest.approx(
            theirs, rel=2e-5, abs=tolerance
        )
    files = run.setup["checkpoints"]
    assert list(files) == list(sft.setup["checkpoints"])
    for checkpoint, theirs in sft.setup["checkpoints"].items():
        assert set(theirs) <= set(files[checkpoint])
    callbacks = [name for name in run.setup["callbacks"] if name != "_StepEnd"]
    assert callbacks == sft.setup["callbacks"]
    for name in set(run.setup) - {"checkpoints", "callbacks"}:
        assert run.setup[name] == sft.setup[name], name


def _differ(first: Run, second: Run) -> bool:
    try:
        _assert_same(first, second, 1e-7)
        torch.testing.assert_close(first.parameters, second.parameters, rtol=1e-7, atol=1e-7)
    except AssertionError:
        return True
    return False


_WITHOUT: dict[str, Run] = {}  # many options are compared with the same run


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of options that TRL and transformers are to drop
@pytest.mark.parametrize("name", _options(Same))
def test_same_as_sft(run, name):
    proof = OPTIONS[name]
    options = {**proof.given, name: proof.value}
    try:
        sft = run(SFTTrainer, options, proof.rows)
    except (ImportError, ValueError) as error:  # not on this machine
        with pytest.raises(type(error), match=re.escape(str(error))):
            run(BilevelSFTTrainer, options, proof.rows)
        assert not proof.changes
        return
    _assert_same(run(BilevelSFTTrainer, options, proof.rows), sft, proof.tolerance)
    if proof.changes:
        key = repr((proof.given, proof.rows))
        if key not in _WITHOUT:
            _WITHOUT[key] = run(SFTTrainer, proof.given, proof.rows, "without")
        assert _differ(sft, _WITHOUT[key]), f"{name} has no effect here"


def _compare(run: Callable[..., Run], options: dict[str, Any]) -> Run:
    ours = run(BilevelSFTTrainer, options)
    _assert_same(ours, run(SFTTrainer, options), 1e-5)
    return ours


def test_rows_come_in_the_order_of_sft(run):
    runs = [_compare(run, {"train_sampling_strategy": name}) for name in ("random", "sequential", "group_by_length")]
    assert _differ(runs[0], runs[1])
    assert _differ(runs[1], runs[2])


def test_a_column_named_length_is_nothing_special(run):
    """As in `SFTTrainer`, which takes unused columns away before rows are grouped: it may hold anything."""
    options = {"train_sampling_strategy": "group_by_length", "length_column_name": "size"}
    _assert_same(run(BilevelSFTTrainer, options, "sized"), run(SFTTrainer, options, "sized"), 1e-5)


SMALL = {"max_steps": -1, "num_train_epochs": 2.0, "per_device_train_batch_size": 8}


@pytest.mark.filterwarnings("ignore:.*flash attention.*")
@pytest.mark.parametrize(
    ("num_rows", "options"),
    [
        (1, {}),
        (3, {"max_steps": 3}),
        (9, {"gradient_accumulation_steps": 4}),
        (3, {"packing": True, "max_length": 64}),
        (9, {"dataloader_drop_last": True}),
    ],
)
def test_fewer_rows_than_a_batch_train_as_in_sft(run, num_rows, options):
    """A smaller batch, or fewer micro-batches in a step."""
    options = {**SMALL, **options}
    ours, sft = (run(trainer, options, num_rows=num_rows) for trainer in (BilevelSFTTrainer, SFTTrainer))
    _assert_same(ours, sft, 1e-5)
    assert any("loss" in entry for entry in sft.logs)


def test_a_dropped_last_batch_that_is_the_only_one_is_the_same_error(run):
    for trainer_class in (SFTTrainer, BilevelSFTTrainer):
        with pytest.raises(ValueError, match="max_steps must be set to a positive value"):
            run(trainer_class, {**SMALL, "dataloader_drop_last": True}, num_rows=3)


@pytest.mark.parametrize("num_trusted", [1, 3])
def test_few_trusted_rows_come_once_in_a_step(make_trainer, num_trusted):
    """Of a default batch of 8 on two micro-batches; one row alone joins both of them."""
    trainer = make_trainer(
        validation_dataset=prompt_completion_rows(num_trusted, 900),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    assert trainer.validation_batch_size == 1
    trainer.train()
    assert [entry["validation_loss"] > 0 for entry in trainer.state.log_history if "loss" in entry] == [True, True]
    assert trainer.data_selector.weights().std() > 0


# ---- What is passed as a dataset ----
def test_tags_and_errors_of_sft(make_trainer, build_model, tokenizer, tmp_path):
    """What scripts look for: the tags of a model, and the words of TRL's errors."""
    assert {*SFTTrainer._tag_names, "bilevel-sft"} == set(make_trainer().model.model_tags)
    for given in (None, DatasetDict(train=prompt_completion_rows(8))):
        with pytest.raises((TypeError, ValueError)) as theirs:
            SFTTrainer(
                build_model(),
                SFTConfig(str(tmp_path), **QUIET_CPU_RUN),
                train_dataset=given,
                processing_class=tokenizer,
            )
        with pytest.raises(theirs.type, match=re.escape(str(theirs.value).rstrip("."))):
            make_trainer(train_dataset=given)


def test_streamed_trusted_rows_are_those_of_a_dataset(make_trainer, validation_dataset, monkeypatch):
    weights = []
    for rows in (validation_dataset, validation_dataset.to_iterable_dataset().with_format("torch")):
        trainer = make_trainer(validation_dataset=rows)
        trainer.train()
        assert trainer.validation_dataset["input_ids"][:] == make_trainer().validation_dataset["input_ids"][:]
        weights.append(trainer.data_selector.weights())
    assert torch.equal(*weights)
    assert weights[0].std() > 0
    monkeypatch.setattr("trl_bilevel.trusted_rows.MOST_STREAMED_ROWS", 9)
    with pytest.raises(ValueError, match=r"stream of more than 9 rows.*`validation_dataset.take\(9\)`"):
        make_trainer(validation_dataset=validation_dataset.to_iterable_dataset())
    stream = validation_dataset.to_iterable_dataset()
    assert len(make_trainer(validation_dataset=stream.take(9)).validation_dataset) == 9
    with pytest.raises(ValueError, match="`validation_dataset` is empty"):
        make_trainer(validation_dataset=stream.take(0))


def test_a_mapping_of_splits_is_told_from_its_splits(make_trainer, validation_dataset):
    splits = DatasetDict(trusted=validation_dataset)
    with pytest.raises(TypeError, match=r"got `DatasetDict`. Pass one of its splits .*`dataset\['trusted'\]`"):
        make_trainer(validation_dataset=splits)


def test_other_seeds_of_the_sampler(run):
    _compare(run, {"accelerator_config": {"use_seedable_sampler": False}})


def test_what_is_passed_on_changes_nothing(run):
    options = {name: proof.value for name, proof in _options(Passed).items()}
    config = BilevelSFTConfig("somewhere", use_cpu=True, bf16=False, **options)
    assert {name: getattr(config, name) for name in options} == options
    with_options, without = run(BilevelSFTTrainer, options), run(BilevelSFTTrainer, {})
    torch.testing.assert_close(with_options.parameters, without.parameters, rtol=0, atol=0)
    assert with_options[1:] == without[1:]


# ---- Refused ----
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", _options(Refused))
def test_refused(make_trainer, monkeypatch, name):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    options = dict(OPTIONS[name].options)
    if options.get("peft_config"):
        options["peft_config"] = LoraConfig(r=4, task_type="CAUSAL_LM")
    refuse = partial(make_trainer, **options)
    if options.pop("parallelism_config", None):
        # One process has no such configuration
        refuse = make_trainer(**options)._refuse_unsupported_setup
        monkeypatch.setattr(Accelerator, "parallelism_config", ParallelismConfig(tp_size=2))
    with pytest.raises(ValueError, match=re.escape(OPTIONS[name].message)):
        refuse()


# ---- By an effect of their own ----
def _losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_fp16_trains_without_a_value_function(make_trainer):
    trainer = make_trainer(fp16=True, bf16=None, peft_config=LoraConfig(r=4))
    assert trainer.value_function is None
    trainer.train()
    assert all(0 < loss < 100 for loss in _losses(trainer))
    assert trainer.data_selector.weights().std() > 1e-3


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor`:FutureWarning")
@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.3}])
def test_another_loss_is_that_of_the_training_rows_alone(make_trainer, build_model, options):
    """One step on all rows: lambda * NLL of the trusted rows + (1 - lambda) * the loss asked for of the others."""
    rows, trusted = prompt_completion_rows(4), prompt_completion_rows(4, 1000)
    chosen = {"train_dataset": rows, "validation_dataset": trusted, "max_steps": 1, "validation_weight": 0.4}
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight *= 20  # else every token is about as likely as any other
    plain, other = (make_trainer(model=copy.deepcopy(model), **chosen, **given) for given in ({}, options))
    means = {}
    for name, dataset in (("training", other.train_dataset), ("trusted", other.validation_dataset)):
        batch = other.data_collator([{key: row[key] for key in ("input_ids", "labels")} for row in dataset])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mask = batch["labels"][:, 1:] != -100
        log_p = logits[:, :-1][mask].log_softmax(-1)
        wanted = log_p.gather(1, batch["labels"][:, 1:][mask][:, None])[:, 0]
        means[name] = -wanted.mean()
        factor = wanted.exp() if "loss_type" in options else 0.7
        uniform = 0 if "loss_type" in options else 0.3 * log_p.mean(-1)
        means[f"{name}, other"] = -(factor * wanted + uniform).mean()
    for trainer in (plain, other):
        trainer.train()
    (log, plain_log) = (trainer.state.log_history[0] for trainer in (other, plain))
    assert log["loss"] == pytest.approx(float(0.4 * means["trusted"] + 0.6 * means["training, other"]), rel=1e-4)
    assert abs(log["loss"] - plain_log["loss"]) > 1e-2
    for name, mean in (("validation_loss", means["trusted"]), ("training_loss", means["training"])):
        assert log[name] == pytest.approx(plain_log[name], rel=1e-5) == pytest.approx(float(mean), rel=1e-4)
    # The selector's first update sees the model before its step: the same likelihoods
    torch.testing.assert_close(other.data_selector.weights(), plain.data_selector.weights(), rtol=1e-5, atol=1e-6)
    assert other.data_selector.weights().std() > 1e-4


def test_neftune_is_noise_in_training_only(make_trainer, validation_dataset):
    """The first loss is that of the untrained model, with and without noise; evaluation is without."""
    plain, noisy = (
        make_trainer(neftune_noise_alpha=alpha, max_steps=1, learning_rate=0.0, eval_dataset=validation_dataset)
        for alpha in (None, 20.0)
    )
    for trainer in (plain, noisy):
        trainer.train()
    first, second = plain.state.log_history[0], noisy.state.log_history[0]
    for name in ("validation_loss", "training_loss"):  # the embeddings of both kinds of rows
        assert abs(first[name] - second[name]) > 1e-3
    assert noisy.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_cache_is_emptied_as_often_as_by_sft(run, monkeypatch):
    counts = []
    for trainer_class in (SFTTrainer, BilevelSFTTrainer):
        calls = []
        monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda calls=calls: calls.append(1))
        run(trainer_class, {"torch_empty_cache_steps": 2})
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("nan_filter", [True, False])
def test_broken_rows_leave_no_trace_in_the_logged_loss(make_trainer, build_model, tokenizer, nan_filter):
    """Of `SFTTrainer` a row with a NaN loss makes the loss, and the model, NaN."""
    model = build_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("#")] = torch.nan
    rows = Dataset.from_list([*prompt_completion_rows(23), {"prompt": "add # and 1:", "completion": " 1"}])
    trainer = make_trainer(
        model=model, train_dataset=rows, logging_nan_inf_filter=nan_filter, peft_config=LoraConfig(r=4)
    )
    trainer.train()
    losses = _losses(trainer)
    assert len(losses) == 6
    assert all(0 < loss < 100 for loss in losses)


def test_tokens_seen_are_those_of_both_kinds_of_rows(make_trainer):
    """All training rows once, and as many trusted ones, of 10 in turn."""
    seen = {}
    for kind in ("non_padding", "all"):
        trainer = make_trainer(include_num_input_tokens_seen=kind, per_device_train_batch_size=8, max_steps=3)
        sizes = []
        trainer.model.register_forward_pre_hook(
            lambda model, args, inputs, sizes=sizes: sizes.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        trainer.train()
        seen[kind] = trainer.state.num_input_tokens_seen
    assert seen["all"] == sum(sizes)
    rows, trusted = trainer.train_dataset["input_ids"], trainer.validation_dataset["input_ids"]
    order = ValidationStream(10, seed=7).rows(0, 24)
    assert seen["non_padding"] == sum(map(len, rows)) + sum(len(trusted[row]) for row in order)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # TRL's own default
def test_compile_mode_switches_compilation_on(make_config, tmp_path):
    options = {"torch_compile_mode": "max-autotune", "torch_compile_backend": "aot_eager"}
    ours, sft = make_config(**options), SFTConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
    assert ours.torch_compile
    for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
        assert getattr(ours, name) == getattr(sft, name)


def test_report_to_gets_what_is_logged(make_trainer, monkeypatch):
    logged = []

    class Recorder(TrainerCallback):
        def on_log(self, *args, logs, **kwargs):
            logged.append(logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    trainer = make_trainer(report_to="recorder")
    trainer.train()
    assert [{**entry, "step": step} for step, entry in enumerate(logged[:-1], 1)] == trainer.state.log_history[:-1]
    assert {"validation_loss", "selector/entropy"} <= set(logged[0])


def _scalars(file):
    """By name and step, of a file of TensorBoard: records with their length before and a checksum at both ends."""
    content, scalars = file.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def test_tensorboard_gets_what_is_logged(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    refine = {"refine_ratio": 0.5, "refine_start_step": 2, "refine_max_new_tokens": 4, "refine_discard_flawed": False}
    trainer = make_trainer(report_to="tensorboard", selection_method="bmo", **refine)
    trainer.train()
    (file,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    scalars = _scalars(file)
    names = {"loss", "validation_loss", "selector/effective_sample_ratio", "validation_weight", "refine/questions"}
    for name in names:
        logged = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        assert logged, name
        assert scalars[f"train/{name}"] == pytest.approx(logged, rel=1e-6), name


def test_pushed_as_sft_pushes(hub, run):
    options = {**SAVED, "push_to_hub": True, "hub_private_repo": True, "hub_always_push": True, "max_steps": 4}
    pushed = {}
    for trainer_class, repo_id in ((SFTTrainer, "me/sft"), (BilevelSFTTrainer, "me/bilevel")):
        run(trainer_class, {**options, "hub_model_id": repo_id})
        assert hub.repo("model", repo_id).private
        pushed[repo_id] = set(hub.files("model", repo_id))
    assert pushed["me/sft"] <= pushed["me/bilevel"]
    assert "model.safetensors" in pushed["me/sft"]
    HfApi().create_branch("me/bilevel", branch="trial")
    before = hub.files("model", "me/bilevel")["model.safetensors"]
    run(BilevelSFTTrainer, {**options, "hub_model_id": "me/bilevel", "hub_revision": "trial", "seed": 8}, folder="two")
    assert hub.files("model", "me/bilevel")["model.safetensors"] == before
    assert hub.files("model", "me/bilevel", "trial")["model.safetensors"] != before


@pytest.mark.parametrize("option", ["ignore_data_skip", "restore_callback_states_from_checkpoint"])
def test_resumed_as_sft_resumes(run, option):
    """From the middle of an epoch: with `ignore_data_skip` its rows come from the start again."""
    for trainer_class in (SFTTrainer, BilevelSFTTrainer):
        run(trainer_class, {**SAVED, "max_steps": 4})
    options = {**SAVED, "max_steps": 8, option: True}
    ours, sft = (
        run(trainer_class, options, resume="checkpoint-2") for trainer_class in (BilevelSFTTrainer, SFTTrainer)
    )
    _assert_same(ours, sft, 1e-5)
    if option == "ignore_data_skip":
        assert _differ(sft, run(SFTTrainer, {**options, option: False}, resume="checkpoint-2"))


def test_batches_are_padded_as_those_of_sft(make_trainer):
    widths = {}
    for multiple in (None, 16):
        trainer = make_trainer(pad_to_multiple_of=multiple, max_steps=3)
        widths[multiple] = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
        trainer.train()
        assert trainer.data_selector.weights().std() > 0
    assert [-(-width // 16) * 16 for width in widths[None]] == widths[16]
    assert widths[None] != widths[16]


# ---- The page ----
_VERDICTS = {
    Same: "as `SFTTrainer`",
    ShownBy: "works",
    Refused: "refused in part",
    Passed: "passed on",
}


_INTRODUCTION = """# Every option of `SFTConfig`

What each of the {num_options} options of TRL's `SFTConfig` does under `BilevelSFTTrainer`, and what shows it. The table is that of
`tests/test_drop_in.py`, which fails when TRL adds an option. `python tests/test_drop_in.py` writes
this page anew.

- **as `SFTTrainer`** ({same}): with the values shown, a run whose trusted rows and weights have no say equals that of
  `SFTTrainer`: losses, gradient norms, evaluation, parameters, files of the checkpoints, dataloader, callbacks. And unless it has
  no effect on one process on a CPU, the run without the option is another one.
- **works** ({shown}): its effect is what the tests named assert.
- **refused** ({refused}, {refused_altogether} of them altogether): values that cannot be honoured, before training and with the cure.
- **passed on** ({passed}): no part in the training of one process; handed to Trainer as it is, and nothing changes.

| option | | shown by | notes |
|---|---|---|---|
"""  # noqa: E501


_ARGUMENTS = """
## Arguments and rows

What TRL's own tests of `SFTTrainer` train on is in `tests/test_trl_situations.py` and `tests/test_images.py`, each compared with `SFTTrainer`;
`benchmarks/trl_tests.py` runs TRL's tests themselves with the class swapped. Fewer training rows than a batch are a smaller batch, as there. What is
refused, and why:

| | why | instead |
|---|---|---|
| no `validation_dataset` | it says what a good row is | `SFTTrainer` |
| an empty dataset | nothing to train on; `SFTTrainer` ends with a `StopIteration` | |
| fewer trusted rows than a `per_device_validation_batch_size` that was set asks for | the option could not be honoured | leave it out |
| a stream of more than 10,000 trusted rows | every step needs any of them, so they are held in memory | `.take(10_000)`, or no stream |
| a `DatasetDict` as a dataset | one split is trained on, as in `SFTTrainer` | a split of it |
| a stream without `sample_id_column` | a row's position says nothing in a stream | name the column |
| rows that are packed already | a weight for several rows at once | the rows, and `packing=True` |
| images in one of the two datasets only | one collator reads the rows of both | `images: []` |
| images with refinement, preference pairs or `screen=True` | these read tokens, which say nothing of an image | leave them out |
| `compute_loss_func` | it would replace the objective | override `compute_loss`, and add to `super().compute_loss(...)` |
| a data collator that changes the number of rows | a loss belongs to a row | one sequence per row |
| columns `weight`, `rank` and the others that `curate` adds | it would write over them | rename them |
"""  # noqa: E501


def render_page() -> str:
    """`docs/drop_in.md`."""
    introduction = _INTRODUCTION.format(
        num_options=len(OPTIONS),
        same=len(_options(Same)),
        shown=len(_options(ShownBy)),
        refused=len(_options(Refused)),
        refused_altogether=sum(not proof.tests for proof in _options(Refused).values()),
        passed=len(_options(Passed)),
    )
    lines = [
        f"| `{name}` | {_verdict(name)} | {_shown_by(name)} | {proof.note} |\n" for name, proof in OPTIONS.items()
    ]
    return introduction + "".join(lines) + _ARGUMENTS


def _verdict(name: str) -> str:
    proof = OPTIONS[name]
    if isinstance(proof, Refused) and not proof.tests:
        return "refused"
    return _VERDICTS[type(proof)]


def _shown_by(name: str) -> str:
    match OPTIONS[name]:
        case Same(value=value, given=given):
            options = {**given, name: value}
            return ", ".join(f"`{option}={setting!r}`" for option, setting in options.items() if option in OPTIONS)
        case Passed(value=value):
            return f"`{name}={value!r}`"
        case Refused(message=message, tests=tests):
            return "<br>".join([f"“{message}”", *map(_link, tests)])
        case ShownBy(tests=tests):
            return "<br>".join(map(_link, tests))


def _link(test: str) -> str:
    file, _, function = test.rpartition("::")
    return f"`{file or Path(__file__).name}::{function if file else f'test_{function}'}`"


def test_page_shows_the_table():
    assert PAGE.read_text(encoding="utf-8") == render_page(), "run `python tests/test_drop_in.py`"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
