"""Generating responses with the model that is being trained, or with vLLM, and leaving the training as it was."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import pad

from .fitting_batches import FittingBatches
from .random_state import batch_seed, random_state_kept
from .refinement_config import RefinementConfig


class ResponseGenerator(Protocol):
    """Answers prompts."""

    def generate(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """
        Answer every prompt G times.

        Args:
            prompts (`list[list[int]]`): tokens.
            seed (`int`): of the sampling.

        Returns:
            `list[list[int]]`: tokens of the responses, those of a prompt next to each other, each up to its stop token
            and including it.
        """


@contextmanager
def ready_to_generate(model: torch.nn.Module) -> Iterator[None]:
    """
    Switch off what only training needs: dropout, gradients, gradient checkpointing; and restore all of it.

    The random state is restored too, so that a run with refreshes draws the same numbers elsewhere. Module by module:
    `model.train()` would wake modules that the user keeps in eval mode, and enabling gradient checkpointing again
    would forget its options.
    """
    device = next(model.parameters()).device
    training = [(module, module.training) for module in model.modules()]
    checkpointing = [module for module in model.modules() if module.__dict__.get("gradient_checkpointing") is True]
    try:
        model.eval()
        for module in checkpointing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        with torch.no_grad(), random_state_kept(device):
            yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def own_generation_config_aside(model: torch.nn.Module, config: GenerationConfig) -> Iterator[None]:
    """
    `config` in place of the model's own, which `generate` takes whatever `config` does not set from.

    `suppress_tokens`, `min_p` and the like would have responses come from another distribution than the one whose
    log-probabilities are kept with them. PEFT's wrappers have none and read that of the model inside.
    """
    name = "generation_config"
    own = {module: vars(module)[name] for module in model.modules() if name in vars(module)}
    try:
        for module in own:
            module.generation_config = config
        yield
    finally:
        for module, generation_config in own.items():
            module.generation_config = generation_config


class TransformersGenerator:
    """
    Generates with the model itself, with its KV cache.

    Args:
        model (`PreTrainedModel` or `PeftModel`): not wrapped; adapters stay on.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        stop_ids (`list[int]`): tokens that end a response.
        config ([`~trl_bilevel.refinement_config.RefinementConfig`]): sampling options.
        autocast (`Callable`): the precision that the model trains in, as a context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        config: RefinementConfig,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model = model
        self.autocast = autocast
        self.context_length = context_length(model)
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.stop_ids = stop_ids
        cure = "Lower `refine_max_new_tokens` or `num_refined_responses`."
        self._batches = FittingBatches(sys.maxsize, "generation", cure)  # whole calls, until one does not fit
        # A load-balancing loss is for training; with a KV cache it cannot even be computed
        has_router = "output_router_logits" in model.config.get_text_config().to_dict()
        self.model_options = {"output_router_logits": False} if has_router else {}
        sampling = {"temperature": config.sampling_temperature, "top_p": config.refine_top_p, "top_k": 0}
        self.generation_config = GenerationConfig(
            max_new_tokens=config.refine_max_new_tokens,
            num_return_sequences=config.num_refined_responses,
            do_sample=config.sampling_temperature > 0,
            repetition_penalty=1.0,
            pad_token_id=self.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=stop_ids,
            use_cache=True,
            disable_compile=True,
            **(sampling if config.sampling_temperature > 0 else {}),
        )

    def generate(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """
        See [`ResponseGenerator`]; `seed` makes the same prompts give the same responses.

        Prompts that do not fit into memory together are answered in smaller batches, and so are all later ones.
        Sampled responses are then others than those of one batch, just as likely ones.
        """

        def answer(batch: Sequence[list[int]], number: int) -> list[list[int]]:
            return self._generate(batch, seed if number == 0 else batch_seed(seed, 0, number))

        return self._batches.run(answer, prompts)

    def _generate(self, prompts: Sequence[list[int]], seed: int) -> list[list[int]]:
        device = self.model.device
        inputs = [torch.tensor(prompt, device=device) for prompt in prompts]
        input_ids = pad(inputs, padding_value=self.pad_token_id, padding_side="left")  # (P, L)
        attention_mask = pad([torch.ones_like(prompt) for prompt in inputs], padding_value=0, padding_side="left")
        config = copy.deepcopy(self.generation_config)
        if self.context_length is not None:
            config.max_new_tokens = min(config.max_new_tokens, self.context_length - input_ids.shape[1])
        # PEFT generates with the inner model, past the forward that accelerate has prepared
        with ready_to_generate(self.model), own_generation_config_aside(self.model, config), self.autocast():
            torch.manual_seed(seed)
            outputs = self.model.generate(
                input_ids=input_ids, attention_mask=attention_mask, generation_config=config, **self.model_options
            )  # (P * G, L + new tokens)
        return [self._until_stop(response) for response in outputs[:, input_ids.shape[1] :].tolist()]

    def _until_stop(self, tokens: list[int]) -> list[int]:
        for position, token in enumerate(tokens):
            if token in self.stop_ids:
                return tokens[: position + 1]
        return tokens


def model_log_probs(
    examples: list[dict[str, list[int]]],
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    forward: Callable[[dict[str, Any]], Any],
    batches: FittingBatches,
) -> list[list[float]]:
    """
    Log-probabilities of the labelled tokens of each example, in nats, computed as training computes them.

    Args:
        examples (`list[dict]`): `input_ids` and `labels`.
        collator (`Callable`): makes a batch.
        forward (`Callable`): the model's outputs for a batch, with `log_probs` and `label_mask`, each (B, L-1).
        batches ([`~trl_bilevel.fitting_batches.FittingBatches`]): examples per forward pass.
    """

    def of_batch(batch: Sequence[dict[str, list[int]]], number: int) -> list[list[float]]:
        outputs = forward(collator(list(batch)))
        rows = zip(outputs.log_probs.float().cpu(), outputs.label_mask.cpu(), strict=True)
        return [values[mask].tolist() for values, mask in rows]

    return batches.run(of_batch, examples)


def log_prob_batches(size: int) -> FittingBatches:
    """Of examples for [`model_log_probs`]."""
    return FittingBatches(size, "the forward pass over responses", "Lower `refine_max_new_tokens` or `max_length`.")


class VLLMGenerator:
    """
    Generates with vLLM through TRL's bridge, as its GRPO trainer does: weights are sent over before each refresh.

    Args:
        model, accelerator, tokenizer: as [`~trl.generation.VLLMGeneration`] takes them.
        stop_ids (`list[int]`): tokens that end a response.
        config ([`~trl_bilevel.refinement_config.RefinementConfig`]): sampling and vLLM options.
        batch_size (`int`): questions that vLLM answers at a time.
        trust_remote_code (`bool`): whether a colocated vLLM may run code that comes with the model, as in
            [`~trl.SFTConfig`].
    """

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        config: RefinementConfig,
        batch_size: int,
        trust_remote_code: bool = False,
    ):
        self.num_responses = config.num_refined_responses
        self.stop_ids = stop_ids
        self.vllm = VLLMGeneration(
            model=model,
            accelerator=accelerator,
            processing_class=tokenizer,
            mode=config.vllm_mode,
            server_base_url=config.vllm_server_base_url,
            server_timeout=config.vllm_server_timeout,
            group_port=config.vllm_group_port,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            max_model_length=config.vllm_max_model_length,
            max_num_seqs=batch_size,
            enable_sleep_mode=config.vllm_enable_sleep_mode,
            trust_remote_code=trust_remote_code,
            temperature=config.sampling_temperature,
            top_p=config.refine_top_p,
            max_completion_length=config.refine_max_new_tokens,
            # Ours come from the training forward, so that ratios start at 1
            logprobs=None,
            generation_kwargs={"stop_token_ids": stop_ids},
        )

    def sync_weights(self) -> None:
        """Send the model's current weights to vLLM."""
        self.vllm.sync_weights()

    def generate(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """See [`ResponseGenerator`]."""
        # The bridge cuts a server's answers into equal slices, one per process
        longest = max(gather_object([len(prompts)]))
        padded = prompts + [[self.stop_ids[0]]] * (longest - len(prompts))
        rounds = []
        for number in range(self.num_responses):
            # One seed holds for all requests of a call: equal prompts in one call would get equal responses
            self.vllm.generation_kwargs["seed"] = seed + number
            _, completion_ids, _, _ = self.vllm.generate(padded, images=None, num_generations=1)
            rounds.append(completion_ids[: len(prompts)])
        return [list(response) for responses in zip(*rounds, strict=True) for response in responses]


def context_length(model: Any) -> int | None:
    """Tokens that a model has positions for, `None` if there is no limit."""
    # An attribute, as families that store it under another name map it to this one
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def is_sharded(model: Any) -> bool:
    """Whether the model's parameters are spread over processes, so that no process can generate on its own."""
    by_accelerate = PartialState().distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    return by_accelerate or getattr(model, "is_distributed_loading_by_transformers", False)
