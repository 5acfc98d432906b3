"""What a bilevel run needs besides the model: its checks, the value function, the refiner."""

import hashlib
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import Trainer
from trl import SFTTrainer

from .batch_layout import PaddedLayout, padded
from .bilevel_sft_config import BilevelSFTConfig
from .data_selector import DataSelector
from .dataset_checks import contents_columns, hash_contents
from .packing import PackedRows
from .refine_prompts import QuestionReader, check_refinable, stop_token_ids
from .refinement import Refiner
from .replaced_rows import refuse_other_labels
from .response_checks import RewardFunc
from .response_generation import (
    ResponseGenerator,
    TransformersGenerator,
    VLLMGenerator,
    context_length,
    log_prob_batches,
    model_log_probs,
    ready_to_generate,
)
from .screening.evidence import FEWEST_TRUSTED
from .screening.screen_run import screen_rows, screen_run
from .screening.training_evidence import after_training, careful_prior
from .screening.verdict import Verdict
from .selector_setup import resolve_adaptive_validation_weight, selector_of_screen
from .selector_transfer import logit_probabilities
from .self_refining_collator import SelfRefiningCollator
from .sft_option_checks import refuse_split_rows
from .value_function import ValueFunction, fits_other_parameters, optimizer_maker


logger = get_logger(__name__)


_MIN_TRUSTED_ROWS = 30  # with fewer, chance passes the positive control of a screen too often


def check_arguments(
    args: BilevelSFTConfig, data_collator: Any, data_selector: DataSelector | None, reward_funcs: Any
) -> None:
    """
    Refuse arguments that exclude each other.

    Raises:
        `ValueError`: naming the argument and what to do.
    """
    if data_selector is not None and args.selection_method == "bmo":
        raise ValueError(
            "`data_selector` has no effect with `selection_method='bmo'`, whose weights are computed anew at every "
            "step. Leave it out, or use `selection_method='bds'`."
        )
    if isinstance(data_collator, SelfRefiningCollator):
        raise ValueError(
            "BilevelSFTTrainer puts refined responses in by itself. Set `refine_ratio`, and pass as `data_collator` "
            "what you gave to the `SelfRefiningCollator`, or nothing."
        )
    if reward_funcs is not None and args.refine_ratio == 0:
        raise ValueError("`reward_funcs` has no effect without refinement. Set `refine_ratio`, or leave it out.")
    if args.ignore_data_skip and args.refine_ratio > 0:
        raise ValueError(
            f"`ignore_data_skip=True` is not supported with `refine_ratio={args.refine_ratio}`: a resumed run starts "
            "its epoch again, and would give its steps the answers of earlier ones. Leave it out."
        )
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError(
            "`activation_offloading=True` needs an accelerator to offload from, and there is none here. Leave it out."
        )


_CREATE_OPTIMIZER = (SFTTrainer.create_optimizer, Trainer.create_optimizer)


