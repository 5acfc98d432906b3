"""TRL's trainer with a second level: what a user builds, trains, and asks for results."""

import math
import os
import secrets
from inspect import signature
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from .amortized_selector import AmortizedSelector, hidden_width
from .bilevel_setup import BilevelSetup, check_arguments
from .bilevel_sft_config import BilevelSFTConfig
from .bilevel_step import BilevelStep
from .curation import check_keep_ratio, curate_dataset
from .data_selector import DataSelector
from .dataset_checks import (
    check_datasets,
    check_prepared_rows,
    check_training_rows,
    hash_contents,
    resolve_sample_ids,
    resolve_sources,
)
from .hub_publishing import HubPublishing
from .paired_batches import add_sample_indices, read_sample_indices
from .paired_loading import PairedLoading
from .refined_responses import ResponseStore
from .response_checks import RewardFunc, check_reward_funcs
from .row_format_checks import check_row_formats
from .run_records import describe_run, read_facts
from .scoring import RowScorer, score_dataset
from .screening.training_evidence import noise_rate_of
from .screening.verdict import Verdict
from .selector_setup import build_selector, resolve_adaptive_validation_weight
from .stream_checks import check_stream
from .streamed_curation import curate_stream
from .streamed_selector import StreamedSelector
from .training_metrics import TrainingMetrics
from .trusted_rows import read_trusted_rows
from .weight_history import WeightHistory


logger = get_logger(__name__)

_PREFETCH_FACTOR = 2  # of PyTorch, where a dataloader has workers
_MAX_LOGGED_SOURCES = 20  # more would drown the other metrics; `source_weights` has them all


