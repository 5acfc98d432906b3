"""What a run writes into its checkpoints and output folder beside the model, and how it goes on from there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from .amortized_selector import AMORTIZED_SELECTOR_FILE_NAME, AmortizedSelector
from .bilevel_sft_config import BilevelSFTConfig
from .checkpoint_files import (
    LAST_INTACT,
    ONLY_TO_RESUME,
    check_checkpoint,
    find_checkpoint,
    is_checkpoint,
    read_resume_option,
    remove_manifest,
    renew_manifest,
    write_manifest,
)
from .data_selector import DataSelector
from .random_state import RandomState
from .ranking_warning import ranking_warning
from .refined_responses import CHECKPOINT_FILE_NAME, ResponseStore
from .refined_responses import FOLDER_NAME as RESPONSES_FOLDER_NAME
from .refinement import Refiner
from .row_scores import save_scores
from .run_records import save_facts, save_training_rows
from .run_settings import write_run_settings
from .screening.verdict import Verdict
from .streamed_selector import StreamedSelector
from .training_log import save_log
from .training_metrics import TrainingMetrics
from .value_function import VALUE_FUNCTION_FILE_NAME, ValueFunction
from .weight_history import WeightHistory
from .whole_files import disk_full_explained


class Checkpointing(SFTTrainer):
    """Checkpoints of [`~trl_bilevel.BilevelSFTTrainer`]: whole or not resumed from, and exact."""

    args: BilevelSFTConfig
    data_selector: DataSelector
    value_function: ValueFunction | None
    amortized_selector: AmortizedSelector | None
    refiner: Refiner | None
    response_store: ResponseStore
    _training_metrics: TrainingMetrics
    _weight_history: WeightHistory
    _rows_fingerprint: str
    _run_facts: dict[str, Any]
    screening: Verdict | None
    _source_dataset: Dataset | IterableDataset
    _saved_checkpoint: Path | None = None
    _begun_step: int | None = None
    _begun_at: RandomState
    _postponed_limit: int | None = None  # the user's `save_total_limit`, while a checkpoint is written

    @property
    def _responses_folder(self) -> Path:
        return Path(self.args.output_dir) / RESPONSES_FOLDER_NAME

    # ---- Writing ----
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in Trainer; older checkpoints are deleted once the new one is known to be whole, and no earlier."""
        self._total_train_tokens += self._training_metrics.pop_input_tokens(self.accelerator.gather)
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            remove_manifest(checkpoint)
        with disk_full_explained(folder):
            with self._rotation_postponed():
                super()._save_checkpoint(model, trial)
            if not self.args.push_to_hub:  # else before the push, see below
                self._finish_checkpoint(checkpoint)
        self._saved_checkpoint = checkpoint
        if self.args.should_save:
            rotate_checkpoints(
                str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer; what callbacks do to a checkpoint once it is saved is part of it."""
        self._saved_checkpoint = None
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._saved_checkpoint is not None:
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                renew_manifest(self._saved_checkpoint)

    @contextmanager
    def _rotation_postponed(self) -> Iterator[None]:
        """Trainer deletes older checkpoints as soon as it has written one, unless there is no limit."""
        self._postponed_limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit, self._postponed_limit = self._postponed_limit, None

    @contextmanager
    def _arguments_as_given(self) -> Iterator[None]:
        """Around what writes `training_args.bin`."""
        postponed = self.args.save_total_limit
        self.args.save_total_limit = postponed if self._postponed_limit is None else self._postponed_limit
        try:
            yield
        finally:
            self.args.save_total_limit = postponed

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with self._arguments_as_given():
            super()._save(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._finish_checkpoint(checkpoint_folder)
        with self._arguments_as_given():
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_checkpoint(self, checkpoint: str | os.PathLike) -> None:
        self.accelerator.wait_for_everyone()  # each process has written the state of its random numbers
        if self.args.should_save:
            write_manifest(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Part of every checkpoint and of the final model, also with `save_only_model`; before a push would upload it
        if self.args.should_save:
            directory = output_dir or self.args.output_dir
            os.makedirs(directory, exist_ok=True)
            self.data_selector.save(directory, self._rows_fingerprint)
            parts = {
                VALUE_FUNCTION_FILE_NAME: self.value_function,
                AMORTIZED_SELECTOR_FILE_NAME: self.amortized_selector,
            }
            for name, part in parts.items():
                if part is not None:
                    part.save(directory)
                else:  # of another run in the same folder
                    (Path(directory) / name).unlink(missing_ok=True)
            self._save_records(directory)
            write_run_settings(directory, self)
        super().save_model(output_dir, _internal_call)

    def _ranking_warning(self) -> str | None:
        return ranking_warning(self._run_facts, self.data_selector.statistics().effective_sample_ratio)

    def _save_records(self, directory: str) -> None:
        """What `trl-bilevel curate`, `push` and `report` need, without the model."""
        os.makedirs(directory, exist_ok=True)
        if self.refiner is not None:
            self.response_store.save(directory)
        else:  # of another run in the same folder
            (Path(directory) / CHECKPOINT_FILE_NAME).unlink(missing_ok=True)
        if isinstance(self._source_dataset, IterableDataset):
            self._run_facts["training"]["num_rows"] = self.data_selector.num_rows
        elif self.args.save_training_rows:
            save_training_rows(self.args.output_dir, self._source_dataset, self._rows_fingerprint)
        self._weight_history.record(self.state.global_step, self.data_selector, self._total_train_tokens)
        self._weight_history.save(directory)
        if (verdict := self._verdict()) is not None:
            self._run_facts["screening"] = verdict.facts
        self._run_facts["cut"] = {"num_dropped": 0 if verdict is None else int(verdict.left_out.sum())}
        self._run_facts["warning"] = self._ranking_warning()
        save_facts(directory, self._run_facts)
        if not is_checkpoint(directory):  # which has Trainer's own
            save_log(directory, self.state)
        # Last: what has scores is complete
        save_scores(
            directory,
            self.data_selector,
            self._rows_fingerprint,
            self.state.global_step,
            self._final_losses,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """
        As in Trainer; and keeps the random state from before the step: a checkpoint written within a step, on SIGTERM,
        is resumed at its beginning.
        """
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._begun_step is not None:
            self._begun_at = RandomState(self.args.device)
        self._begun_step = self.state.global_step
        return batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Of an epoch's first step it is that from before the dataloader's iterator is made, which draws a seed: a
        # resumed run restores the random state before that
        self._begun_step, self._begun_at = None, RandomState(self.args.device)
        return super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._begun_at = RandomState(self.args.device)

    def _save_rng_state(self, output_dir: str) -> None:
        # On SIGTERM within a step, which is done again: dropout has drawn for it already
        with self._begun_at.active() if self._begun_step == self.state.global_step else nullcontext():
            super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.value_function is not None and self.args.should_save:
            self.value_function.save_optimizer(output_dir)

    # ---- Going on ----
    def _choose_checkpoint(self, resume_from_checkpoint: str | os.PathLike | bool | None) -> str | None:
        """The checkpoint to resume from, the same on all processes, or `None` to train from the start."""
        if not resume_from_checkpoint:
            return None
        chosen: list[str | ValueError | None] = [None]  # or why there is none
        if self.is_world_process_zero():
            try:
                asked_for = read_resume_option(resume_from_checkpoint, self.args.output_dir)
                if asked_for is True or asked_for == LAST_INTACT:
                    found = find_checkpoint(self.args.output_dir, skip_damaged=asked_for is not True)
                    chosen = [str(found)]
                elif isinstance(asked_for, str):
                    check_checkpoint(asked_for)
                    chosen = [asked_for]
            except ValueError as refused:
                chosen = [refused]
        found_by_main = broadcast_object_list(chosen)[0]
        if isinstance(found_by_main, ValueError):
            raise found_by_main
        return found_by_main

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._dtypes_kept():
            super()._load_from_checkpoint(*args, **kwargs)

    @contextmanager
    def _dtypes_kept(self) -> Iterator[None]:
        """PEFT loads adapters in fp32: a resumed run would take more memory, and go on otherwise than unbroken."""
        dtypes = {name: value.dtype for name, value in self.model.named_parameters() if value.requires_grad}
        yield
        for name, value in self.model.named_parameters():
            if name in dtypes and value.dtype != dtypes[name]:
                value.data = value.data.to(dtypes[name])

    def _load_best_model(self) -> None:
        check_checkpoint(self.state.best_model_checkpoint, not_needed=ONLY_TO_RESUME)
        with self._dtypes_kept():
            super()._load_best_model()
        for part in (self.value_function, self.amortized_selector):
            if part is not None:
                part.load(self.state.best_model_checkpoint)
        self.data_selector.load(self.state.best_model_checkpoint, self._rows_fingerprint)
        self._weight_history.forget_after(self.state.best_global_step)
        if self.refiner is not None:
            self._load_responses(self.state.best_model_checkpoint)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.value_function is not None:
            self.value_function.start()
        if resume_from_checkpoint is None and isinstance(self.data_selector, StreamedSelector):
            self.data_selector.consumed.restart()  # training reads the stream from its beginning
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.data_selector.load(checkpoint, self._rows_fingerprint)
            self._weight_history = WeightHistory.load(checkpoint)
            self._total_train_tokens = self._weight_history.last_num_tokens
            if self.refiner is not None:
                self._load_responses(checkpoint)
            elif (Path(checkpoint) / CHECKPOINT_FILE_NAME).is_file():
                raise ValueError(
                    f"{checkpoint} was written with refined answers, which `refine_ratio=0` would drop. Resume with "
                    "the `refine_ratio` of that run."
                )
            if self.amortized_selector is not None:
                self.amortized_selector.load(checkpoint)
            if self.value_function is not None:
                self.value_function.load(checkpoint)
                self.value_function.load_optimizer(checkpoint)

    def _load_responses(self, checkpoint: str) -> None:
        assert self.refiner is not None
        store = ResponseStore.load(checkpoint, self._responses_folder, self.refiner.settings)
        self.response_store.go_on_as(store)
