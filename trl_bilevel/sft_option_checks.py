"""Checks of the options that `SFTConfig` brings along."""

from accelerate import Accelerator
from trl import SFTConfig


def check_sft_options(args: SFTConfig) -> None:
    """
    Refuse the options of [`~trl.SFTConfig`] that per-row weights cannot honour yet, rather than ignore them.

    Raises:
        `ValueError`: names the option, and what to use instead.
    """
    if args.loss_type not in ("nll", "dft"):
        raise ValueError(
            f"Invalid `loss_type` {args.loss_type} passed. Supported values are 'nll' and 'dft', multiples of each "
            "token's negative log-likelihood."
        )
    if args.packing and args.packing_strategy != "bfd":
        raise ValueError(
            f"`packing_strategy={args.packing_strategy!r}` is not supported: it cuts rows into pieces, and a row has "
            "one weight. Use 'bfd'."
        )
    if args.packing and args.max_length is None:
        raise ValueError("When packing is enabled, `max_length` can't be `None`. It is the tokens of a sequence.")
    if args.packing and args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "`train_sampling_strategy='group_by_length'` has no effect with `packing=True`: packed sequences are "
            "about as long as each other. Use 'random' or 'sequential'."
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "`train_sampling_strategy='batch_rebalance'` is not supported: it deals out batches without their "
            "validation rows. Use 'random', 'sequential' or 'group_by_length'."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size=True` is not supported: a retry would start with the weights of the failed attempt."
            " Set `per_device_train_batch_size` instead."
        )
    _check_sharding_of_batches(args)


def _check_sharding_of_batches(args: SFTConfig) -> None:
    """Every process draws its own share of a global batch, as many rows as the others: they meet in each step."""
    sharding = args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(sharding, name):
            raise ValueError(
                f"`accelerator_config` with `{name}=True` is not supported: it cuts up batches of training and "
                "validation rows that belong together. Leave it out; every process then draws its own share of the "
                "global batch."
            )
    if not sharding.even_batches and not args.dataloader_drop_last:
        raise ValueError(
            "`accelerator_config` with `even_batches=False` is not supported: a process without a last batch would "
            "not meet the others in the selector's step. Leave it out, or set `dataloader_drop_last=True`."
        )


def refuse_split_rows(accelerator: Accelerator) -> None:
    """Raise a `ValueError` under parallelism that gives a part of a row's tokens, or of the model, to each process."""
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Tensor, context and sequence parallelism are not supported: they split a row's loss over processes. "
            f"Use data parallelism only, got {parallelism}."
        )