class BilevelSFTTrainer(HubPublishing, BilevelSetup, PairedLoading, BilevelStep):
    r"""
    [`~trl.SFTTrainer`] that learns, while it trains, how much each training row should count.

    Its one change is the loss of a step. Each batch carries training rows and rows of a trusted validation dataset
    through one forward pass. The model descends $\lambda L_{val} + (1-\lambda) L_{train}(w)$; then the data selector
    moves the weights $w$ of the batch's training rows against their losses. Bilevel data selection, arXiv 2511.21056.

    Where to read it: [`~trl_bilevel.bilevel_step.BilevelStep`] is the step itself,
    [`~trl_bilevel.paired_loading.PairedLoading`] its batches and [`~trl_bilevel.bilevel_setup.BilevelSetup`] what it
    works with; this class puts them together, and hands out the results.

    Args:
        model, args, data_collator, train_dataset, ...:
            As in [`~trl.SFTTrainer`], all of them. A stream (`datasets.IterableDataset`) as `train_dataset` needs
            `max_steps` and `sample_id_column`. `args` is a [`BilevelSFTConfig`]; any other
            [`~transformers.TrainingArguments`] are completed with its defaults.
        validation_dataset (`datasets.Dataset`):
            Rows you trust, in the format of `train_dataset`. They define what a good training row is, and are trained
            on; a stream of up to 10,000 is read whole. `eval_dataset` is never seen by either level.
        data_selector ([`DataSelector`] or `str`, *optional*):
            Weights to start from, joined by sample id: a selector of another run, for instance of a smaller model, or
            what [`DataSelector.from_pretrained`] reads. With `selector_learning_rate=0` they stay as they are.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            With `refine_ratio` above 0, decide which refined responses are used: functions as
            [`~trl.GRPOTrainer`] takes them, of `prompts`, `completions` and the dataset's columns.

    Attributes:
        data_selector ([`DataSelector`]): the rows' weights, `data_selector.weights()`.
        screening ([`~trl_bilevel.screening.verdict.Verdict`] or `None`): what the screen said that the weights come
            from, once training has begun; `None` in a run without.
        validation_weight (`float`): lambda, as it is now.
        value_function ([`~trl_bilevel.value_function.ValueFunction`] or `None`): the values that the weights compare
            with; `None` in a run without.
        validation_dataset (`datasets.Dataset`): the trusted rows, prepared for training.

    Raises:
        `ValueError` or `TypeError`: for datasets or options that cannot work, before training starts.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

    trainer = BilevelSFTTrainer(
        model="Qwen/Qwen3-0.6B",
        args=BilevelSFTConfig(output_dir="out", learning_rate=2e-4),
        train_dataset=load_dataset("json", data_files="mixture.jsonl", split="train"),
        validation_dataset=load_dataset("json", data_files="trusted.jsonl", split="train"),
        peft_config=LoraConfig(),
    )
    trainer.train()
    curated = trainer.curate(keep_ratio=0.7)
    ```
    """

    def __init__(
        self,
        model: "str | PreTrainedModel",
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *sft_args: Any,
        validation_dataset: Any = None,
        data_selector: DataSelector | str | os.PathLike | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        **sft_kwargs: Any,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = BilevelSFTConfig(f"{model_id.split('/')[-1]}-BilevelSFT")
        elif not isinstance(args, BilevelSFTConfig):
            args = BilevelSFTConfig.from_training_arguments(args)
        sft_arguments = signature(SFTTrainer).bind_partial(
            model, args, data_collator, train_dataset, *sft_args, **sft_kwargs
        )
        has_formatting_func = sft_arguments.arguments.get("formatting_func") is not None
        validation_dataset = read_trusted_rows(validation_dataset)
        check_datasets(train_dataset, validation_dataset, args, has_formatting_func)
        check_row_formats(train_dataset, validation_dataset, args, has_formatting_func)
        self._know_the_rows(train_dataset, args, data_selector)
        if isinstance(data_selector, (str, os.PathLike)):
            data_selector = DataSelector.from_pretrained(data_selector, token=args.hub_token)
        check_arguments(args, data_collator, data_selector, reward_funcs)
        reward_funcs = check_reward_funcs(reward_funcs)

        indexed = train_dataset if self._is_streamed else add_sample_indices(train_dataset)
        super().__init__(model, args, data_collator, indexed, *sft_args, **sft_kwargs)
        self._refuse_unsupported_setup()
        self._warn_about_published_paths()

        self._trusted_dataset = validation_dataset
        self._prepare_validation(validation_dataset)
        self._starts_with_screen = self._resolve_screen(data_selector is not None, len(validation_dataset))
        self._build_upper_level(data_selector)
        self._training_metrics = TrainingMetrics()
        self._weight_history = WeightHistory()
        self._run_facts = describe_run(
            args,
            self.model,
            train_dataset,
            validation_dataset,
            has_value_function=self.value_function is not None,
            has_adaptive_weight=self._has_adaptive_weight,
        )
        self._curated_repo_id: str | None = None  # once it was pushed
        self._prepare_refinement(reward_funcs)
        self._prepared = self.train_dataset, self.validation_dataset
        self._known_optimizer = self.optimizer

    def _know_the_rows(
        self, train_dataset: Dataset | IterableDataset, args: BilevelSFTConfig, data_selector: Any
    ) -> None:
        self._source_dataset = train_dataset
        self._is_streamed = isinstance(train_dataset, IterableDataset)
        self.screening: Verdict | None = None
        self._final_losses: np.ndarray | None = None  # of the rows, once a training has ended
        self._sample_ids: pa.ChunkedArray | None = None  # of a stream the selector knows them
        if self._is_streamed:
            self._stream_ids = check_stream(train_dataset, args, data_selector)
        else:
            self._sample_ids = resolve_sample_ids(train_dataset, args.sample_id_column)
        self._sources = resolve_sources(train_dataset, args.source_column) if args.source_column else None

    def _prepare_validation(self, validation_dataset: Dataset) -> None:
        args = self.args
        self.validation_dataset = self._prepare_validation_dataset(validation_dataset)
        check_prepared_rows(
            "validation_dataset", len(validation_dataset), len(self.validation_dataset), args.max_length
        )
        self._rows_fingerprint = "stream"
        if not self._is_streamed:
            contents = hash_contents(self._source_dataset, self._contents_columns(self._source_dataset))
            self._rows_fingerprint = check_training_rows(
                self.train_dataset, self.validation_dataset, args, self._sample_ids, self._sources, contents
            )
        self._pack()
        self._set_validation_batch_size()

    def _build_upper_level(self, given: DataSelector | None) -> None:
        args = self.args
        has_value_function = self._resolve_value_function()
        self.data_selector = build_selector(args, has_value_function, given, self._sample_ids, self._sources)
        if given is not None:
            num_known = self.data_selector.start_from(given)
            logger.info(
                f"{num_known} of {self.data_selector.num_rows} rows start with a weight of the given selector."
            )
        if args.validation_loss_type == "dpo":
            self._add_reference_likelihoods()
            self._set_validation_batch_size()  # again: some pairs may have been left out
        self._has_adaptive_weight = resolve_adaptive_validation_weight(
            args, self.data_selector, len(self.validation_dataset)
        )
        self.value_function = self._build_value_function() if has_value_function else None
        self.amortized_selector = None
        if args.amortized_selector:
            # Of the last hidden states, which a model may project down before its head
            self.amortized_selector = AmortizedSelector(hidden_width(self.model), args.seed)

    def _prepare_refinement(self, reward_funcs: list[RewardFunc]) -> None:
        args = self.args
        self.response_store = ResponseStore(self._responses_folder)
        self.refiner = self._build_refiner(reward_funcs) if args.refine_ratio > 0 else None
        self._trained_rows = np.zeros(0 if self._is_streamed else len(self._source_dataset), dtype=bool)
        if not self._is_streamed:
            self._trained_rows[read_sample_indices(self.train_dataset)] = True
        # Batches that are collated before the answers of a refresh are there: those that the workers hold, and one
        # that accelerate fetches ahead
        num_ahead = 1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or _PREFETCH_FACTOR)
        self._refresh_delay = math.ceil(num_ahead / args.gradient_accumulation_steps)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in Trainer.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint's folder; `True` for the newest one in
                `output_dir` that was written to its end; `"last_intact"` to pass over damaged ones too.
            *args, **kwargs: as in Trainer.

        Raises:
            `ValueError`: if there is no such checkpoint, if it is torn or damaged, naming the file, or if it belongs
                to other rows or options.
        """
        resume_from_checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        self._refuse_what_was_changed()
        if resume_from_checkpoint and self.args.screen is None:  # as it began, also if it now trains for longer
            self._starts_with_screen = read_facts(resume_from_checkpoint).get("screening") is not None
        if self._starts_with_screen:
            self._start_from_screen(is_resumed=bool(resume_from_checkpoint))
        if self.refiner is not None:
            # Responses are known by the step they were made at, so every training has a folder of its own; going on
            # from a checkpoint replaces it
            run = [secrets.token_hex(4)]
            broadcast_object_list(run)
            self.response_store.go_on_as(ResponseStore(self._responses_folder, run[0], self.refiner.settings))
        self._weight_history = WeightHistory()  # whose time runs from now, as do the tokens
        self._total_train_tokens = 0
        self._final_losses = None
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._weight_history.stop_clock()
            self._known_optimizer = self.optimizer
        self._look_again()
        return output

    # ---- Logs ----
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._collect_metrics()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._collect_metrics()
        return super()._finalize_training(*args, **kwargs)

    def _collect_metrics(self) -> None:
        """For the next line of the log, from all processes; `log` may be called by one of them alone."""
        if self.model.training:
            metrics = self._training_metrics.pop(self.accelerator.gather)
            if metrics:
                self._total_train_tokens += int(metrics["num_tokens"])
                metrics["num_tokens"] = self._total_train_tokens
                if not self.aux_loss_enabled:
                    del metrics["aux_loss"]
                if self.refiner is None:
                    del metrics["refine/row_ratio"]
                if self.args.validation_loss_type != "dpo":
                    metrics = {name: value for name, value in metrics.items() if not name.startswith("rewards/")}
                statistics = self.data_selector.statistics()
                metrics |= {f"selector/{name}": value for name, value in statistics._asdict().items()}
                if self._sources is not None and len(self._sources.names) <= _MAX_LOGGED_SOURCES:
                    metrics |= {f"source_weight/{name}": value for name, value in self.source_weights().items()}
            self._metrics["train"].update({name: [value] for name, value in metrics.items()})

    # ---- Results and checkpoints ----
    def curate(self, keep_ratio: float | str | None = None) -> Dataset | IterableDataset:
        """
        The training dataset with every row's score, and only its best rows if `keep_ratio` is given.

        Args:
            keep_ratio (`float` or `"auto"`, *optional*): share of rows to keep, in (0, 1]; `"auto"` leaves out what a
                screen says can be dropped: rows of which at most a tenth is good on average, if good rows are like
                the trusted ones. Learned weights promise nothing, and it drops none. `None` keeps and scores all.

        Returns:
            `datasets.Dataset`: the columns of `train_dataset` unchanged but for refined answers, then `sample_id`,
            `weight`, `rank`, `scored` and `response_source`; with refinement also `original_completion` and
            `refined_responses`. See [`~trl_bilevel.curation.curate_dataset`]. Of a stream a `datasets.IterableDataset`
            of the rows seen, which reads the stream again; see
            [`~trl_bilevel.streamed_curation.curate_stream`].

        Raises:
            `ValueError`: if `keep_ratio` is out of range, or for a cut before any row has a score: train first.
        """
        check_keep_ratio(keep_ratio)
        if keep_ratio is not None and not self._is_streamed:
            if self.state.global_step == 0 and not self.data_selector.scored.any():
                raise ValueError("No row of this trainer has a score yet, so their order says nothing. Train first.")
            if warning := self._ranking_warning():
                logger.warning(warning)
        if isinstance(self.data_selector, StreamedSelector):
            return curate_stream(self._source_dataset, self._stream_ids, self.data_selector, keep_ratio)
        assert self._sample_ids is not None
        return curate_dataset(
            self._source_dataset,
            self._sample_ids,
            weights=self.data_selector.weights().numpy(),
            scores=self.data_selector.logits.numpy(),
            scored=self.data_selector.scored.numpy(),
            judged=self.data_selector.judged.numpy(),
            keep_ratio=keep_ratio,
            verdict=self._verdict(),
            good_probability=self._good_probability(),
            responses=None if self.refiner is None else self.response_store.table(arrived_only=True),
        )

    def score(
        self,
        dataset: Dataset | IterableDataset,
        output_dir: str | os.PathLike | None = None,
        batch_size: int | None = None,
        chunk_size: int = 10_000,
    ) -> Dataset:
        """
        Score rows that were never trained on, so that a run on a sample curates a corpus far larger.

        One forward pass a row, batched by length; with a value function a second one.

        Args:
            dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows in the format of `train_dataset`.
            output_dir (`str` or `os.PathLike`, *optional*): where the rows are written as Parquet, a file for every
                chunk as soon as it is scored. A call that was interrupted goes on where it stopped. Needed for a
                stream.
            batch_size (`int`, *optional*): rows per forward pass, by default `per_device_eval_batch_size`.
            chunk_size (`int`): rows per chunk.

        Returns:
            `datasets.Dataset`: the columns of `dataset` and `score`, higher is better: the loss under the value
            function minus the loss, in nats per completion token, or without a value function the negative loss. Also
            `loss`, `value_loss` where there is a value function, and `selector_score` with `amortized_selector=True`.
            NaN for rows without completion tokens after truncation.

        Raises:
            `ValueError`: for a stream without `output_dir`, an empty dataset, columns that scoring adds itself, an
                `output_dir` with scores of another model, or in a run of several processes.
        """
        if self.args.world_size > 1:
            raise ValueError("Scoring runs on one process. Save the model and use `trl-bilevel score`.")
        scorer = RowScorer(
            self, self.value_function, self.amortized_selector, batch_size or self.args.per_device_eval_batch_size
        )
        return score_dataset(scorer, dataset, output_dir, chunk_size)

    @property
    def estimated_noise_rate(self) -> float | None:
        """
        Share of the training rows that are held to be bad, in [0, 1].

        `None` before training, and where weights are no probabilities: BMO, or softmax weights.
        """
        if (verdict := self._verdict()) is not None:
            return noise_rate_of(verdict)
        good_probability = self._good_probability()
        if good_probability is None or np.isnan(good_probability).all():
            return None
        return float(1 - np.nanmean(good_probability))

    def source_weights(self) -> dict[str | int, float]:
        """
        The weight of each source, the highest first; weights have mean 1 over rows.

        Raises:
            `ValueError`: without `source_column`.
        """
        if self._sources is None:
            raise ValueError("Rows have weights of their own. Set `source_column` for one weight per source.")
        weights = dict(zip(self._sources.names.to_pylist(), self.data_selector.source_weights().tolist(), strict=True))
        return dict(sorted(weights.items(), key=lambda item: -item[1]))
