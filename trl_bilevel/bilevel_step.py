"""The bilevel step: what happens to the rows of one optimizer step, inside TRL's training loop."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainerCallback

from .amortized_selector import AmortizedSelector
from .batch_layout import RowOutputs, pop_layout
from .bilevel_sft_config import BilevelSFTConfig
from .data_selector import DataSelector
from .losses import (
    ImportanceRatios,
    PreferenceLosses,
    RowLosses,
    adaptive_validation_weight,
    filter_threshold,
    importance_ratios,
    preference_losses,
    validation_weight_at,
)
from .packing import PackedRows
from .paired_batches import NUM_TOKENS, REFINED_SPANS, ROW_OF_SEQUENCE, SAMPLE_INDICES
from .preference_pairs import REFERENCE_NLL
from .random_state import batch_seed, random_state_kept
from .refined_responses import ResponseStore
from .refinement import Candidates, Refiner, is_refresh_due, refresh_metrics
from .row_forward import RowForward
from .row_gathering import RowGathering
from .selection_methods import build_selection
from .step_rows import STEP_ROWS, StepRows, row_coefficients_of_step
from .streamed_selector import SampleId, StreamedSelector
from .training_metrics import RowCounts, TrainingMetrics, count_input_tokens, sum_tokens
from .value_function import ValueFunction
from .zero_gradients import ZeroGradients, loss_of_nothing


logger = get_logger(__name__)


class _StepEnd(TrainerCallback):
    """Trainer has no method to override between its optimizer's step and the next checkpoint."""

    def __init__(self, trainer: "BilevelStep"):
        self._trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.finish_step()


