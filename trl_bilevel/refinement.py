"""
A refresh of online self-refining generation (arXiv 2511.21056): which questions are answered anew, and what of it.

Every process generates its share of the batches and keeps it on disk at once; together they make one file of the
[`~trl_bilevel.refined_responses.ResponseStore`]. What is generated for a batch depends on the batch alone, not on the
number of processes.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import TrainingArguments

from .random_state import batch_seed
from .refine_prompts import Question, QuestionReader
from .refined_responses import RESPONSE_SCHEMA, RefreshPlan, ResponseStore
from .refinement_config import RefinementConfig
from .refinement_settings import refinement_settings
from .response_checks import FLAWS, Flaw, RewardFunc, find_flaws, sum_rewards
from .response_generation import ResponseGenerator, VLLMGenerator


logger = get_logger(__name__)

_FEWEST_FOR_COLLAPSE = 4


class Candidates(NamedTuple):
    """The training rows that a refresh chooses from, N of them."""

    refinable: np.ndarray
    """Which can be refined at all, bool of shape (N,)."""
    weights: np.ndarray | None = None
    """Learned weights, shape (N,), mean 1; `None` without a selector."""
    scores: np.ndarray | None = None
    """What the weights are made of, the lowest first to go, shape (N,): the logits."""


def choose_rows(
    candidates: Candidates, config: RefinementConfig, seed: int, has_question: Callable[[int], bool] = lambda row: True
) -> np.ndarray:
    """
    The rows of a refresh, int64, at most `refine_ratio` of all N.

    `"random"` draws the same rows every time, out of all; those among them that cannot be refined are passed over.
    `"lowest_weight"` takes the refinable rows of the lowest scores, equal ones in random order.

    Args:
        candidates ([`Candidates`]): the training rows.
        config ([`~trl_bilevel.refinement_config.RefinementConfig`]): ratio and mode.
        seed (`int`): of the random order.
        has_question (`Callable`): whether a row of a low score can be answered; if not, another takes its place.

    Example:

    ```python
    >>> import numpy as np
    >>> scores = np.array([0.5, -2.0, 1.0, -1.0])
    >>> config = RefinementConfig(refine_ratio=0.5)
    >>> choose_rows(Candidates(np.array([True, True, True, True]), scores=scores), config, seed=0)
    array([1, 3])

    ```
    """
    num_rows = len(candidates.refinable)
    num_chosen = round(config.refine_ratio * num_rows)
    order = np.random.default_rng(seed).permutation(num_rows)
    if config.refine_mode == "random":
        chosen = order[:num_chosen]
        return np.sort(chosen[candidates.refinable[chosen]])
    assert candidates.scores is not None
    order = order[candidates.refinable[order]]
    lowest_first = order[np.argsort(candidates.scores[order], kind="stable")].tolist()
    return np.sort(np.array([*islice(filter(has_question, lowest_first), num_chosen)], dtype=np.int64))


def is_refresh_due(step: int, max_steps: int, config: RefinementConfig) -> bool:
    """
    Whether answers are regenerated before an optimizer step.

    Args:
        step (`int`): optimizer steps done so far.
        max_steps (`int`): of the whole training, which steps below 1 are a share of.
        config ([`~trl_bilevel.refinement_config.RefinementConfig`]): first step and interval.

    Example:

    ```python
    >>> config = RefinementConfig(refine_ratio=0.1, refine_start_step=0.5, refine_every_steps=20)
    >>> [step for step in range(100) if is_refresh_due(step, max_steps=100, config=config)]
    [50, 70, 90]

    ```
    """
    start, every = (
        math.ceil(steps * max_steps) if 0 < steps < 1 else int(steps)
        for steps in (config.refine_start_step, config.refine_every_steps)
    )
    return step >= start and (step - start) % every == 0


class Refiner:
    """
    Answers questions anew.

    Args:
        config ([`~trl_bilevel.refinement_config.RefinementConfig`]): options.
        reader ([`~trl_bilevel.refine_prompts.QuestionReader`]): turns rows into questions.
        generator ([`~trl_bilevel.response_generation.ResponseGenerator`]): answers them.
        log_probs_of (`Callable`): log-probabilities of the labelled tokens of some `{"input_ids", "labels"}` under the
            model as it trains, one list per example, in nats.
        stop_ids (`list[int]`): tokens that end a response.
        reward_funcs (`list[Callable]`): decide on responses, see [`~trl_bilevel.response_checks.sum_rewards`].
        max_length (`int`, *optional*): of a training sequence, in tokens.
        context_length (`int`, *optional*): tokens that the model can read.
        batch_size (`int`): questions per call of the generator.
        training (`TrainingArguments`): of the run; its seed is that of the choice and the sampling.
        validation_rows (`str`): fingerprint of the trusted rows, where there are any.
    """

    def __init__(
        self,
        config: RefinementConfig,
        reader: QuestionReader,
        generator: ResponseGenerator,
        log_probs_of: Callable[[list[dict[str, list[int]]]], list[list[float]]],
        stop_ids: list[int],
        reward_funcs: list[RewardFunc],
        max_length: int | None,
        context_length: int | None,
        batch_size: int,
        training: TrainingArguments,
        validation_rows: str = "",
    ):
        self.config = config
        self.reader = reader
        self.generator = generator
        self.log_probs_of = log_probs_of
        self.stop_ids = stop_ids
        self.reward_funcs = reward_funcs
        self.max_length = max_length
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = training.seed
        self.show_progress = not training.disable_tqdm
        self._training = training
        self.validation_rows = validation_rows

    @property
    def settings(self) -> str:
        """Digest of the options that decide on the responses of a run: with others they must not be mixed."""
        others = (self.batch_size, self.max_length, self.validation_rows)
        return refinement_settings(self.config, self._training, self.reward_funcs, *others)

    def refresh(self, store: ResponseStore, step: int, candidates: Candidates) -> pa.Table:
        """
        Answer the chosen questions anew and add the responses to the store.

        A refresh that was interrupted, or done before the run was, is taken up where it stopped: its questions stay,
        and no response that is on disk is generated again.

        Args:
            store ([`~trl_bilevel.refined_responses.ResponseStore`]): of this run.
            step (`int`): optimizer steps done.
            candidates ([`Candidates`]): the same on every process.

        Returns:
            `pyarrow.Table`: the responses of this refresh, see `RESPONSE_SCHEMA`.
        """
        state = PartialState()
        plan, responses = self._plan(store, step, candidates)
        if responses is None:
            questions = self._questions(plan.rows)
            batches = [
                questions[start : start + self._questions_per_batch(len(questions))]
                for start in range(0, len(questions), self._questions_per_batch(len(questions)))
            ]
            weights = dict(zip(plan.rows, plan.weights or [], strict=False))
            parts = self._generate_parts(store, step, batches, weights)
            # Of all processes, in the order of the batches
            by_number = sorted(gather_object(list(parts.items())), key=itemgetter(0))
            responses = pa.concat_tables([RESPONSE_SCHEMA.empty_table(), *(part for _, part in by_number)])
            num_parts = len(batches)
            _warn_about_useless(responses, step)
            _warn_about_collapse(responses, step, {question.original.strip() for question in questions})
        else:
            num_parts = 0
        if state.is_local_main_process and not store.has_refresh(step):
            store.write_refresh(step, responses, num_parts)
        state.wait_for_everyone()
        store.read_new_files(step)
        return responses

    def _plan(self, store: ResponseStore, step: int, candidates: Candidates) -> tuple[RefreshPlan, pa.Table | None]:
        """The plan of the refresh, and its responses if it is complete already; the main process decides."""
        decision: list[Any] = [None, None, False]
        if PartialState().is_main_process:
            rows = choose_rows(candidates, self.config, self.seed, has_question=self._has_question)
            plan, complete = store.read_plan(step), None
            outdated = plan is not None and plan.rows != rows.tolist()
            if plan is not None and not outdated:
                complete = store.read_refresh(step)
                logger.info(f"Step {step}: going on with a refresh that was begun before this run was interrupted.")
            else:
                weights = None if candidates.weights is None else candidates.weights[rows].tolist()
                plan = RefreshPlan(rows.tolist(), weights)
            decision = [plan, complete, outdated]
        broadcast_object_list(decision)
        state = PartialState()
        if decision[2]:  # an attempt that had come to this step another way: another model's answers
            if state.is_local_main_process:
                store.discard(step)
            state.wait_for_everyone()
        if state.is_main_process and decision[1] is None:
            store.write_plan(step, decision[0])
        return decision[0], decision[1]

    def _questions(self, rows: list[int]) -> list[Question]:
        """Of the rows that have one and room for an answer, the longest first: memory runs out at once or never."""
        questions = [question for row in rows if (question := self.reader.read(row)) is not None]
        fitting = [question for question in questions if self._room(question) > 0]
        if len(fitting) < len(rows):
            logger.warning(
                f"{len(rows) - len(fitting)} of {len(rows)} rows cannot be refined: they do not end with an answer in "
                "text, or leave no room for one."
            )
        return sorted(fitting, key=lambda question: -len(question.generation_ids))

    def _has_question(self, row: int) -> bool:
        question = self.reader.read(row)
        return question is not None and self._room(question) > 0

    def _room(self, question: Question) -> int:
        """Tokens that a response may have."""
        room = self.config.refine_max_new_tokens
        if self.max_length is not None:
            room = min(room, self.max_length - len(question.prompt_ids))
        if self.context_length is not None:
            longest = max(len(question.prompt_ids), len(question.generation_ids))
            room = min(room, self.context_length - longest)
        return room

    def _questions_per_batch(self, num_questions: int) -> int:
        # vLLM makes its own batches
        if isinstance(self.generator, VLLMGenerator):
            return max(1, math.ceil(num_questions / PartialState().num_processes))
        return self.batch_size

    def _generate_parts(
        self, store: ResponseStore, step: int, batches: list[list[Question]], weights: dict[int, float]
    ) -> dict[int, pa.Table]:
        """This process' share of the batches, by their numbers."""
        state = PartialState()
        own = range(state.process_index, len(batches), state.num_processes)
        parts: dict[int, pa.Table] = {}
        if isinstance(self.generator, VLLMGenerator):
            # One part per process, whose size depends on their number, so none is kept; all take part in the call
            missing = [*own] or [-1]
            self.generator.sync_weights()
        else:
            parts = {number: part for number in own if (part := store.read_part(step, number)) is not None}
            missing = [number for number in own if number not in parts]
        progress = tqdm(
            missing,
            desc=f"Step {step}: refining answers",
            unit="batch",
            leave=False,
            disable=not (self.show_progress and state.is_main_process),
        )
        for number in progress:
            if isinstance(self.generator, VLLMGenerator):
                # Of one tensor-parallel group all must draw the same numbers
                part = self._answer(
                    batches[number] if number >= 0 else [], step, batch_seed(self.seed, step, 0), weights
                )
            else:
                part = self._answer(batches[number], step, batch_seed(self.seed, step, number), weights)
                store.write_part(step, number, part)
            parts[number] = part
        return parts

    def _answer(self, questions: list[Question], step: int, seed: int, weights: dict[int, float]) -> pa.Table:
        """Generate the responses of a batch of questions, and judge them."""
        group_size = self.config.num_refined_responses
        settings = json.dumps(self.config.generation_settings)
        generated = self.generator.generate([question.generation_ids for question in questions], seed)
        asked = [question for question in questions for _ in range(group_size)]  # one per response
        completions = [tokens[: self._room(question)] for question, tokens in zip(asked, generated, strict=True)]
        texts = [
            self.reader.text_of(question, tokens, self.stop_ids)
            for question, tokens in zip(asked, completions, strict=True)
        ]
        log_probs = self.log_probs_of(
            [
                {
                    "input_ids": question.generation_ids + tokens,
                    "labels": [-100] * len(question.generation_ids) + tokens,
                }
                for question, tokens in zip(asked, completions, strict=True)
            ]
        )
        for values, tokens in zip(log_probs, completions, strict=True):
            if len(values) != len(tokens):
                raise ValueError(
                    f"The data collator kept {len(values)} of the {len(tokens)} tokens of a refined response. "
                    "Importance ratios need all of them: shorten sequences with `max_length`, not in the collator."
                )
        verdicts = self._judge(asked, completions, texts, log_probs)
        records = [
            {
                "row": question.row,
                "step": step,
                "response": number % group_size,
                "used": used,
                "flaw": flaw,
                "text": texts[number],
                "prompt_ids": question.prompt_ids,
                "completion_ids": completions[number],
                "log_probs": log_probs[number],
                "weight": weights.get(question.row),
                "settings": settings,
            }
            for number, (question, (used, flaw)) in enumerate(zip(asked, verdicts, strict=True))
        ]
        return pa.Table.from_pylist(records, schema=RESPONSE_SCHEMA)

    def _judge(
        self, asked: list[Question], completions: list[list[int]], texts: list[str], log_probs: list[list[float]]
    ) -> list[tuple[bool, Flaw | None]]:
        """Of each response whether it is used, and what is wrong with it."""
        rewards: list[float | None] = [None] * len(asked)
        if self.reward_funcs and asked:
            rewards = sum_rewards(self.reward_funcs, asked, texts, completions)
        flaws: list[Flaw | None] = []
        for start in range(0, len(asked), self.config.num_refined_responses):
            group = slice(start, start + self.config.num_refined_responses)
            finished = [tokens[-1] in self.stop_ids for tokens in completions[group]]
            original, least = asked[start].original, self.config.refine_min_probability
            flaws += find_flaws(texts[group], completions[group], log_probs[group], finished, original, least)
        verdicts: list[tuple[bool, Flaw | None]] = []
        for flaw, reward in zip(flaws, rewards, strict=True):
            rejected = reward is not None and not reward > self.config.refine_reward_threshold
            fit = flaw is None or (flaw != "nonfinite" and not self.config.refine_discard_flawed)
            # What is turned down, be it the original again, speaks for nothing
            verdicts.append((fit and not rejected, "rejected" if rejected and flaw in (None, "identical") else flaw))
        return verdicts


