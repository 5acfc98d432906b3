"""TRL's trainer with rows that count by a column."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from .sft_option_checks import refuse_split_rows
from .token_losses import smoothed_token_losses, token_losses
from .weight_column import CountedRows, read_counted_rows
from .weighted_batches import WeightedCollator, pack_weighted_rows, take_weights, without_packing
from .weighted_losses import weighting_term
from .weighted_sft_config import WeightedSFTConfig


class WeightedSFTTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose training rows count as much as a column says.

    Its one change is [`compute_loss`]: what TRL computes, and what the weights change in it. Batches carry the
    weights there. Evaluation is TRL's: unweighted, of a dataset that needs no such column.

    Args:
        model, args, data_collator, train_dataset, ...:
            As in [`~trl.SFTTrainer`], all of them, with a column of weights in `train_dataset`. `args` is a
            [`WeightedSFTConfig`]; any other [`~transformers.TrainingArguments`] are completed with its defaults.

    Raises:
        `ValueError` or `TypeError`: before training starts, for weights that cannot be used, by column and row; for
            weights that are all 0; and for options that would not know the weights. Of a stream, for a weight past its
            first 100 rows, when it is read.

    Example:

    ```python
    from datasets import load_dataset
    from trl_bilevel import WeightedSFTConfig, WeightedSFTTrainer

    trainer = WeightedSFTTrainer(
        model="Qwen/Qwen3-0.6B",
        args=WeightedSFTConfig(output_dir="out"),
        train_dataset=load_dataset("me/mixture-curated", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "weighted-sft"]
    _name = "Weighted SFT"
    args: WeightedSFTConfig
    data_collator: Any
    _signature_columns: list[str]

    def __init__(
        self,
        model: "str | PreTrainedModel",
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *sft_args: Any,
        **sft_kwargs: Any,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = WeightedSFTConfig(f"{model_id.split('/')[-1]}-WeightedSFT")
        elif not isinstance(args, WeightedSFTConfig):
            args = WeightedSFTConfig.from_training_arguments(args)
        self._counted = CountedRows(train_dataset, 1.0)
        if isinstance(train_dataset, (Dataset, IterableDataset)):  # TRL says what is wrong with others
            self._counted = read_counted_rows(train_dataset, args.weight_column, args.normalize_weights)
        super().__init__(model, args, data_collator, self._counted.dataset, *sft_args, **sft_kwargs)
        self._refuse_unsupported_setup()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of TRL, and in training what the weights add to it: see `weighted_losses.weighting_term`."""
        inputs = dict(inputs)
        weights = take_weights(inputs)
        if weights is None:  # evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs: list[Any] = []

        def recorded(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs))
            return outputs[-1]

        result = super().compute_loss(recorded, inputs, return_outputs, num_items_in_batch)
        if self.label_smoother is not None and self.args.loss_type == "nll":
            losses = smoothed_token_losses(outputs[0].logits, inputs["labels"], self.args.label_smoothing_factor)
        else:
            losses = token_losses(outputs[0].log_probs, self.args.loss_type)
        num_tokens = (inputs["labels"][:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        term = weighting_term(losses, weights, num_tokens)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            term = term * self.accelerator.num_processes  # as TRL's: DDP averages over processes
        return (result[0] + term, *result[1:]) if return_outputs else result + term

    def get_train_dataloader(self) -> DataLoader:
        # Evaluation needs collator and columns as they are
        self._set_signature_columns_if_needed()
        collator, columns = self.data_collator, self._signature_columns
        column = self.args.weight_column
        self.data_collator = WeightedCollator(collator, column, self._counted.scale, self.padding_free)
        self._signature_columns = [*columns, column]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._signature_columns = collator, columns

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        processing_class, config, packing, formatting_func, name = args
        if not packing or dataset is not self._counted.dataset:
            return super()._prepare_dataset(dataset, *args)
        # TRL would pack tokens and labels, and drop the weights
        rows = super()._prepare_dataset(
            dataset, processing_class, without_packing(config), False, formatting_func, name
        )
        return pack_weighted_rows(rows, config.weight_column, config, name)

    def _refuse_unsupported_setup(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: it returns one loss for all rows, and each has a weight. "
                "Remove it, or use `trl.SFTTrainer`."
            )
        refuse_split_rows(self.accelerator)
