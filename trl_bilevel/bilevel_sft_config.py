"""Options of the bilevel trainer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .data_selector import SelectorOptimizer, ValueFunctionRows
from .losses import LossNormalization
from .refinement_config import RefinementConfig, check_refinement
from .selector_updates import SelectorActivation
from .sft_config_base import SFTConfigBase
from .sft_option_checks import check_sft_options


SelectionMethod = Literal["bds", "bmo"]
ValidationLossType = Literal["nll", "dpo"]
ValueFunctionType = Literal["none", "adapter"]
_SECRETS = ("hub_token", "token", "vllm_server_base_url")  # an address may hold a password
_TO_BE_PUBLISHED = "_to_be_published"


@dataclass
class BilevelSFTConfig(RefinementConfig, SFTConfigBase):
    r"""
    Configuration of the [`BilevelSFTTrainer`]: every option of [`~trl.SFTConfig`], those of data selection, and those
    of self-refining generation, which [`~trl_bilevel.refinement_config.RefinementConfig`] describes.

    Parameters:
        > Parameters that control the upper level

        selection_method (`str`, *optional*, defaults to `"bds"`):
            How rows are weighted (arXiv 2511.21056). `"bds"`, bilevel data selection: one learned weight per row.
            `"bmo"`, bilevel multi-objective optimisation: closed-form weights, a softmax over the negated losses of
            the rows of each optimizer step. With gradient accumulation it takes an extra forward pass without
            gradient.
        bmo_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of that softmax, in nats per token. Small values put the weight on the rows of the lowest loss.
        validation_weight (`float`, *optional*, defaults to `0.9`):
            Weight $\lambda \in (0, 1]$ of the validation loss in the objective
            $\lambda L_{val} + (1-\lambda) L_{train}(w)$. Constant where it is changed; by default it may fall, see
            `adaptive_validation_weight`. A high value lets the validation rows shape the model, so
            that bad training rows stand out by their loss; a low one trains more on the weighted training rows.
        validation_weight_decay (`float`, *optional*, defaults to `0.0`):
            How much `validation_weight` falls after every epoch; it stops at 0.
        adaptive_validation_weight (`bool`, *optional*):
            Let $\lambda$ fall from `validation_weight` as training rows prove good: to M / (M + R) for M validation
            rows and R rows that have proved good, each counted by how far its probability has risen above
            `selector_prior`. What has proved good then counts like what is trusted, and rows that have sunk below that
            probability do not count at all. Needs a value function and sigmoid weights. If `None`, on where it serves
            the model (docs/study.md): with at least 100 validation rows, their negative log-likelihood as the
            objective, a weight for each row (no `source_column`), and `validation_weight` and its decay at their
            defaults. `False` keeps $\lambda$ constant there, too.
        validation_loss_type (`str`, *optional*, defaults to `"nll"`):
            The upper level's objective. `"nll"`: the negative log-likelihood of the validation rows. `"dpo"`: the
            validation rows are preference pairs, in any format of [`~trl.DPOTrainer`], and the objective is its
            loss. The reference is the model with its adapter switched off, or without an adapter the model as it is
            before training; its log-likelihoods are computed once.
        beta (`float`, *optional*, defaults to `0.1`):
            Strength of the pull towards the reference in the `"dpo"` loss, as in [`~trl.DPOConfig`].
        per_device_validation_batch_size (`int`, *optional*):
            Validation rows (or pairs, each of two sequences) that join each `per_device_train_batch_size` training
            rows in the same forward pass. If `None`, as many as training rows, or a quarter as many in a run that
            started from a screen, and no more in a step than there are. With `packing` both count packed sequences.

        screen (`bool`, *optional*):
            Start from a screen: before the first step the model reads every row once, and a row's weight is the
            probability that its answer is as good as the trusted ones, see [`screen_dataset`] and docs/screening.md.
            Costs a forward pass over the rows. A positive control says how well the model tells trusted answers from
            each other's. Where it does with a power of 0.8, weights stay as they are, and a quarter as many trusted
            rows as training rows join a batch. Where it does so less well, and there is an adapter, training adds
            evidence of its own by a value function, and ends with one more pass over the rows; `value_function`
            decides it too. If `None`, on where the options leave it open (BDS with mirror descent and no
            `value_function` or `data_selector` given, at least 30 trusted rows, no stream, not DeepSpeed or FSDP) and
            the model passes the control in three of four pairs. One of random weights does not; then weights are
            learned as without a screen.
        value_function (`str`, *optional*):
            `"adapter"`: a second set of values for the PEFT adapter's parameters, on the same base, learns the
            training rows only. The selector then follows the excess loss, how much worse a row is under the model
            than under them, and not the loss, which is high for any hard row. Costs a forward and backward pass over
            the training rows, and ranks far better (docs/results.md). `"none"`: the loss itself. If `None`,
            `"adapter"` for a model with a PEFT adapter where a screen does not suffice and nothing speaks against it:
            BDS with mirror descent, without DeepSpeed, FSDP or fp16.
        value_function_rows (`str`, *optional*, defaults to `"rejected"`):
            Which rows the value function learns: `"rejected"`, those the selector turned down; `"all"`; or
            `"selected"`, the lower level's weighted rows.

        selector_prior (`float`, *optional*, defaults to `0.2`):
            With a value function and sigmoid weights, the probability that a training row is good before anything is
            known of it, in (0, 1). The weight is the probability afterwards, scaled to mean 1: all rows start with 1,
            and the prior sets how far a row that has proved good may rise above them, 1/prior times at most.

        > Parameters that control the data selector

        selector_activation (`str`, *optional*):
            How a row's logit becomes its weight: `"softmax"`, rows compete for weight, or `"sigmoid"`, each on its
            own. Both are scaled to mean 1. If `None`, softmax, and sigmoid with a value function; or that of the
            `data_selector` the trainer is given.
        selector_optimizer (`str`, *optional*, defaults to `"mirror_descent"`):
            `"mirror_descent"` moves the rows of the batch only, at a cost independent of the dataset's size. `"adam"`
            is dense Adam on all logits, the reference of the published codes.
        selector_learning_rate (`float`, *optional*):
            Step of the selector; for mirror descent in logits per nat of excess loss. If `None`, 1 for mirror
            descent, 3 in sigmoid weights with a value function, and 5e-3 for Adam.
        filter_ratio (`float`, *optional*, defaults to `0.0`):
            Share of the rows of each batch, those of the lowest weight, that take no part in the model's step; their
            weights keep being learned. Rows that tie with a kept row are kept.
        amortized_selector (`bool`, *optional*, defaults to `False`):
            Also train a small head that reads a row's weight off the hidden states of the training forward, so that
            [`BilevelSFTTrainer.score`] can rank rows that were never trained on by it.
        loss_normalization (`str`, *optional*, defaults to `"token"`):
            `"token"` divides each level's loss by its completion tokens, as [`~trl.SFTTrainer`] does; `"row"` averages
            the rows' mean losses, as the published codes do.

        > Parameters that control the data and the memory

        activation_checkpointing (`bool`, *optional*):
            Trade compute for memory by recomputing activations. On, as in [`~trl.SFTConfig`], if not set.
        gradient_checkpointing (`bool`, *optional*):
            Deprecated name of `activation_checkpointing`.
        sample_id_column (`str`, *optional*):
            Column of the training dataset with a unique id per row (string or integer), reported in the curated
            dataset. If `None`, the column `"sample_id"` if there is one, otherwise the row's position. A stream needs
            one; its rows with the same id are one row.
        save_training_rows (`bool`, *optional*, defaults to `True`):
            Write the training rows to the output folder, once, so that `trl-bilevel curate` and `trl-bilevel push` can
            make the curated dataset of a finished or interrupted run. Not of a stream.
        source_column (`str`, *optional*):
            Column of the training dataset that names each row's source (string or integer). All rows of a source then
            share one weight (ScaleBiO, arXiv 2406.19976), see [`BilevelSFTTrainer.source_weights`].
    """

    selection_method: SelectionMethod = field(
        default="bds",
        metadata={"help": "How rows are weighted: `'bds'`, one learned weight per row; `'bmo'`, in closed form."},
    )
    bmo_temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of the closed-form weights of `'bmo'`, in nats per token."},
    )
    validation_weight: float = field(
        default=0.9,
        metadata={"help": "Weight of the validation loss in the objective, in (0, 1]."},
    )
    validation_weight_decay: float = field(
        default=0.0,
        metadata={"help": "How much `validation_weight` falls after every epoch; it stops at 0."},
    )
    adaptive_validation_weight: bool | None = field(
        default=None,
        metadata={
            "help": "Let `validation_weight` fall as training rows prove good; needs a value function. If `None`, on "
            "with at least 100 validation rows, where `validation_weight` is the default."
        },
    )
    validation_loss_type: ValidationLossType = field(
        default="nll",
        metadata={"help": "The upper level's objective: `'nll'` of the rows, or `'dpo'` for preference pairs."},
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Strength of the pull towards the reference in the `'dpo'` loss."},
    )
    per_device_validation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Validation rows (or pairs) that join each `per_device_train_batch_size` training rows in the "
            "same forward pass. If `None`, as many as training rows."
        },
    )
    screen: bool | None = field(
        default=None,
        metadata={
            "help": "Start from a screen: one forward pass before training gives every row its weight. If `None`, on "
            "where it works and the model tells trusted answers from each other's."
        },
    )
    value_function: ValueFunctionType | None = field(
        default=None,
        metadata={
            "help": "`'adapter'`: a second set of adapter values learns the training rows only, and the selector "
            "follows the excess loss over it; `'none'`: it follows the loss. If `None`, `'adapter'` where it works."
        },
    )
    value_function_rows: ValueFunctionRows = field(
        default="rejected",
        metadata={"help": "Rows that the value function learns: `'rejected'`, `'all'` or `'selected'`."},
    )
    selector_prior: float = field(
        default=0.2,
        metadata={"help": "Probability that a row is good before anything is known of it, with a value function."},
    )
    selector_activation: SelectorActivation | None = field(
        default=None,
        metadata={
            "help": "How a row's logit becomes its weight: `'softmax'` or `'sigmoid'`, both scaled to mean 1. If "
            "`None`, softmax, and sigmoid with a value function."
        },
    )
    selector_optimizer: SelectorOptimizer = field(
        default="mirror_descent",
        metadata={
            "help": "`'mirror_descent'` moves the rows of the batch only; `'adam'` is dense Adam on all logits."
        },
    )
    selector_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Step of the selector. If `None`, 1 for mirror descent, 3 with a value function, 5e-3 for Adam."
        },
    )
    filter_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of the rows of each batch, those of the lowest weight, that take no part in the model's "
            "step, in [0, 1)."
        },
    )
    amortized_selector: bool = field(
        default=False,
        metadata={
            "help": "Also train a small head on the hidden states that scores rows which were never trained on."
        },
    )
    loss_normalization: LossNormalization = field(
        default="token",
        metadata={
            "help": "`'token'` divides each level's loss by its completion tokens, `'row'` averages the rows' means."
        },
    )
    sample_id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the training dataset with a unique id per row. If `None`, the column `sample_id` if "
            "there is one, otherwise the row's position."
        },
    )

    save_training_rows: bool = field(
        default=True,
        metadata={"help": "Write the training rows to the output folder, for `trl-bilevel curate` and `push`."},
    )
    source_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the training dataset that names each row's source; rows of a source share one weight."
        },
    )

    def __post_init__(self) -> None:
        SFTConfigBase.__post_init__(self)
        check_refinement(self)
        _check_choice("selection_method", self.selection_method, get_args(SelectionMethod))
        if self.selector_activation is not None:
            _check_choice("selector_activation", self.selector_activation, get_args(SelectorActivation))
        _check_choice("selector_optimizer", self.selector_optimizer, get_args(SelectorOptimizer))
        _check_choice("validation_loss_type", self.validation_loss_type, get_args(ValidationLossType))
        if self.value_function is not None:
            _check_choice("value_function", self.value_function, get_args(ValueFunctionType))
        _check_choice("value_function_rows", self.value_function_rows, get_args(ValueFunctionRows))
        _check_choice("loss_normalization", self.loss_normalization, get_args(LossNormalization))
        if not 0 < self.validation_weight <= 1:
            raise ValueError(
                f"`validation_weight` must be larger than 0 and at most 1, got {self.validation_weight}. With 0 the "
                "validation set would have no say; use `SFTTrainer` for that."
            )
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"`beta` must be a finite number larger than 0, got {self.beta}.")
        if not 0 <= self.validation_weight_decay < 1:
            raise ValueError(
                f"`validation_weight_decay` must be at least 0 and less than 1, got {self.validation_weight_decay}."
            )
        if self.adaptive_validation_weight and self.validation_weight_decay != 0:
            raise ValueError(
                f"`validation_weight_decay={self.validation_weight_decay}` has no effect with "
                "`adaptive_validation_weight=True`. Leave one of them out."
            )
        if self.per_device_validation_batch_size is not None and self.per_device_validation_batch_size < 1:
            raise ValueError(
                "`per_device_validation_batch_size` must be at least 1, got "
                f"{self.per_device_validation_batch_size}. Use `None` for as many as training rows."
            )
        if self.selector_learning_rate is not None and not 0 <= self.selector_learning_rate < float("inf"):
            raise ValueError(
                "`selector_learning_rate` must be a finite number, 0 or larger, got "
                f"{self.selector_learning_rate}. 0 keeps the weights as they are."
            )
        if not 0 < self.selector_prior < 1:
            raise ValueError(f"`selector_prior` must be larger than 0 and less than 1, got {self.selector_prior}.")
        if not 0 < self.bmo_temperature < float("inf"):
            raise ValueError(f"`bmo_temperature` must be a finite number larger than 0, got {self.bmo_temperature}.")
        _check_ignored_options(self)
        if not 0 <= self.filter_ratio < 1:
            raise ValueError(f"`filter_ratio` must be at least 0 and less than 1, got {self.filter_ratio}.")
        check_sft_options(self)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != _TO_BE_PUBLISHED}
        return _without_secrets(state) if _TO_BE_PUBLISHED in vars(self) else state

    @contextmanager
    def published(self) -> Iterator[None]:
        """Pickle no tokens, addresses and paths: Trainer writes `training_args.bin` into folders that it pushes."""
        setattr(self, _TO_BE_PUBLISHED, True)
        try:
            yield
        finally:
            delattr(self, _TO_BE_PUBLISHED)


def _without_secrets(value: Any) -> Any:
    """Options without tokens and addresses, and of paths the last part only."""
    if isinstance(value, dict):
        return {name: None if name in _SECRETS else _without_secrets(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(_without_secrets, value))
    if isinstance(value, (str, os.PathLike)) and os.path.isabs(value):
        return os.path.basename(value)
    return value


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        allowed = " or ".join(f"'{choice}'" for choice in choices)
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


# option -> the choice without which it would be ignored
_READ_ONLY_WITH: dict[str, tuple[str, str]] = {
    "selector_activation": ("selection_method", "bds"),
    "selector_optimizer": ("selection_method", "bds"),
    "selector_learning_rate": ("selection_method", "bds"),
    "source_column": ("selection_method", "bds"),
    "value_function_rows": ("value_function", "adapter"),
    "selector_prior": ("value_function", "adapter"),
    "bmo_temperature": ("selection_method", "bmo"),
    "beta": ("validation_loss_type", "dpo"),
}


def _check_ignored_options(args: BilevelSFTConfig) -> None:
    """Refuse options that the other choices made would ignore."""
    if args.value_function == "adapter" and args.selection_method == "bmo":
        raise ValueError(
            "`value_function='adapter'` has no effect with `selection_method='bmo'`. Leave it out, or use "
            "`selection_method='bds'`."
        )
    for name, (choice, needed) in _READ_ONLY_WITH.items():
        value, default = getattr(args, name), BilevelSFTConfig.__dataclass_fields__[name].default
        chosen = getattr(args, choice)
        if chosen is not None and chosen != needed and value != default:
            raise ValueError(
                f"`{name}={value!r}` has no effect with `{choice}='{chosen}'`. Leave it out, or use "
                f"`{choice}='{needed}'`."
            )