def _warn_about_useless(responses: pa.Table, step: int) -> None:
    if len(responses) and not any(responses.column("used").to_pylist()):
        flaws = Counter(responses.column("flaw").to_pylist()).most_common()
        logger.warning(
            f"Step {step}: none of {len(responses)} responses can be used: "
            f"{', '.join(f'{count} {flaw}' for flaw, count in flaws)}. If they are truncated, raise "
            "`refine_max_new_tokens`, or set the token that ends an answer by `eos_token`."
        )


def _warn_about_collapse(responses: pa.Table, step: int, originals: set[str]) -> None:
    texts = set(responses.column("text").to_pylist())
    num_questions = len(responses.column("row").unique())
    if len(texts) == 1 and len(originals) > 1 and num_questions >= _FEWEST_FOR_COLLAPSE:
        logger.warning(
            f"Step {step}: the model answers all {num_questions} refined questions alike, by {texts.pop()[:80]!r}: it "
            "has collapsed. Lower `learning_rate` or `refine_ratio`, raise `refine_start_step`, or use `reward_funcs`."
        )


def refresh_metrics(responses: pa.Table) -> dict[str, float]:
    """
    What to log of a refresh: shares are of its responses, the length is in tokens.

    Args:
        responses (`pyarrow.Table`): see `RESPONSE_SCHEMA`.
    """
    num_responses = max(len(responses), 1)
    flaws = Counter(responses.column("flaw").to_pylist())
    lengths = [len(tokens) for tokens in responses.column("completion_ids").to_pylist()]
    return {
        "refine/questions": float(len(responses.column("row").unique())),
        "refine/response_length": float(np.mean(lengths)) if lengths else 0.0,
        "refine/used_ratio": sum(responses.column("used").to_pylist()) / num_responses,
        **{f"refine/{flaw}_ratio": flaws[flaw] / num_responses for flaw in FLAWS},
    }


def mean_log_prob(log_probs: pa.ListScalar) -> float:
    """Mean over the tokens of a response, in nats."""
    return log_probs.values.to_numpy().astype(np.float64).mean().item()
