"""Training and validation rows in one batch, by the dataloaders of Trainer."""

import math
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, RandomSampler, Sampler
from trl import SFTTrainer

from .batch_layout import PaddedLayout, padded
from .dataset_checks import check_validation_batch
from .packing import PackedRows, pack_rows
from .paired_batches import (
    OPTIMIZER_STEP,
    SAMPLE_INDEX_COLUMN,
    PairedCollator,
    PairedDataset,
    PairedSampler,
    ValidationStream,
)
from .paired_stream import PairedStream, StreamedPairCollator
from .preference_pairs import REFERENCE_NLL, add_reference_likelihoods, prepare_pairs
from .screening.verdict import Verdict
from .self_refining_collator import SelfRefiningCollator
from .streamed_selector import StreamedSelector


_TRAINING_ROWS_PER_TRUSTED = 4  # where weights come from a screen (docs/real_models.md)


class PairedLoading(SFTTrainer):
    """Prepares the validation rows as TRL prepares the training rows, and puts both into one dataloader."""

    data_collator: Any
    validation_dataset: Dataset
    _signature_columns: list[str]
    screening: Verdict | None

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
        validation = self.validation_dataset if self.packed_validation is None else self.packed_validation
        batch_size = args.per_device_validation_batch_size
        if batch_size is None:
            batch_size = args.per_device_train_batch_size
            if self.screening is not None and self.value_function is None and self.packed_validation is None:
                batch_size = max(1, batch_size // _TRAINING_ROWS_PER_TRUSTED)
            # Few trusted rows, or the few sequences that they pack into, come no more than once in a step; if there
            # are fewer than micro-batches, one to each of them
            batch_size = max(1, min(batch_size, len(validation) // batches_per_step))
        elif self.packed_validation is None:
            are_pairs = args.validation_loss_type == "dpo"
            check_validation_batch(len(validation), batch_size * batches_per_step, are_pairs)
        self.validation_batch_size = batch_size

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
        """DPO's reference: the model before its first step, with whatever its adapter has learned before."""
        if next(self.model.parameters()).device != self.args.device:
            # With `bf16_full_eval` Trainer moves the model when training starts
            self._move_model_to_device(self.model, self.args.device)
        was_training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():  # the model itself is not prepared yet
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
        self.data_collator = PairedCollator(
            collator, self_refining, self._refresh_delay, self.padding_free, self._is_vision_dataset
        )
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
            batches_per_round=1 if self.args.dataloader_drop_last else self.args.world_size,
        )
        return dataset.sampler

    def _steps_per_epoch(self, num_rows: int) -> int:
        round_batches = math.floor if self.args.dataloader_drop_last else math.ceil
        num_batches = round_batches(num_rows / (self._train_batch_size * self.args.world_size))
        return max(1, math.ceil(num_batches / self.args.gradient_accumulation_steps))
