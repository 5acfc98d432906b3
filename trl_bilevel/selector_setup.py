"""The data selector that a run's options ask for, and whether lambda follows it."""

import pyarrow as pa

from .bilevel_sft_config import BilevelSFTConfig
from .data_selector import DataSelector
from .dataset_checks import Sources
from .screening.verdict import Verdict
from .selector_updates import SelectorActivation
from .streamed_selector import StreamedSelector


_MIN_VALIDATION_ROWS = 100  # few are soon outweighed by rows that proved good by mistake (docs/study.md)
_EXCESS_LOSS_LEARNING_RATE = 3.0  # excess losses are smaller than losses, and sigmoid weights saturate


def build_selector(
    args: BilevelSFTConfig,
    has_value_function: bool,
    given: DataSelector | None,
    sample_ids: pa.ChunkedArray | None,
    sources: Sources | None = None,
) -> DataSelector:
    """
    Build the selector of a run, not yet with the weights of a given one.

    Args:
        args ([`BilevelSFTConfig`]): options.
        has_value_function (`bool`): whether it follows excess losses.
        given ([`DataSelector`], *optional*): a selector to start from, whose activation is the default.
        sample_ids (`pyarrow.ChunkedArray`, *optional*): of the training rows; `None` for a stream.
        sources ([`~trl_bilevel.dataset_checks.Sources`], *optional*): of the training rows.

    Raises:
        `ValueError`: for a prior or an adaptive `validation_weight` that would have no effect.
    """
    # A given selector's logits mean something in its own activation only
    default_activation: SelectorActivation = "sigmoid" if has_value_function else "softmax"
    activation = args.selector_activation or (default_activation if given is None else given.activation)
    # Excess losses in sigmoid weights: each row is judged on its own; dense Adam compares the rows of a batch
    on_its_own = has_value_function and activation == "sigmoid" and args.selector_optimizer == "mirror_descent"
    is_prior_default = args.selector_prior == BilevelSFTConfig.__dataclass_fields__["selector_prior"].default
    if not on_its_own and not is_prior_default:
        raise ValueError(
            f"`selector_prior={args.selector_prior}` has no effect with softmax weights, dense Adam or without a "
            "value function. Leave it out."
        )
    if args.adaptive_validation_weight and not on_its_own:
        raise ValueError(
            "`adaptive_validation_weight=True` needs a value function, sigmoid weights and mirror descent, in which a "
            "row proves good by itself. Use BDS with a PEFT adapter and the defaults of all three, or leave it out."
        )
    learning_rate = args.selector_learning_rate
    if learning_rate is None and on_its_own:
        learning_rate = _EXCESS_LOSS_LEARNING_RATE
    prior = args.selector_prior if on_its_own else 0.5
    if given is not None and given.activation == "sigmoid" and is_prior_default:
        # Weights that stay as they are keep their prior; without a value function it has no effect
        prior = given.prior if learning_rate == 0 or not on_its_own else prior
    if sample_ids is None:
        return StreamedSelector(activation, learning_rate, centered=not on_its_own, prior=prior)
    return DataSelector(
        num_rows=len(sample_ids),
        activation=activation,
        optimizer=args.selector_optimizer,
        learning_rate=learning_rate,
        centered=not on_its_own,
        prior=prior,
        sources=None if sources is None else sources.of_rows,
        sample_ids=sample_ids,
    )


def selector_of_screen(selector: DataSelector, verdict: Verdict) -> DataSelector:
    """
    The selector of a run whose weights come from a screen, and stay.

    Args:
        selector ([`DataSelector`]): that of the run without one, which need not have sigmoid weights.
        verdict ([`~trl_bilevel.screening.verdict.Verdict`]): of the screen.
    """
    if selector.activation != "sigmoid":
        selector = DataSelector(
            selector.num_rows, activation="sigmoid", sources=selector.sources, sample_ids=selector.sample_ids
        )
    selector.start_with(verdict.good_probability)
    selector.learning_rate = 0.0
    return selector


def resolve_adaptive_validation_weight(
    args: BilevelSFTConfig, selector: DataSelector, num_validation_rows: int, is_screened: bool = False
) -> bool:
    """
    Whether lambda falls as rows prove good: what the option says, or by default where that serves the model.

    Args:
        args ([`BilevelSFTConfig`]): options.
        selector ([`DataSelector`]): the run's.
        num_validation_rows (`int`): M, rows.
        is_screened (`bool`): whether the weights are probabilities of a screen.
    """
    if args.adaptive_validation_weight is not None:
        return args.adaptive_validation_weight
    is_weight_given = args.validation_weight != BilevelSFTConfig.validation_weight or args.validation_weight_decay != 0
    # A training row counts like a validation row only where both have the same kind of loss and a weight of their own
    are_alike = args.validation_loss_type == "nll" and args.source_column is None
    judges_each_row_on_its_own = is_screened or not selector.centered  # see `build_selector`
    has_enough_rows = is_screened or num_validation_rows >= _MIN_VALIDATION_ROWS
    return judges_each_row_on_its_own and has_enough_rows and are_alike and not is_weight_given