class BilevelSetup(SFTTrainer):
    """What [`BilevelSFTTrainer`] builds once TRL has prepared the model."""

    validation_dataset: Dataset
    packed_training: PackedRows | None
    data_selector: DataSelector
    value_function: ValueFunction | None
    screening: Verdict | None
    _source_dataset: Dataset | IterableDataset
    _trusted_dataset: Dataset
    _rows_fingerprint: str
    _run_facts: dict[str, Any]
    _final_losses: np.ndarray | None
    _prepared: tuple[Any, Any]
    _known_optimizer: Any

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are spread over processes, so that all of them must do the same."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled or self.is_distributed_loading_by_transformers)

    def _refuse_unsupported_setup(self) -> None:
        if self.args.validation_loss_type == "dpo" and self.is_sharded:
            raise ValueError(
                "`validation_loss_type='dpo'` is not supported with DeepSpeed or FSDP: the reference's likelihoods "
                "are computed before the model is sharded. Use plain data parallelism, or "
                "`validation_loss_type='nll'`."
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: it would replace the bilevel objective. Remove it, or override "
                "`compute_loss` and add to what `super().compute_loss(...)` returns."
            )
        checkpointing = self.args.activation_checkpointing_kwargs or self.args.gradient_checkpointing_kwargs or {}
        if self.args.activation_checkpointing and checkpointing.get("selective") and is_peft_model(self.model):
            raise ValueError(
                "Selective activation checkpointing does not work with a PEFT adapter, whose layers PyTorch's own "
                "checkpointing runs. Leave out `selective`, or train without `peft_config`."
            )
        own = getattr(
            self.model.config, "distributed_config", None
        )  # of transformers, which loads a part of the model
        split = [name for name in ("tp_size", "pp_size", "ep_size") if (getattr(own, name, None) or 1) > 1]
        if split:
            raise ValueError(
                f"`distributed_config` with {', '.join(split)} above 1 is not supported: a row's loss is split over "
                "processes, or known to one of them only. Use data parallelism only."
            )
        refuse_split_rows(self.accelerator)
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            self._refuse_unsupported_prompt_learning(self.model.active_peft_config.peft_type.value)

    def _refuse_unsupported_prompt_learning(self, adapter: str) -> None:
        """Virtual tokens come before a row's own, and are no part of its inputs: positions in the outputs move."""
        for name, default in (("refine_ratio", 0), ("amortized_selector", False), ("packing", False)):
            value = getattr(self.args, name)
            if value != default:
                raise ValueError(
                    f"`{name}={value!r}` is not supported with prompt learning, got an adapter of type {adapter!r}: "
                    f"its virtual tokens move the positions of a row's own. Use `{name}={default!r}`, or another "
                    "adapter, for instance `peft_config=LoraConfig(...)`."
                )
        if self.padding_free:
            raise ValueError(
                f"`padding_free=True` is not supported with prompt learning, got an adapter of type {adapter!r}: its "
                "virtual tokens come before the first of the rows that share a sequence, not before each. Use "
                "`padding_free=False`, or another adapter, for instance `peft_config=LoraConfig(...)`."
            )

    def _resolve_screen(self, has_selector: bool, num_trusted: int) -> bool:
        """Whether training starts with a screen, as asked for, or where the options leave it open and it can."""
        args = self.args
        needs = {
            "`selection_method='bds'`": args.selection_method == "bds",
            "mirror descent": args.selector_optimizer == "mirror_descent",
            "sigmoid weights": args.selector_activation in (None, "sigmoid"),
            "`validation_loss_type='nll'`": args.validation_loss_type == "nll",
            "no `data_selector`": not has_selector,
            "rows that are no stream": not isinstance(self.train_dataset, IterableDataset),
            "a model that is whole on every process (no DeepSpeed or FSDP)": not self.is_sharded,
            "rows that TRL tokenizes": not self._skip_prepare_dataset,
            f"at least {FEWEST_TRUSTED} trusted rows": num_trusted >= FEWEST_TRUSTED,
        }
        # What a screen decides in their place
        needs["the default of `selector_prior`"] = args.selector_prior == BilevelSFTConfig.selector_prior
        learns = args.value_function == "adapter"
        needs["no `selector_learning_rate`, or `value_function='adapter'`"] = (
            args.selector_learning_rate is None or learns
        )
        missing = [name for name, is_met in needs.items() if not is_met]
        if args.screen is None:
            return not missing and args.value_function is None and num_trusted >= _MIN_TRUSTED_ROWS
        if args.screen and missing:
            raise ValueError(f"`screen=True` needs {', '.join(missing)}. Leave it out, or change that.")
        return args.screen

    def _start_from_screen(self, is_resumed: bool) -> None:
        """Before the first step: every row gets its weight from one forward pass under the model as it is."""
        args = self.args
        self._starts_with_screen = False  # later trainings go on with the weights there are
        fingerprints = self._rows_fingerprint, self._validation_fingerprint()
        verdict = screen_run(self, self._source_dataset, self._trusted_dataset, fingerprints, is_resumed)
        if not verdict.model_sees and args.screen is None:
            logger.warning(
                "This model tells a trusted answer from one of another prompt in "
                f"{verdict.facts['control_auroc']:.0%} of the pairs (chance: 50%), too few to screen by. Weights are "
                "learned while it trains."
            )
            return
        self.screening = verdict
        if args.value_function is None and verdict.suffices:
            self.value_function = None
        if self.value_function is None:
            self.data_selector = selector_of_screen(self.data_selector, verdict)
        else:
            prior = careful_prior(verdict, smallest_share=BilevelSFTConfig.selector_prior)
            self._run_facts["prior_good_share"] = prior.good_share
            # A row that is rather good than bad counts as proved
            self.data_selector.start_with(prior.good_probability, neutral=min(0.5, prior.good_share))
        self._has_adaptive_weight = resolve_adaptive_validation_weight(
            args, self.data_selector, len(self.validation_dataset), is_screened=self.value_function is None
        )
        self._set_validation_batch_size()
        self._run_facts["method"] = "BDS, weights from a screen" + " and a value function" * bool(self.value_function)
        self._run_facts["screening"] = verdict.facts

    def _good_probability(self) -> np.ndarray | None:
        """Probability of each row to be good as the weights are now, shape (N,); `None` for softmax weights."""
        if self.data_selector.activation != "sigmoid":
            return None
        return logit_probabilities(self.data_selector.logits.numpy(), self.data_selector.scored.numpy())

    def _verdict(self) -> Verdict | None:
        """That of the screen, with the probabilities of training where it adds evidence; `None` without a screen."""
        if self.screening is None or self.value_function is None:
            return self.screening
        good_probability = self._good_probability()
        assert good_probability is not None
        losses = self._final_losses if self._final_losses is not None else np.full_like(good_probability, np.nan)
        return after_training(self.screening, good_probability, losses, self._run_facts["prior_good_share"])

    def _look_again(self) -> None:
        """After the last step: a pass over the rows, where training adds to what a screen said of them."""
        has_changed_answers = self.args.refine_ratio > 0  # the loss would be that of another answer
        # On SIGTERM there is time for a checkpoint, and the run goes on from it
        was_stopped = self.args.enable_jit_checkpoint and self.state.global_step < self.state.max_steps
        adds_evidence = self.screening is not None and self.value_function is not None
        if adds_evidence and not has_changed_answers and not was_stopped:
            self._final_losses = screen_rows(self, self._source_dataset, "Looking again").loss

    def _resolve_value_function(self) -> bool:
        args = self.args
        if args.value_function is not None:
            return args.value_function == "adapter"
        works = (
            is_peft_model(self.model)
            and args.selection_method == "bds"
            and args.selector_optimizer == "mirror_descent"
            and not (self.is_sharded or args.fp16)
            and self.optimizer is None
            and type(self).create_optimizer in _CREATE_OPTIMIZER
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
        if self.is_sharded or self.args.fp16:
            raise ValueError(
                "`value_function='adapter'` is not supported with DeepSpeed, FSDP or fp16, which move or scale the "
                "adapter's parameters and gradients. Use plain data parallelism and bf16, or `value_function='none'`."
            )
        if self.optimizer is not None:
            raise ValueError(
                "`value_function='adapter'` needs an optimizer of its own, of the same kind as the model's, and "
                "cannot copy the one in `optimizers`. Pass `optimizer_cls_and_kwargs`, or use `value_function='none'`."
            )
        if type(self).create_optimizer not in _CREATE_OPTIMIZER:
            raise ValueError(
                "`value_function='adapter'` needs an optimizer of its own, of the same kind as the model's, and "
                f"cannot copy that of `{type(self).__name__}.create_optimizer`, which was overridden. Pass "
                "`optimizer_cls_and_kwargs`, or use `value_function='none'`."
            )
        names = [name for name, value in self.model.named_parameters() if value.requires_grad]
        if not names:
            raise ValueError(
                "The adapter of `model` has no parameter that can be trained. Load it with "
                "`PeftModel.from_pretrained(..., is_trainable=True)`."
            )
        decayed = {*self.get_decay_parameter_names(self.model)}
        make_optimizer = optimizer_maker(
            *self._optimizer_recipe(), self.args.weight_decay, self.args.optim, [name in decayed for name in names]
        )
        return ValueFunction(self.model, names, make_optimizer, self.args.max_grad_norm)

    def _optimizer_recipe(self) -> tuple[Any, dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        return self.get_optimizer_cls_and_kwargs(self.args, self.model)

    def _build_refiner(self, reward_funcs: list[RewardFunc]) -> Refiner:
        args = self.args
        if self.is_sharded:
            raise ValueError(
                "`refine_ratio` is not supported with DeepSpeed or FSDP yet: a process cannot generate with a model "
                "that is spread over others. Use plain data parallelism, or `refine_ratio=0`."
            )
        rows = self._source_dataset.with_format(None)
        template = self.chat_template
        if template is None and self.processing_class is not self._tokenizer:
            template = self.processing_class.chat_template  # TRL gives the user's to a processor, not to its tokenizer
        reader = QuestionReader(rows, self._tokenizer, template, args.refine_prompt_template)
        check_refinable(reader, self._formatting_func is not None, reward_funcs)
        stop_ids = stop_token_ids(self._tokenizer, self.model.generation_config.eos_token_id, template, rows[0])
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
            generator = VLLMGenerator(
                self.model, self.accelerator, self._tokenizer, stop_ids, args, batch_size, args.trust_remote_code
            )
        else:
            generator = TransformersGenerator(self.model, self._tokenizer, stop_ids, args, self.accelerator.autocast)
        return Refiner(
            args,
            reader,
            generator,
            self._generation_log_probs,
            stop_ids,
            reward_funcs,
            args.max_length,
            self._generation_context_length(),
            batch_size,
            args,
            self._validation_fingerprint(),
        )

    def _contents_columns(self, rows: Dataset) -> list[str]:
        return contents_columns(rows, self.args, self._formatting_func is not None)

    def _validation_fingerprint(self) -> str:
        contents = hash_contents(self._trusted_dataset, self._contents_columns(self._trusted_dataset))
        return hashlib.sha256(contents.tobytes()).hexdigest()[:16]

    def _refuse_what_was_changed(self) -> None:
        """What a user put into the trainer after it was built, and which would go against what it holds besides."""
        if self.args.validation_loss_type == "nll":  # of a pair the completions count, whatever else does
            refuse_other_labels(self._prepared, (self.train_dataset, self.validation_dataset))
        is_given = self.optimizer is not None and self.optimizer is not self._known_optimizer
        if self.value_function is not None and is_given:
            raise ValueError(
                "The value function needs an optimizer of its own, of the same kind as the model's, and cannot copy "
                "`trainer.optimizer`, which was set. Pass `optimizer_cls_and_kwargs`, or use `value_function='none'`."
            )

    def _generation_context_length(self) -> int | None:
        """Tokens that both the model and what generates with it can read, `None` if there is no limit."""
        limits = [context_length(self.model), self.args.vllm_max_model_length]
        return min((limit for limit in limits if limit is not None), default=None)

    def _generation_log_probs(self, examples: list[dict[str, list[int]]]) -> list[list[float]]:
        """Of labelled tokens under the model as it is now, by the forward pass of training."""
        with ready_to_generate(self.model):
            return model_log_probs(
                examples,
                padded(self.data_collator),
                lambda batch: self._forward(self.model, self._prepare_inputs(batch), PaddedLayout())[0],
                self._log_prob_batches,
            )
