"""Self-refining generation in a plain TRL trainer: the callback generates, the collator puts the responses in."""

import hashlib
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, send_to_device
from datasets import Dataset
from transformers import ProcessorMixin, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig

from .refine_prompts import Question, QuestionReader, check_refinable, stop_token_ids
from .refined_responses import CHECKPOINT_FILE_NAME, FOLDER_NAME, ResponseStore
from .refinement import Candidates, Refiner, is_refresh_due, refresh_metrics
from .refinement_config import RefinementConfig
from .response_checks import RewardFunc, check_reward_funcs
from .response_generation import (
    TransformersGenerator,
    context_length,
    is_sharded,
    log_prob_batches,
    model_log_probs,
    ready_to_generate,
)
from .self_refining_collator import SelfRefiningCollator


logger = get_logger(__name__)

# Without a row's weight G responses would make it count G times; prepared rows have no text for a template
_BILEVEL_ONLY = (
    "importance_ratio_clip",
    "importance_sampling_level",
    "num_refined_responses",
    "refine_prompt_template",
    "use_vllm",
)


def row_key(row: dict[str, Any]) -> int:
    """A number for a prepared row, of its tokens alone: whatever a trainer shuffles, filters or drops."""
    digest = hashlib.blake2b(np.asarray(row["input_ids"], dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class _KeyedQuestionReader(QuestionReader):
    """Questions under the key that the collator computes."""

    def read(self, row: int) -> Question | None:
        question = super().read(row)
        return None if question is None else question._replace(row=row_key(question.columns))


class SelfRefiningCallback(TrainerCallback):
    """
    Regenerates answers during the training of a plain [`~trl.SFTTrainer`], for its [`SelfRefiningCollator`].

    Refined answers replace the originals of a random share of the rows; there are no weights to choose by, and the
    trainer's own loss knows no importance ratios. Rows need a prompt that the loss leaves out: `prompt` and
    `completion`, or `messages` with `assistant_only_loss=True`. Responses are written to `output_dir` and to every
    checkpoint, as by [`BilevelSFTTrainer`].

    Args:
        collator ([`SelfRefiningCollator`]): the trainer's `data_collator`.
        config ([`RefinementConfig`]): which questions, when and how; `refine_mode="random"`.
        reward_funcs (`Callable` or `list[Callable]`, *optional*): accept or reject responses, as in
            [`BilevelSFTTrainer`]; prompts and completions are text, and of the dataset's columns they see those that
            the trainer has not removed (`remove_unused_columns=False` keeps all).

    Raises:
        `ValueError`: for options that only [`BilevelSFTTrainer`] can honour; when training starts, for rows without a
            prompt, streams, and a model that is spread over processes.
    """

    def __init__(
        self,
        collator: SelfRefiningCollator,
        config: RefinementConfig,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    ):
        if config.refine_ratio == 0:
            raise ValueError("`refine_ratio=0` refines nothing. Set it, for instance to 0.1, or remove the callback.")
        if config.refine_mode != "random":
            raise ValueError(
                f"`refine_mode='{config.refine_mode}'` needs the weights that BilevelSFTTrainer learns. Use "
                "`refine_mode='random'`."
            )
        for name in _BILEVEL_ONLY:
            if getattr(config, name) != RefinementConfig.__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}={getattr(config, name)!r}` cannot be honoured in a plain trainer. Leave it out, or use "
                    "BilevelSFTTrainer."
                )
        if config.refine_reward_threshold != 0 and not reward_funcs:
            raise ValueError(
                f"`refine_reward_threshold={config.refine_reward_threshold}` has no effect without `reward_funcs`. "
                "Pass them, or leave it out."
            )
        self.collator = collator
        self.config = config
        self.reward_funcs = check_reward_funcs(reward_funcs)
        self._refiner: Refiner | None = None
        self._candidates: Candidates | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, tokenizer = kwargs["model"], kwargs["processing_class"]
        if isinstance(tokenizer, ProcessorMixin):
            tokenizer = tokenizer.tokenizer
        dataset = kwargs["train_dataloader"].dataset
        if isinstance(args, SFTConfig) and args.packing:
            raise ValueError(
                "Self-refining generation in a plain trainer needs a sequence per row. Set `packing=False`, or use "
                "BilevelSFTTrainer, which packs rows that it knows apart."
            )
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"Self-refining generation needs a `datasets.Dataset`, got `{type(dataset).__name__}`: questions are "
                "chosen among all rows."
            )
        if is_sharded(model):
            raise ValueError(
                "Self-refining generation is not supported with DeepSpeed or FSDP yet, whoever sets them up: a "
                "process cannot generate with a model that is spread over others."
            )
        reader = _KeyedQuestionReader(dataset.with_format(None), tokenizer, None, None)
        check_refinable(reader, False, self.reward_funcs)
        keys = np.array([row_key({"input_ids": tokens}) for tokens in dataset.with_format(None)["input_ids"]])
        refinable = np.zeros(len(dataset), dtype=bool)
        refinable[np.unique(keys, return_index=True)[1]] = True  # of equal rows the first
        self._candidates = Candidates(refinable)
        batch_size = self.config.refine_batch_size or 4 * args.per_device_train_batch_size
        stop_ids = stop_token_ids(tokenizer, model.generation_config.eos_token_id, None, dataset.with_format(None)[0])

        log_probs_at_a_time = log_prob_batches(args.per_device_train_batch_size)

        def log_probs_of(examples: list[dict[str, list[int]]]) -> list[list[float]]:
            def forward(batch: dict[str, Any]) -> Any:
                return model(**send_to_device(batch, model.device), use_cache=False, fused_lm_head=True)

            with ready_to_generate(model):
                return model_log_probs(examples, self.collator.data_collator, forward, log_probs_at_a_time)

        self._refiner = Refiner(
            self.config,
            reader,
            TransformersGenerator(model, tokenizer, stop_ids, self.config),
            log_probs_of,
            stop_ids,
            self.reward_funcs,
            args.max_length if isinstance(args, SFTConfig) else None,
            context_length(model),
            batch_size,
            args,
        )
        store = self._find_store(args, state, self._refiner.settings)
        self.collator.connect(store, row_key)
        self.collator.publish(store.last_step)

    def _find_store(self, args: TrainingArguments, state: TrainerState, settings: str) -> ResponseStore:
        """Of the checkpoint that training goes on from, or a new one, the same on all processes."""
        parent = Path(args.output_dir) / FOLDER_NAME
        checkpoint = self._checkpoint(args, state)
        if state.global_step > 0:
            if (checkpoint / CHECKPOINT_FILE_NAME).is_file():
                return ResponseStore.load(checkpoint, parent, settings)
            logger.warning(f"{checkpoint} holds no refined responses: training goes on with the original answers.")
        run = [secrets.token_hex(4)]
        broadcast_object_list(run)
        return ResponseStore(parent, run[0], settings)

    @staticmethod
    def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        if not is_refresh_due(step, state.max_steps, self.config):
            return
        assert self._refiner is not None
        assert self._candidates is not None
        assert self.collator.store is not None
        responses = self._refiner.refresh(self.collator.store, step, self._candidates)
        self.collator.publish(step)
        state.log_history.append({"step": step, **refresh_metrics(responses)})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.collator.store is not None:
            self.collator.store.save(self._checkpoint(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero and self.collator.store is not None:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.collator.store.save(args.output_dir)
