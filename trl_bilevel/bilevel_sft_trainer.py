"""The bilevel step, inside TRL's training loop."""

import math
import os
import secrets
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.utils import get_config_model_id, use_adapter

from .amortized_selector import AmortizedSelector
from .batch_layout import PaddedLayout, padded
from .bilevel_sft_config import BilevelSFTConfig
from .bilevel_step import BilevelStep
from .curation import curate_dataset
from .data_selector import DataSelector
from .dataset_checks import (
    check_batch_sizes,
    check_datasets,
    check_prepared_rows,
    check_training_rows,
    resolve_sample_ids,
    resolve_sources,
)
from .hub_publishing import HubPublishing
from .packing import PackedRows, pack_rows
from .paired_batches import (
    OPTIMIZER_STEP,
    SAMPLE_INDEX_COLUMN,
    PairedCollator,
    PairedDataset,
    PairedSampler,
    ValidationStream,
    add_sample_indices,
    read_sample_indices,
)
from .paired_stream import PairedStream, StreamedPairCollator
from .preference_pairs import REFERENCE_NLL, add_reference_likelihoods, prepare_pairs
from .refine_prompts import QuestionReader, check_refinable, stop_token_ids
from .refined_responses import ResponseStore
from .refinement import Refiner
from .response_checks import RewardFunc, check_reward_funcs
from .response_generation import (
    ResponseGenerator,
    TransformersGenerator,
    VLLMGenerator,
    context_length,
    log_prob_batches,
    model_log_probs,
    ready_to_generate,
)
from .run_records import (
    describe_run,
)
from .scoring import RowScorer, score_dataset
from .selector_setup import build_selector
from .self_refining_collator import SelfRefiningCollator
from .stream_checks import check_stream
from .streamed_curation import curate_stream
from .streamed_selector import StreamedSelector
from .training_metrics import TrainingMetrics
from .value_function import ValueFunction, fits_other_parameters, optimizer_maker
from .weight_history import WeightHistory


logger = get_logger(__name__)

_PREFETCH_FACTOR = 2  # of PyTorch, where a dataloader has workers
_MAX_LOGGED_SOURCES = 20  # more would drown the other metrics; `source_weights` has them all


