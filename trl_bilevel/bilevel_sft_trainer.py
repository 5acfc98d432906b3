"""The bilevel step, inside TRL's training loop."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id, use_adapter

from .bilevel_sft_config import BilevelSFTConfig
from .curation import curate_dataset
from .data_selector import DataSelector
from .dataset_checks import (
    check_batch_sizes,
    check_datasets,
    check_prepared_rows,
    fingerprint_rows,
    hash_rows,
    resolve_sample_ids,
    resolve_sources,
    warn_about_shared_rows,
)
from .losses import (
    RowLosses,
    closed_form_log_weights,
    filter_threshold,
    preference_losses,
    row_losses,
    validation_weight_at,
)
from .paired_batches import (
    SAMPLE_INDEX_COLUMN,
    SAMPLE_INDICES,
    PairedCollator,
    PairedDataset,
    PairedSampler,
    ValidationStream,
    add_sample_indices,
    read_sample_indices,
)
from .preference_pairs import REFERENCE_NLL, add_reference_likelihoods, prepare_pairs
from .step_rows import STEP_ROWS, StepRows, set_coefficients, total_size
from .training_metrics import RowCounts, TrainingMetrics, sum_tokens


logger = get_logger(__name__)

_MAX_LOGGED_SOURCES = 20  # more would drown the other metrics; `source_weights` has them all

_PAPER_TITLE = "Bilevel Data Curation for LLM Fine-tuning: Offline Selection and Online Self-Refining Generation"
_PAPER_CITATION = f"""\
@article{{xiao2025bilevel,
    title        = {{{{{_PAPER_TITLE}}}}},
    author       = {{Quan Xiao and Yutong Xuan and Gaowen Liu and Ramana Rao Kompella and Tianyi Chen}},
    year         = 2025,
    eprint       = {{arXiv:2511.21056}},
}}"""


class BilevelSFTTrainer(SFTTrainer):
    r"""
    [`~trl.SFTTrainer`] that learns, while it trains, how much each training row should count.

    Its one change is the loss of a step. Each batch carries training rows and rows of a trusted validation dataset
    through one forward pass. The model descends $\lambda L_{val} + (1-\lambda) L_{train}(w)$; then the data selector
    moves the weights $w$ of the batch's training rows against their losses. Bilevel data selection, arXiv 2511.21056.

    Where to read it: [`get_batch_samples`] looks up weights, [`compute_loss`] is the model's level, and
    [`training_step`] ends with the selector's level.

    Args:
        model, args, data_collator, train_dataset, ...:
            As in [`~trl.SFTTrainer`], all of them. `args` is a [`BilevelSFTConfig`]; any other
            [`~transformers.TrainingArguments`] are completed with its defaults.
        validation_dataset (`datasets.Dataset`):
            Rows you trust, in the format of `train_dataset`. They define what a good training row is, and are trained
            on. `eval_dataset` is never seen by either level.
        data_selector ([`DataSelector`] or `str`, *optional*):
            Weights to start from, joined by sample id: a selector of another run, for instance of a smaller model, or
            what [`DataSelector.from_pretrained`] reads. With `selector_learning_rate=0` they stay as they are.

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

    _tag_names = ["trl", "bilevel-sft"]
    _name = "Bilevel SFT"
    _paper = {"title": _PAPER_TITLE, "id": "2511.21056", "citation": _PAPER_CITATION}

    # `compute_loss` divides by the tokens of the whole optimizer step
    loss_is_scaled_for_ga = True

    args: BilevelSFTConfig
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
        **sft_kwargs: Any,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = BilevelSFTConfig(f"{model_id.split('/')[-1]}-BilevelSFT")
        elif not isinstance(args, BilevelSFTConfig):
            args = BilevelSFTConfig.from_training_arguments(args)
        check_datasets(train_dataset, validation_dataset, args.validation_loss_type)
        self._source_dataset = train_dataset
        self._sample_ids = resolve_sample_ids(train_dataset, args.sample_id_column)
        self._sources = resolve_sources(train_dataset, args.source_column) if args.source_column else None
        if isinstance(data_selector, (str, os.PathLike)):
            data_selector = DataSelector.from_pretrained(data_selector)
        if data_selector is not None and args.selection_method == "bmo":
            raise ValueError(
                "`data_selector` has no effect with `selection_method='bmo'`, whose weights are computed anew at "
                "every step. Leave it out, or use `selection_method='bds'`."
            )
        num_validation = len(validation_dataset)

        super().__init__(model, args, data_collator, add_sample_indices(train_dataset), *sft_args, **sft_kwargs)
        self._refuse_unsupported_setup()

        self.validation_dataset = self._prepare_validation_dataset(validation_dataset)
        check_prepared_rows("train_dataset", len(train_dataset), len(self.train_dataset), args.max_length)
        check_prepared_rows("validation_dataset", num_validation, len(self.validation_dataset), args.max_length)
        row_hashes = hash_rows(self.train_dataset)
        validation_tokens = "chosen_input_ids" if args.validation_loss_type == "dpo" else "input_ids"
        warn_about_shared_rows(row_hashes, hash_rows(self.validation_dataset, validation_tokens))
        self._rows_fingerprint = fingerprint_rows(
            self._sample_ids, read_sample_indices(self.train_dataset), row_hashes, self._sources
        )

        self.validation_batch_size = args.per_device_validation_batch_size or args.per_device_train_batch_size
        batches_per_step = args.gradient_accumulation_steps * args.world_size
        check_batch_sizes(
            num_training=len(self.train_dataset),
            num_validation=len(self.validation_dataset),
            training_batch=args.per_device_train_batch_size * batches_per_step,
            validation_batch=self.validation_batch_size * batches_per_step,
        )
        self.data_selector = DataSelector(
            num_rows=len(train_dataset),
            activation=args.selector_activation,
            optimizer=args.selector_optimizer,
            learning_rate=args.selector_learning_rate,
            sources=None if self._sources is None else self._sources.of_rows,
            sample_ids=self._sample_ids,
        )
        if data_selector is not None:
            num_known = self.data_selector.start_from(data_selector)
            logger.info(f"{num_known} of {len(train_dataset)} rows start with a weight of the given selector.")
        if args.validation_loss_type == "dpo":
            self._add_reference_likelihoods()
        self._training_metrics = TrainingMetrics()
        self._step_sample_indices = torch.empty(0, dtype=torch.int64)  # training rows of the current optimizer step
        self._step_row_means: list[torch.Tensor] = []  # their losses, one tensor per micro-batch of this process
        self._step_validation_weight = args.validation_weight

    def _refuse_unsupported_setup(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: it would replace the bilevel objective. Remove it, or override "
                "`compute_loss`."
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Tensor, context and sequence parallelism are not supported: they split a row's loss over processes. "
                f"Use data parallelism only, got {parallelism}."
            )

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
        with reference, self.compute_loss_context_manager():
            self.validation_dataset = add_reference_likelihoods(
                self.validation_dataset,
                self.data_collator,
                lambda batch: self._forward(self.model, self._prepare_inputs(batch))[1],
                batch_size=self.validation_batch_size,
            )
        self.model.train(was_training)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        processing_class, config, packing, formatting_func, dataset_name = args
        if formatting_func is not None:
            # The user's function may format every column it is given
            user_func = formatting_func

            def formatting_func(row: dict[str, Any]) -> str:
                return user_func({name: value for name, value in row.items() if name != SAMPLE_INDEX_COLUMN})

        return super()._prepare_dataset(dataset, processing_class, config, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SAMPLE_INDEX_COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, SAMPLE_INDEX_COLUMN, REFERENCE_NLL]

    def get_train_dataloader(self) -> DataLoader:
        training, validation = self.train_dataset, self.validation_dataset
        if self.args.remove_unused_columns:
            training = self._remove_unused_columns(training, description="training")
            if self.args.validation_loss_type == "nll":
                validation = self._remove_unused_columns(validation, description="validation")
        # Trainer builds its dataloaders with `self.data_collator`, which evaluation needs as it is
        collator, self.data_collator = self.data_collator, PairedCollator(self.data_collator)
        try:
            return self._get_dataloader(
                dataset=PairedDataset(training, validation),
                description="Training",
                batch_size=self._train_batch_size,
                sampler_fn=self._get_paired_sampler,
                is_training=True,
            )
        finally:
            self.data_collator = collator

    def _get_paired_sampler(self, dataset: PairedDataset) -> Sampler:
        sampler = self._get_train_sampler(self.train_dataset)
        if isinstance(sampler, RandomSampler) and self.args.accelerator_config.use_seedable_sampler:
            # What accelerate makes of a bare RandomSampler, so that rows come in the order of SFTTrainer
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=self.args.data_seed)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        dataset.sampler = PairedSampler(
            sampler,
            ValidationStream(len(dataset.validation), seed),
            training_batch_size=self.args.per_device_train_batch_size,
            validation_batch_size=self.validation_batch_size,
        )
        return dataset.sampler

    # ---- The bilevel step ----
    @property
    def validation_weight(self) -> float:
        """lambda, the weight of the validation loss, in the current epoch."""
        return validation_weight_at(
            self.state.epoch or 0, self.args.validation_weight, self.args.validation_weight_decay
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Once per optimizer step: how much each row of its micro-batches counts in the objective."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._start_step(batches)
            if self.args.selection_method == "bds":
                self._weigh_rows(batches, self.data_selector.weights_of(self._step_sample_indices))
            elif len(batches) > 1:
                # The weights of BMO compare the losses of all micro-batches, which are not known before the first
                # backward pass: an extra forward pass without gradient. A single micro-batch weighs its rows itself.
                row_means = torch.cat([self._row_means_without_gradient(batch) for batch in batches])
                self._weigh_rows(batches, self._closed_form_weights(row_means))
        return batches, num_items_in_batch

    def _start_step(self, batches: list[dict[str, Any]]) -> None:
        indices = [batch.pop(SAMPLE_INDICES) for batch in batches]
        self._step_sample_indices = self._gather_rows(torch.tensor([index for batch in indices for index in batch]))
        self._step_row_means = []
        self._step_validation_weight = self.validation_weight
        for batch, sample_indices in zip(batches, indices, strict=True):
            reference_nll = torch.tensor(batch.pop(REFERENCE_NLL), device=self.args.device)
            batch[STEP_ROWS] = StepRows(len(sample_indices), reference_nll)

    def _weigh_rows(self, batches: list[dict[str, Any]], step_weights: torch.Tensor) -> None:
        """Set the coefficients of all rows from the weights of the step's training rows, those of all processes."""
        normalization = self.args.loss_normalization
        threshold = filter_threshold(step_weights, self.args.filter_ratio)
        step_rows: list[StepRows] = [batch[STEP_ROWS] for batch in batches]
        own_weights = step_weights.view(self.accelerator.num_processes, -1)[self.accelerator.process_index]
        micro_weights = own_weights.split([rows.num_training for rows in step_rows])
        micro_batches = [
            rows.weighted(weights.to(self.args.device), threshold, batch["labels"].to(self.args.device))
            for rows, weights, batch in zip(step_rows, micro_weights, batches, strict=True)
        ]
        size = total_size(micro_batches, normalization)
        if self.args.average_tokens_across_devices:
            size = self.accelerator.reduce(size)
        set_coefficients(step_rows, micro_batches, size, self._step_validation_weight, normalization)

    def _closed_form_weights(self, row_means: torch.Tensor) -> torch.Tensor:
        return closed_form_log_weights(self._gather_rows(row_means), self.args.bmo_temperature).exp()

    @torch.no_grad()
    def _row_means_without_gradient(self, batch: dict[str, Any]) -> torch.Tensor:
        self.model.train()
        inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != STEP_ROWS})
        with self.compute_loss_context_manager():
            _, losses = self._forward(self.model_wrapped, inputs)
        return losses.mean[: batch[STEP_ROWS].num_training].float().cpu()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's level: lambda * L_val + (1 - lambda) * L_train(w), one forward pass over both kinds of row."""
        if STEP_ROWS not in inputs:  # evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        rows: StepRows = inputs.pop(STEP_ROWS)
        num_training = rows.num_training

        outputs, losses = self._forward(model, inputs)
        # The one transfer from the device: it serves the check below and the selector's level
        nll, num_tokens = torch.stack([losses.nll.detach(), losses.num_tokens]).cpu()  # (R,) each, R = T + V or T + 2P
        self._step_row_means.append((nll / num_tokens)[: rows.num_training])
        if rows.coefficients is None:
            weights = self._closed_form_weights(self._step_row_means[-1])
            self._weigh_rows([{"labels": inputs["labels"], STEP_ROWS: rows}], weights)
        finite = rows.with_whole_pairs(nll.isfinite())
        num_nonfinite = int((~finite).sum())
        if self._any_process(num_nonfinite > 0):
            # A NaN in the graph reaches every gradient, even with coefficient 0, so such rows must leave the batch.
            # All processes take part in the second forward pass, also one that has nothing left to learn from.
            staying = finite if finite.any() else ~finite
            inputs = {name: value[staying.to(value.device)] for name, value in inputs.items()}
            outputs, losses = self._forward(model, inputs)
            rows = rows.only(staying)
        preferences = None
        if not finite.any():
            loss = self._zero_loss()
            losses = RowLosses(losses.nll[:0], losses.num_tokens[:0])
            logger.warning(
                f"All {len(finite)} rows of a batch have a NaN or infinite loss, so it was skipped. If this goes on, "
                "the model has diverged: lower `learning_rate`."
            )
        else:
            assert rows.coefficients is not None
            validation_losses = losses.nll[rows.num_training :]  # (V,)
            if self.args.validation_loss_type == "dpo":
                preferences = preference_losses(validation_losses, rows.reference_nll, self.args.beta)
                validation_losses = preferences.losses  # (P,)
            loss = (rows.coefficients * torch.cat([losses.nll[: rows.num_training], validation_losses])).sum()

        if self.args.average_tokens_across_devices:
            # The coefficients divide by the tokens of all processes, and DDP averages over processes again
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled and finite.any():
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps

        self._training_metrics.add(
            sum_tokens(
                losses,
                outputs.entropy,
                outputs.is_top1,
                num_training_rows=rows.num_training if finite.any() else 0,
                input_tokens=self._count_input_tokens(inputs),
                aux_loss=outputs.aux_loss if self.aux_loss_enabled else loss.new_zeros(()),
                preferences=preferences,
            ),
            RowCounts(num_training, rows.num_filtered, num_nonfinite),
        )
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """After the backward pass of the last micro-batch, the selector's level: one update of the batch's weights."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            row_means = self._gather_rows(torch.cat(self._step_row_means))
            if self.args.selection_method == "bds":
                self.data_selector.update(self._step_sample_indices, row_means)
            else:
                log_weights = closed_form_log_weights(row_means, self.args.bmo_temperature)
                self.data_selector.assign(self._step_sample_indices, log_weights)
        return loss

    def _forward(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Any, RowLosses]:
        if self.aux_loss_enabled:
            outputs = model(**inputs, use_cache=False, output_router_logits=True, fused_lm_head=True)
        else:
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return outputs, row_losses(outputs.log_probs, outputs.label_mask)

    def _zero_loss(self) -> torch.Tensor:
        """Exactly 0, also when parameters are NaN, with a zero gradient for every trained parameter."""
        empty = [parameter.flatten()[:0] for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.cat([values.float() for values in empty]).sum()

    @staticmethod
    def _count_input_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if "attention_mask" in inputs:
            return inputs["attention_mask"].sum()
        return torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)

    def _gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all processes' rows, in the same order on each, on the CPU."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def _any_process(self, condition: bool | torch.Tensor) -> bool:
        """Whether the condition holds on any process; all of them must take the same branch around a forward pass."""
        flag = torch.as_tensor(condition, dtype=torch.int64).reshape(1)
        return bool(self._gather_rows(flag).any())

    # ---- Logs ----
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics = self._training_metrics.pop(self.accelerator.gather)
            if metrics:
                self._total_train_tokens += int(metrics["num_tokens"])
                metrics["num_tokens"] = self._total_train_tokens
                if not self.aux_loss_enabled:
                    del metrics["aux_loss"]
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
    def curate(self, keep_ratio: float | None = None) -> Dataset:
        """
        The training dataset with every row's score, and only its best rows if `keep_ratio` is given.

        Args:
            keep_ratio (`float`, *optional*): share of rows to keep, in (0, 1]; `None` keeps and scores all.

        Returns:
            `datasets.Dataset`: the columns of `train_dataset` unchanged, then `sample_id`, `weight`, `rank`, `scored`
            and `response_source`, see [`~trl_bilevel.curation.curate_dataset`].

        Raises:
            `ValueError`: if `keep_ratio` is out of range.
        """
        return curate_dataset(
            self._source_dataset,
            self._sample_ids,
            weights=self.data_selector.weights().numpy(),
            scores=self.data_selector.logits.numpy(),
            scored=self.data_selector.scored.numpy(),
            keep_ratio=keep_ratio,
        )

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Part of every checkpoint and of the final model, also with `save_only_model`; before a push would upload it
        if self.args.should_save:
            directory = output_dir or self.args.output_dir
            os.makedirs(directory, exist_ok=True)
            self.data_selector.save(directory, self._rows_fingerprint)
        super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.data_selector.load(self.state.best_model_checkpoint, self._rows_fingerprint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.data_selector.load(checkpoint, self._rows_fingerprint)