class BilevelStep(RowForward, RowGathering):
    """
    The two levels of one optimizer step, for [`BilevelSFTTrainer`], which prepares what they work on.

    In the order of events: [`get_batch_samples`] has answers regenerated where that is due, and looks up how much each
    row counts; [`compute_loss`] is the model's level, one forward pass over training and validation rows;
    [`training_step`] goes on after the backward pass, with the value function's where there is one; [`finish_step`]
    is the selector's level, once the model has taken its step.
    """

    # `compute_loss` divides by the tokens of the whole optimizer step
    loss_is_scaled_for_ga = True

    args: BilevelSFTConfig
    data_selector: DataSelector
    value_function: ValueFunction | None
    amortized_selector: AmortizedSelector | None
    refiner: Refiner | None
    response_store: ResponseStore
    packed_training: PackedRows | None
    _has_adaptive_weight: bool
    _trained_rows: np.ndarray
    _refresh_delay: int
    _training_metrics: TrainingMetrics

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_StepEnd(self))
        self._step_row_counts: list[int] = []  # training rows of the current optimizer step, of each process
        self._step_sample_indices = torch.empty(0, dtype=torch.int64)  # which they are
        self._step_sample_ids: list[SampleId] = []  # of a stream
        self._step_row_means: list[torch.Tensor] = []  # their losses, one tensor per micro-batch of this process
        self._step_value_means: list[torch.Tensor] = []  # the same under the value function
        self._step_pooled: list[torch.Tensor] = []  # their pooled hidden states, for the amortized selector
        self._refresh_schedule_checked = False
        self._zero_gradients = ZeroGradients()
        self._selection = build_selection(self.args)

    @property
    def validation_weight(self) -> float:
        """lambda, the weight of the validation loss: of the current epoch, or from the rows that have proved good."""
        largest = self.args.validation_weight
        if self._has_adaptive_weight:
            return adaptive_validation_weight(len(self.validation_dataset), self.data_selector.proved_rows, largest)
        return validation_weight_at(self.state.epoch or 0, largest, self.args.validation_weight_decay)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Once per optimizer step: maybe new answers, then how much each row counts in the objective."""
        if self.state.global_step >= self.state.max_steps:
            # A finished run was resumed: Trainer would train on one batch more, and move its rows' weights
            self.control.should_training_stop = True
            return [], None
        # Before a batch is fetched: the order of events is the same whether the run was interrupted here or not
        if self.refiner is not None:
            self._check_refresh_schedule()
            if self._reaches_a_batch(self.state.global_step):
                self._refine_answers(self.refiner)
            # The new answers are in the batches from here on
            changed = self.response_store.rows_that_change(self.state.global_step - self._refresh_delay)
            self.data_selector.restart(torch.tensor(changed, dtype=torch.int64))
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._start_step(batches)
            step_rows = [batch[STEP_ROWS] for batch in batches]
            if not self._selection.needs_losses:
                self._weigh_rows(step_rows, self._selected_weights())
            elif len(batches) > 1:
                # The weights compare the losses of all micro-batches, which are not known before the first backward
                # pass: an extra forward pass without gradient. A single micro-batch weighs its rows itself.
                row_means = torch.cat([self._row_means_without_gradient(*item) for item in enumerate(batches)])
                self._weigh_rows(step_rows, self._selected_weights(row_means))
            if self.value_function is not None:
                self._weigh_value_function_rows(step_rows)
        return batches, num_items_in_batch

    def _reaches_a_batch(self, step: int) -> bool:
        """Whether a refresh at this step is due, and training is not over before its answers are in a batch."""
        max_steps = self.state.max_steps
        return step + self._refresh_delay < max_steps and is_refresh_due(step, max_steps, self.args)

    def _check_refresh_schedule(self) -> None:
        """Once, when the number of steps is known: say so if refinement will do little."""
        if self._refresh_schedule_checked:
            return
        self._refresh_schedule_checked = True
        max_steps = self.state.max_steps
        first = next((step for step in range(max_steps) if self._reaches_a_batch(step)), None)
        if first is None:
            logger.warning(
                f"No answer will be regenerated: with `refine_start_step={self.args.refine_start_step}` the first "
                f"would reach no batch of the {max_steps} steps. Lower it, or train for longer."
            )
        elif max_steps - first < max_steps / self.args.num_train_epochs and self.args.max_steps <= 0:
            logger.warning(
                f"Less than an epoch follows the first refresh, at step {first} of {max_steps}: most refined answers "
                "will be generated but not trained on. Lower `refine_start_step`, or train for more epochs."
            )

    def _refine_answers(self, refiner: Refiner) -> None:
        """Online self-refining generation: the model answers questions whose answers have not proved good."""
        selector = self.data_selector
        refinable = self._trained_rows & ~selector.proved_good.numpy()
        candidates = Candidates(refinable, selector.weights().numpy(), selector.logits.numpy())
        responses = refiner.refresh(self.response_store, self.state.global_step, candidates)
        for name, value in refresh_metrics(responses).items():
            self._training_metrics.note(name, value)

    def _start_step(self, batches: list[dict[str, Any]]) -> None:
        if any(SAMPLE_INDICES not in batch for batch in batches):
            raise ValueError(
                "A batch does not say which training rows it has, and has no trusted rows: "
                f"`{type(self).__name__}.get_train_dataloader` makes one of its own. Call "
                "`super().get_train_dataloader()` there, or leave the method out."
            )
        own_rows = [batch.pop(SAMPLE_INDICES) for batch in batches]  # numbers, or ids of a stream's rows
        self._step_row_counts = self._count_rows(sum(map(len, own_rows)))
        self._step_sample_indices = self._number_rows([row for batch in own_rows for row in batch])
        self._step_row_means, self._step_value_means, self._step_pooled = [], [], []
        for batch, rows in zip(batches, own_rows, strict=True):
            batch[STEP_ROWS] = StepRows(
                num_training=len(rows),
                row_of_sequence=torch.tensor(batch.pop(ROW_OF_SEQUENCE)),
                refined_spans=batch.pop(REFINED_SPANS),
                num_tokens=torch.tensor(batch.pop(NUM_TOKENS)),
                layout=pop_layout(batch, self.args.device),
                reference_nll=torch.tensor(batch.pop(REFERENCE_NLL), device=self.args.device),
            )

    def _number_rows(self, own: list[Any]) -> torch.Tensor:
        """Numbers of all processes' training rows of the step, in the same order on each."""
        if isinstance(self.data_selector, StreamedSelector):
            # Rows of a stream come with their ids; each process counts all of them
            self._step_sample_ids = gather_object(own)
            return self.data_selector.row_numbers(self._step_sample_ids)
        return self._gather_rows(torch.tensor(own))

    def _weigh_rows(self, step_rows: list[StepRows], step_weights: torch.Tensor) -> None:
        """Set the coefficients of all rows from the weights of the step's training rows, those of all processes."""
        kept = step_weights >= filter_threshold(step_weights, self.args.filter_ratio)
        if self._has_adaptive_weight:
            step_weights = step_weights * ~self.data_selector.sunk(self._step_sample_indices)
        validation_weight = self.validation_weight
        self._training_metrics.note("validation_weight", validation_weight)
        coefficients = self._row_coefficients(step_rows, step_weights, kept, validation_weight)
        own_filtered = (~self._own_rows(kept)).split([rows.num_training for rows in step_rows])
        for rows, filtered, row_coefficients in zip(step_rows, own_filtered, coefficients, strict=True):
            rows.num_filtered = int(filtered.sum())
            rows.coefficients = row_coefficients.to(self.args.device, non_blocking=True)

    def _weigh_value_function_rows(self, step_rows: list[StepRows]) -> None:
        """The same for the value function: training rows only, in its own weights, none filtered."""
        weights = self.data_selector.value_function_weights_of(
            self._step_sample_indices, self.args.value_function_rows
        )
        coefficients = self._row_coefficients(step_rows, weights, torch.ones_like(weights, dtype=torch.bool), 0.0)
        for rows, row_coefficients in zip(step_rows, coefficients, strict=True):
            # theta-hat stands for the training rows as they were given
            value_coefficients = row_coefficients[: rows.num_sequences] * ~rows.is_refined  # (S,)
            rows.value_coefficients = value_coefficients.to(self.args.device, non_blocking=True)

    def _row_coefficients(
        self, step_rows: list[StepRows], step_weights: torch.Tensor, kept: torch.Tensor, validation_weight: float
    ) -> list[torch.Tensor]:
        return row_coefficients_of_step(
            step_rows,
            self._own_rows(step_weights),
            self._own_rows(kept),
            validation_weight,
            self.args.loss_normalization,
            reduce=self._sum_over_processes if self.args.average_tokens_across_devices else None,
        )

    def _selected_weights(self, own_row_means: torch.Tensor | None = None) -> torch.Tensor:
        row_means = None if own_row_means is None else self._gather_rows(own_row_means)
        return self._selection.weights(self.data_selector, self._step_sample_indices, row_means)

    @torch.no_grad()
    def _row_means_without_gradient(self, number: int, batch: dict[str, Any]) -> torch.Tensor:
        self.model.train()
        rows: StepRows = batch[STEP_ROWS]
        inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != STEP_ROWS})
        # Trainer restores a checkpoint's random state only after this: dropout must neither read it nor move it
        number = number * self.args.world_size + self.args.process_index
        seed = batch_seed(self.args.seed, self.state.global_step, number)
        with random_state_kept(self.args.device, seed), self.compute_loss_context_manager():
            _, losses = self._forward(self.model_wrapped, inputs, rows.layout)
        return rows.row_means(losses.mean[: rows.num_sequences].float().cpu())

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        The model's level: lambda * L_val + (1 - lambda) * L_train(w), one forward pass over both kinds of row.

        With `return_outputs` also their [`~trl_bilevel.losses.RowOutputs`].
        """
        if STEP_ROWS not in inputs:  # evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        rows: StepRows = inputs.pop(STEP_ROWS)
        outputs, losses = self._forward_and_pool(model, inputs, rows)
        # The one transfer from the device: it serves the check below and the selector's level
        nll, num_tokens = torch.stack([losses.nll.detach(), losses.num_tokens]).cpu()  # (R,) each, R = S + V or S + 2P
        self._step_row_means.append(rows.row_means((nll / num_tokens)[: rows.num_sequences]))
        if rows.coefficients is None:
            self._weigh_rows([rows], self._selected_weights(self._step_row_means[-1]))
        finite = rows.with_whole_pairs(nll.isfinite())
        num_nonfinite = int((~finite).sum())
        if self._any_process(num_nonfinite > 0):
            # A NaN in the graph reaches every gradient, even with coefficient 0, so such rows must leave the batch.
            # All processes take part in the second forward pass, also one that has nothing left to learn from.
            if not rows.layout.can_select:  # all of the batch or nothing
                finite = finite.all().expand(len(finite))
            staying = finite if finite.any() else ~finite
            inputs, layout = rows.layout.select(inputs, staying)
            outputs, losses = self._forward(model, inputs, layout)
            rows = rows.only(staying, layout)
        preferences, ratios = None, None
        if not finite.any():
            loss = self._zero_loss(outputs)
            losses = RowLosses(losses.nll[:0], losses.num_tokens[:0])
            logger.warning(
                f"{num_nonfinite} of {len(finite)} rows of a batch have a NaN or infinite loss, so it was skipped. If "
                "this goes on, the model has diverged: lower `learning_rate`."
            )
        else:
            loss, preferences, ratios = self._objective(rows, outputs, losses)

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
                num_training_rows=rows.num_sequences if finite.any() else 0,
                input_tokens=count_input_tokens(inputs) * bool(finite.any()),
                aux_loss=outputs.aux_loss if self.aux_loss_enabled else loss.new_zeros(()),
                preferences=preferences,
                ratios=ratios,
            ),
            RowCounts(rows.num_training, rows.num_filtered, num_nonfinite, rows.num_refined),
        )
        return (loss, outputs) if return_outputs else loss

    def _objective(
        self, rows: StepRows, outputs: RowOutputs, losses: RowLosses
    ) -> tuple[torch.Tensor, PreferenceLosses | None, ImportanceRatios | None]:
        """lambda * L_val + (1 - lambda) * L_train(w), both in the rows' coefficients, and what it is made of."""
        assert rows.coefficients is not None
        preferences, ratios = None, None
        if rows.num_refined:
            ratios = importance_ratios(
                outputs.log_probs,
                outputs.label_mask,
                rows.dense_generation_log_probs(outputs.log_probs),
                self.args.importance_ratio_clip,
                self.args.importance_sampling_level,
            )
        token_ratios = None if ratios is None else ratios.ratios
        training_losses = self._lower_level_losses(outputs, token_ratios)[: rows.num_sequences]  # (S,)
        validation_losses = losses.nll[rows.num_sequences :]  # (V,)
        if self.args.validation_loss_type == "dpo":
            preferences = preference_losses(validation_losses, rows.reference_nll, self.args.beta)
            validation_losses = preferences.losses  # (P,)
        loss = (rows.coefficients * torch.cat([training_losses, validation_losses])).sum()
        return loss, preferences, ratios

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """After the backward pass: theta-hat's, where there is a value function."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._zero_gradients.clear()
        if self.value_function is not None:
            with self.maybe_activation_offload_context:
                self._fit_value_function(self.value_function, inputs)
        return loss

    def finish_step(self) -> None:
        """After the model's optimizer step: until then a checkpoint is of the step before, and knows none of it."""
        if self.value_function is not None:
            self.value_function.step(self._get_learning_rate(), self._reduce_gradient)
        if isinstance(self.data_selector, StreamedSelector):
            self.data_selector.consumed.add(self._step_sample_ids)
        self._update_selector()

    def _fit_value_function(self, value_function: ValueFunction, inputs: dict[str, Any]) -> None:
        """theta-hat descends the training rows' loss; the selector compares with its losses before the step."""
        rows: StepRows = inputs[STEP_ROWS]
        assert rows.value_coefficients is not None
        model = self.accelerator.unwrap_model(self.model)
        batch = self._prepare_inputs({name: value for name, value in inputs.items() if name != STEP_ROWS})
        coefficients, num_trusted = rows.value_coefficients, len(rows.num_tokens) - rows.num_sequences  # (S,)
        if rows.layout.can_select:
            is_training = torch.arange(len(rows.num_tokens)) < rows.num_sequences  # (R,)
            training, layout = rows.layout.select(batch, is_training)
        else:  # the trusted rows come along, and count for nothing
            training, layout = batch, rows.layout
            coefficients = torch.cat([coefficients, coefficients.new_zeros(num_trusted)])  # (R,)
        with value_function.active():
            with self.compute_loss_context_manager():
                outputs, losses = self._forward(model, training, layout)
            # As in `compute_loss`: one transfer, and without the broken rows
            nll, num_tokens = torch.stack([losses.nll.detach(), losses.num_tokens]).cpu()  # (S,) or (R,) each
            self._step_value_means.append(rows.row_means((nll / num_tokens)[: rows.num_sequences]))
            finite = nll.isfinite()
            if not layout.can_select:
                finite = finite.all().expand(len(finite))
            if not finite.all() and finite.any():
                training, layout = layout.select(training, finite)
                coefficients = coefficients[finite.to(coefficients.device)]
                with self.compute_loss_context_manager():
                    outputs, _ = self._forward(model, training, layout)
            if finite.any():
                (coefficients * self._lower_level_losses(outputs)).sum().backward()

    def _update_selector(self) -> None:
        losses = row_means = self._gather_batches(self._step_row_means)
        if self.value_function is not None:
            # excess loss: l_i(theta) - l_i(theta-hat)
            losses = row_means - self._gather_batches(self._step_value_means)
        self._selection.update(self.data_selector, self._step_sample_indices, row_means, losses)
        if self.amortized_selector is not None:
            self.amortized_selector.update(self._gather_batches(self._step_pooled), row_means, losses)

    def _zero_loss(self, outputs: RowOutputs) -> torch.Tensor:
        """Exactly 0, also when parameters are NaN, with a zero gradient for every trained parameter."""
        return self._zero_gradients.loss(outputs.log_probs) if self.is_sharded else loss_of_nothing(self.model)