class BilevelSFTTrainer(HubPublishing, BilevelStep):
    r"""
    [`~trl.SFTTrainer`] that learns, while it trains, how much each training row should count.

    Its one change is the loss of a step. Each batch carries training rows and rows of a trusted validation dataset
    through one forward pass. The model descends $\lambda L_{val} + (1-\lambda) L_{train}(w)$; then the data selector
    moves the weights $w$ of the batch's training rows against their losses. Bilevel data selection, arXiv 2511.21056.

    Where to read it: [`~trl_bilevel.bilevel_step.BilevelStep`] is the step itself; this class prepares the datasets,
    the selector and the value function for it, and hands out the results.

    Args:
        model, args, data_collator, train_dataset, ...:
            As in [`~trl.SFTTrainer`], all of them. A stream (`datasets.IterableDataset`) as `train_dataset` needs
            `max_steps` and `sample_id_column`. `args` is a [`BilevelSFTConfig`]; any other
            [`~transformers.TrainingArguments`] are completed with its defaults.
        validation_dataset (`datasets.Dataset`):
            Rows you trust, in the format of `train_dataset`. They define what a good training row is, and are trained
            on. `eval_dataset` is never seen by either level.
        data_selector ([`DataSelector`] or `str`, *optional*):
            Weights to start from, joined by sample id: a selector of another run, for instance of a smaller model, or
            what [`DataSelector.from_pretrained`] reads. With `selector_learning_rate=0` they stay as they are.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            With `refine_ratio` above 0, decide which refined responses are used: functions as
            [`~trl.GRPOTrainer`] takes them, of `prompts`, `completions` and the dataset's columns.

    Raises:
        `ValueError` or `TypeError`: for datasets or options that cannot work, before training starts.

    Example:

    ```python
    from datasets import load_dataset
    from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

    trainer = BilevelSFTTrainer(
        model="Qwen/Qwen3-0.6B",
        args=BilevelSFTConfig(output_dir="out"),
        train_dataset=load_dataset("json", data_files="mixture.jsonl", split="train"),
        validation_dataset=load_dataset("json", data_files="trusted.jsonl", split="train"),
    )
    trainer.train()
    curated = trainer.curate(keep_ratio=0.7)
    ```
    """

    data_collator: Any
    _signature_columns: list[str]

    def __init__(
        self,
        model: "str | PreTrainedModel",
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *sft_args: Any,
        validation_dataset: Any = None,
        data_selector: DataSelector | str | os.PathLike | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        **sft_kwargs: Any,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = BilevelSFTConfig(f"{model_id.split('/')[-1]}-BilevelSFT")
        elif not isinstance(args, BilevelSFTConfig):
            args = BilevelSFTConfig.from_training_arguments(args)
        check_datasets(train_dataset, validation_dataset, args.validation_loss_type)
        self._source_dataset = train_dataset
        self._is_streamed = isinstance(train_dataset, IterableDataset)
        self._sample_ids: pa.ChunkedArray | None = None  # of a stream the selector knows them
        if self._is_streamed:
            self._stream_ids = check_stream(train_dataset, args, data_selector)
        else:
            self._sample_ids = resolve_sample_ids(train_dataset, args.sample_id_column)
        self._sources = resolve_sources(train_dataset, args.source_column) if args.source_column else None
        if isinstance(data_selector, (str, os.PathLike)):
            data_selector = DataSelector.from_pretrained(data_selector)
        if data_selector is not None and args.selection_method == "bmo":
            raise ValueError(
                "`data_selector` has no effect with `selection_method='bmo'`, whose weights are computed anew at "
                "every step. Leave it out, or use `selection_method='bds'`."
            )
        if isinstance(data_collator, SelfRefiningCollator):
            raise ValueError(
                "BilevelSFTTrainer puts refined responses in by itself. Set `refine_ratio`, and pass as "
                "`data_collator` what you gave to the `SelfRefiningCollator`, or nothing."
            )
        if reward_funcs is not None and args.refine_ratio == 0:
            raise ValueError("`reward_funcs` has no effect without refinement. Set `refine_ratio`, or leave it out.")
        reward_funcs = check_reward_funcs(reward_funcs)
        if args.activation_offloading and not torch.accelerator.is_available():
            raise ValueError(
                "`activation_offloading=True` needs an accelerator to offload from, and there is none here. Leave it "
                "out."
            )
        num_validation = len(validation_dataset)
        trusted_rows = validation_dataset  # as the user passed them

        indexed = train_dataset if self._is_streamed else add_sample_indices(train_dataset)
        super().__init__(model, args, data_collator, indexed, *sft_args, **sft_kwargs)
        self._refuse_unsupported_setup()
        self._warn_about_published_paths()

        self.validation_dataset = self._prepare_validation_dataset(validation_dataset)
        check_prepared_rows("validation_dataset", num_validation, len(self.validation_dataset), args.max_length)
        self._rows_fingerprint = "stream"
        if not self._is_streamed:
            self._rows_fingerprint = check_training_rows(
                self.train_dataset, self.validation_dataset, args, self._sample_ids, self._sources
            )

        self._pack()
        self._set_validation_batch_size()
        has_value_function = self._resolve_value_function()
        self.data_selector = build_selector(args, has_value_function, data_selector, self._sample_ids, self._sources)
        if data_selector is not None:
            num_known = self.data_selector.start_from(data_selector)
            logger.info(f"{num_known} of {len(train_dataset)} rows start with a weight of the given selector.")
        if args.validation_loss_type == "dpo":
            self._add_reference_likelihoods()
        self.value_function = self._build_value_function() if has_value_function else None
        self.amortized_selector = (
            AmortizedSelector(self.model.config.get_text_config().hidden_size, args.seed)
            if args.amortized_selector
            else None
        )
        self._training_metrics = TrainingMetrics()
        self._weight_history = WeightHistory()
        self._run_facts = describe_run(args, self.model, train_dataset, trusted_rows, has_value_function)
        self._curated_repo_id: str | None = None  # once it was pushed
        self.response_store = ResponseStore(self._responses_folder)
        self.refiner = self._build_refiner(reward_funcs) if args.refine_ratio > 0 else None
        self._rows_to_refine = np.zeros(0 if self._is_streamed else len(train_dataset), dtype=bool)
        if not self._is_streamed:
            self._rows_to_refine[read_sample_indices(self.train_dataset)] = True
        # Batches that are collated before the answers of a refresh are there: those that the workers hold, and one
        # that accelerate fetches ahead
        num_ahead = 1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or _PREFETCH_FACTOR)
        self._refresh_delay = math.ceil(num_ahead / args.gradient_accumulation_steps)

    def _pack(self) -> None:
        """Packed sequences of rows, by the rows' numbers; `None` for rows that have a sequence each."""
        args = self.args
        self.packed_training: PackedRows | None = None
        self.packed_validation: PackedRows | None = None
        if not args.packing:
            return
        assert args.max_length is not None
        self.packed_training = pack_rows(self.train_dataset, args.max_length, "train")
        if args.shuffle_dataset:  # as TRL does, once more after packing
            self.packed_training = self.packed_training.shuffled(args.seed)
        if args.validation_loss_type == "nll":  # a pair's two completions stay next to each other
            self.packed_validation = pack_rows(self.validation_dataset, args.max_length, "validation")

    def _set_validation_batch_size(self) -> None:
        args = self.args
        batches_per_step = args.gradient_accumulation_steps * args.world_size
        training = self.train_dataset if self.packed_training is None else self.packed_training
        validation = self.validation_dataset if self.packed_validation is None else self.packed_validation
        batch_size = args.per_device_validation_batch_size
        if batch_size is None:
            batch_size = args.per_device_train_batch_size
            if self.packed_validation is not None:
                # A small dataset packs into few sequences
                batch_size = max(1, min(batch_size, len(validation) // batches_per_step))
        self.validation_batch_size = batch_size
        check_batch_sizes(
            num_training=None if self._is_streamed else len(training),
            num_validation=len(validation),
            training_batch=args.per_device_train_batch_size * batches_per_step,
            validation_batch=batch_size * batches_per_step,
            are_packed=self.packed_training is not None,
        )

    def _refuse_unsupported_setup(self) -> None:
        if self.args.validation_loss_type == "dpo" and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "`validation_loss_type='dpo'` is not supported with DeepSpeed or FSDP: the reference's likelihoods "
                "are computed before the model is sharded. Use plain data parallelism, or "
                "`validation_loss_type='nll'`."
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: it would replace the bilevel objective. Remove it, or override "
                "`compute_loss`."
            )
        checkpointing = self.args.activation_checkpointing_kwargs or self.args.gradient_checkpointing_kwargs or {}
        if self.args.activation_checkpointing and checkpointing.get("selective") and is_peft_model(self.model):
            raise ValueError(
                "Selective activation checkpointing does not work with a PEFT adapter, whose layers PyTorch's own "
                "checkpointing runs. Leave out `selective`, or train without `peft_config`."
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Tensor, context and sequence parallelism are not supported: they split a row's loss over processes. "
                f"Use data parallelism only, got {parallelism}."
            )

    def _resolve_value_function(self) -> bool:
        args = self.args
        if args.value_function is not None:
            return args.value_function == "adapter"
        works = (
            is_peft_model(self.model)
            and args.selection_method == "bds"
            and args.selector_optimizer == "mirror_descent"
            and not (self.is_deepspeed_enabled or self.is_fsdp_enabled or args.fp16)
            and self.optimizer is None
            and fits_other_parameters(*self._optimizer_recipe())
        )
        rows_default = BilevelSFTConfig.__dataclass_fields__["value_function_rows"].default
        if not works and args.value_function_rows != rows_default:
            raise ValueError(
                f"`value_function_rows={args.value_function_rows!r}` has no effect without a value function, which "
                "this run does not get by default. Leave it out, or set `value_function='adapter'`."
            )
        return works

    def _build_value_function(self) -> ValueFunction:
        if not is_peft_model(self.model):
            raise ValueError(
                "`value_function='adapter'` needs a model with a PEFT adapter: without one it would be a second copy "
                "of the model. Pass `peft_config=LoraConfig(...)`, or use `value_function='none'`."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.fp16:
            raise ValueError(
                "`value_function='adapter'` is not supported with DeepSpeed, FSDP or fp16, which move or scale the "
                "adapter's parameters and gradients. Use plain data parallelism and bf16, or `value_function='none'`."
            )
        if self.optimizer is not None:
            raise ValueError(
                "`value_function='adapter'` needs an optimizer of its own, of the same kind as the model's, and "
                "cannot copy the one in `optimizers`. Pass `optimizer_cls_and_kwargs`, or use `value_function='none'`."
            )
        names = [name for name, value in self.model.named_parameters() if value.requires_grad]
        make_optimizer = optimizer_maker(*self._optimizer_recipe(), self.args.weight_decay, self.args.optim)
        return ValueFunction(self.model, names, make_optimizer, self.args.max_grad_norm)

    def _build_refiner(self, reward_funcs: list[RewardFunc]) -> Refiner:
        args = self.args
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "`refine_ratio` is not supported with DeepSpeed or FSDP yet: a process cannot generate with a model "
                "that is spread over others. Use plain data parallelism, or `refine_ratio=0`."
            )
        rows = self._source_dataset.with_format(None)
        reader = QuestionReader(rows, self._tokenizer, self.chat_template, args.refine_prompt_template)
        check_refinable(reader, self._formatting_func is not None, reward_funcs)
        stop_ids = stop_token_ids(
            self._tokenizer, self.model.generation_config.eos_token_id, self.chat_template, rows[0]
        )
        if args.refine_reward_threshold != 0 and not reward_funcs:
            raise ValueError(
                f"`refine_reward_threshold={args.refine_reward_threshold}` has no effect without `reward_funcs`. Pass "
                "them, or leave it out."
            )
        # As TRL asks it: only quantized models have these
        is_quantized = getattr(self.model, "is_loaded_in_4bit", False) or getattr(
            self.model, "is_loaded_in_8bit", False
        )
        if args.use_vllm and is_quantized:
            raise ValueError(
                "`use_vllm=True` is not supported with a quantized model: sending the weights over merges the adapter "
                "into the base and out again, which changes a quantized base. Use `use_vllm=False`."
            )
        self._log_prob_batches = log_prob_batches(args.per_device_train_batch_size + self.validation_batch_size)
        batch_size = args.refine_batch_size or 4 * args.per_device_train_batch_size
        generator: ResponseGenerator
        if args.use_vllm:
            generator = VLLMGenerator(self.model, self.accelerator, self._tokenizer, stop_ids, args, batch_size)
        else:
            generator = TransformersGenerator(self.model, self._tokenizer, stop_ids, args, self.accelerator.autocast)
        return Refiner(
            args,
            reader,
            generator,
            self._generation_log_probs,
            self._tokenizer,
            stop_ids,
            reward_funcs,
            args.max_length,
            context_length(self.model),
            batch_size,
            args,
        )

    def _generation_log_probs(self, examples: list[dict[str, list[int]]]) -> list[list[float]]:
        """Of labelled tokens under the model as it is now, by the forward pass of training."""
        with ready_to_generate(self.model):
            return model_log_probs(
                examples,
                padded(self.data_collator),
                lambda batch: self._forward(self.model, self._prepare_inputs(batch), PaddedLayout())[0],
                self._log_prob_batches,
            )

    def _optimizer_recipe(self) -> tuple[Any, dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        return self.get_optimizer_cls_and_kwargs(self.args, self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in Trainer.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint's folder; `True` for the newest one in
                `output_dir` that was written to its end; `"last_intact"` to pass over damaged ones too.
            *args, **kwargs: as in Trainer.

        Raises:
            `ValueError`: if the checkpoint is torn or damaged, naming the file, or belongs to other rows or options.
        """
        resume_from_checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        if self.refiner is not None:
            # Responses are known by the step they were made at, so every training has a folder of its own; going on
            # from a checkpoint replaces it
            run = [secrets.token_hex(4)]
            broadcast_object_list(run)
            self.response_store.go_on_as(ResponseStore(self._responses_folder, run[0], self.refiner.settings))
        self._weight_history = WeightHistory()  # whose time runs from now
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # ---- Data: training and validation rows in one batch ----
    def _prepare_validation_dataset(self, dataset: Dataset) -> Dataset:
        if self.args.validation_loss_type == "dpo":
            return prepare_pairs(dataset, self)
        self._reject_skip_prepare_without_labels({"validation": dataset}, self.data_collator)
        if self._skip_prepare_dataset:
            return dataset
        return self._prepare_dataset(
            dataset, self.processing_class, self.args, False, self._formatting_func, "validation"
        )

    def _add_reference_likelihoods(self) -> None:
        """DPO's reference: the adapter switched off, or without one the model before its first step."""
        reference = use_adapter(self.model, None) if is_peft_model(self.model) else nullcontext()
        was_training = self.model.training
        self.model.eval()
        with reference, self.accelerator.autocast():  # the model itself is not prepared yet
            self.validation_dataset = add_reference_likelihoods(
                self.validation_dataset,
                padded(self.data_collator),
                lambda batch: self._forward(self.model, self._prepare_inputs(batch), PaddedLayout())[1],
                batch_size=self.validation_batch_size,
            )
        self.model.train(was_training)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        processing_class, config, packing, formatting_func, dataset_name = args
        if SAMPLE_INDEX_COLUMN in (dataset.column_names or []):
            packing = False  # training rows are packed by number, see `_pack`
        if formatting_func is not None:
            # The user's function may format every column it is given
            user_func = formatting_func

            def formatting_func(row: dict[str, Any]) -> str:
                return user_func({name: value for name, value in row.items() if name != SAMPLE_INDEX_COLUMN})

        return super()._prepare_dataset(dataset, processing_class, config, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SAMPLE_INDEX_COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, SAMPLE_INDEX_COLUMN, OPTIMIZER_STEP, REFERENCE_NLL]

    def get_train_dataloader(self) -> DataLoader:
        training, validation = self.train_dataset, self.validation_dataset
        if self.args.remove_unused_columns:
            if not self._is_streamed:
                training = self._remove_unused_columns(training, description="training")
            if self.args.validation_loss_type == "nll":
                validation = self._remove_unused_columns(validation, description="validation")
        # Trainer builds its dataloaders with `self.data_collator`, which evaluation needs as it is
        self_refining = None
        if self.refiner is not None:
            self_refining = SelfRefiningCollator(self.data_collator)
            self_refining.store = self.response_store
        collator = self.data_collator
        self.data_collator = PairedCollator(collator, self_refining, self._refresh_delay, self.padding_free)
        dataset: PairedDataset | PairedStream
        if self._is_streamed:
            dataset = self._paired_stream(training)
            self.data_collator = StreamedPairCollator(self.data_collator, validation)
        else:
            dataset = PairedDataset(training, validation, self.packed_training, self.packed_validation)
        try:
            return self._get_dataloader(
                dataset=dataset,
                description="Training",
                batch_size=self._train_batch_size,
                sampler_fn=self._get_paired_sampler,
                is_training=True,
            )
        finally:
            self.data_collator = collator

    def _paired_stream(self, training: IterableDataset) -> PairedStream:
        assert isinstance(self.data_selector, StreamedSelector)
        columns = None
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            columns = self._signature_columns
        return PairedStream(
            training,
            self._validation_stream(len(self.validation_dataset)),
            self._stream_ids,
            columns,
            training_batch_size=self.args.per_device_train_batch_size,
            validation_batch_size=self.validation_batch_size,
            consumed=self.data_selector.consumed,
        )

    def _validation_stream(self, num_rows: int) -> ValidationStream:
        return ValidationStream(num_rows, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _get_paired_sampler(self, dataset: PairedDataset) -> Sampler:
        # As in SFTTrainer without the columns that training does not use, which may have any name, also "length"
        sampler = self._get_train_sampler(self.packed_training or dataset.training)
        if isinstance(sampler, RandomSampler) and self.args.accelerator_config.use_seedable_sampler:
            # What accelerate makes of a bare RandomSampler, so that rows come in the order of SFTTrainer
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=self.args.data_seed)
        dataset.sampler = PairedSampler(
            sampler,
            self._validation_stream(dataset.num_validation),
            training_batch_size=self.args.per_device_train_batch_size,
            validation_batch_size=self.validation_batch_size,
            batches_per_step=self.args.world_size * self.args.gradient_accumulation_steps,
            steps_per_epoch=self._steps_per_epoch(len(sampler)),
        )
        return dataset.sampler

    def _steps_per_epoch(self, num_rows: int) -> int:
        round_batches = math.floor if self.args.dataloader_drop_last else math.ceil
        num_batches = round_batches(num_rows / (self._train_batch_size * self.args.world_size))
        return max(1, math.ceil(num_batches / self.args.gradient_accumulation_steps))

    # ---- Logs ----
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics = self._training_metrics.pop(self.accelerator.gather)
            if metrics:
                self._total_train_tokens += int(metrics["num_tokens"])
                metrics["num_tokens"] = self._total_train_tokens
                if not self.aux_loss_enabled:
                    del metrics["aux_loss"]
                if self.refiner is None:
                    del metrics["refine/row_ratio"]
                if self.args.validation_loss_type != "dpo":
                    metrics = {name: value for name, value in metrics.items() if not name.startswith("rewards/")}
                metrics["validation_weight"] = self._step_validation_weight
                statistics = self.data_selector.statistics()
                metrics |= {f"selector/{name}": value for name, value in statistics._asdict().items()}
                if self._sources is not None and len(self._sources.names) <= _MAX_LOGGED_SOURCES:
                    metrics |= {f"source_weight/{name}": value for name, value in self.source_weights().items()}
            self._metrics["train"].update({name: [value] for name, value in metrics.items()})
        super().log(logs, start_time)

    # ---- Results and checkpoints ----
    def curate(self, keep_ratio: float | None = None) -> Dataset | IterableDataset:
        """
        The training dataset with every row's score, and only its best rows if `keep_ratio` is given.

        Args:
            keep_ratio (`float`, *optional*): share of rows to keep, in (0, 1]; `None` keeps and scores all.

        Returns:
            `datasets.Dataset`: the columns of `train_dataset` unchanged but for refined answers, then `sample_id`,
            `weight`, `rank`, `scored` and `response_source`; with refinement also `original_completion` and
            `refined_responses`. See [`~trl_bilevel.curation.curate_dataset`]. Of a stream a `datasets.IterableDataset`
            of the rows seen, which reads the stream again; see
            [`~trl_bilevel.streamed_curation.curate_stream`].

        Raises:
            `ValueError`: if `keep_ratio` is out of range.
        """
        if isinstance(self.data_selector, StreamedSelector):
            return curate_stream(self._source_dataset, self._stream_ids, self.data_selector, keep_ratio)
        assert self._sample_ids is not None
        return curate_dataset(
            self._source_dataset,
            self._sample_ids,
            weights=self.data_selector.weights().numpy(),
            scores=self.data_selector.logits.numpy(),
            scored=self.data_selector.scored.numpy(),
            judged=self.data_selector.judged.numpy(),
            keep_ratio=keep_ratio,
            responses=None if self.refiner is None else self.response_store.table(),
        )

    def score(
        self,
        dataset: Dataset | IterableDataset,
        output_dir: str | os.PathLike | None = None,
        batch_size: int | None = None,
        chunk_size: int = 10_000,
    ) -> Dataset:
        """
        Score rows that were never trained on, so that a run on a sample curates a corpus far larger.

        One forward pass a row, batched by length; with a value function a second one.

        Args:
            dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows in the format of `train_dataset`.
            output_dir (`str` or `os.PathLike`, *optional*): where the rows are written as Parquet, a file for every
                chunk as soon as it is scored. A call that was interrupted goes on where it stopped. Needed for a
                stream.
            batch_size (`int`, *optional*): rows per forward pass, by default `per_device_eval_batch_size`.
            chunk_size (`int`): rows per chunk.

        Returns:
            `datasets.Dataset`: the columns of `dataset` and `score`, higher is better: the loss under the value
            function minus the loss, in nats per completion token, or without a value function the negative loss. Also
            `loss`, `value_loss` where there is a value function, and `selector_score` with `amortized_selector=True`.
            NaN for rows without completion tokens after truncation.

        Raises:
            `ValueError`: for a stream without `output_dir`, an empty dataset, columns that scoring adds itself, or an
                `output_dir` with scores of another model.
        """
        if self.args.world_size > 1:
            raise ValueError("Scoring runs on one process. Save the model and use `trl-bilevel score`.")
        scorer = RowScorer(
            self, self.value_function, self.amortized_selector, batch_size or self.args.per_device_eval_batch_size
        )
        return score_dataset(scorer, dataset, output_dir, chunk_size)

    def source_weights(self) -> dict[str | int, float]:
        """
        The weight of each source, the highest first; weights have mean 1 over rows.

        Raises:
            `ValueError`: without `source_column`.
        """
        if self._sources is None:
            raise ValueError("Rows have weights of their own. Set `source_column` for one weight per source.")
        weights = dict(zip(self._sources.names.to_pylist(), self.data_selector.source_weights().tolist(), strict=True))
        return dict(sorted(weights.items(), key=lambda item: -item[1]))
