"""What a run publishes: its curated dataset, its model or adapter, and their cards."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo

from .bilevel_sft_config import BilevelSFTConfig
from .checkpoint_files import is_checkpoint
from .checkpointing import Checkpointing
from .citation import PAPER_CITATION, PAPER_ID, PAPER_TITLE
from .dataset_sources import is_hub_id, source_ids
from .hub import add_to_collection, check_repo_id, publish_curated_dataset
from .hub_errors import explained
from .model_card import build_model_card
from .parquet_files import as_rows
from .run_records import push_command, upload_command
from .run_settings import remove_base_model, write_base_model
from .selector_files import selector_table


logger = get_logger(__name__)


class HubPublishing(Checkpointing):
    """Pushes of [`~trl_bilevel.BilevelSFTTrainer`]. Whatever the Hub answers, the results are on disk."""

    _tag_names = ["trl", "sft", "bilevel-sft"]
    _name = "Bilevel SFT"
    _paper = {"title": PAPER_TITLE, "id": PAPER_ID, "citation": PAPER_CITATION}

    args: BilevelSFTConfig
    _is_streamed: bool
    _run_facts: dict[str, Any]
    _curated_repo_id: str | None  # once it was pushed
    _is_pushing = False

    def curate(self, keep_ratio: float | str | None = None) -> Dataset | IterableDataset:
        raise NotImplementedError

    def push_curated_dataset(
        self,
        repo_id: str,
        keep_ratio: float | str | None = "auto",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
        sensitive: bool = False,
        collection: str | None = None,
    ) -> CommitInfo | None:
        """
        Publish the curated dataset, with every row's score and a card, in one commit.

        `load_dataset(repo_id)` then gives the rows kept, their own columns first. See
        [`~trl_bilevel.hub.publish_curated_dataset`] for the configurations and the errors. All processes may
        call it; the main one pushes. The rows of a stream are read once more, into a temporary folder.

        Args:
            repo_id (`str`): dataset repository, created if it does not exist.
            keep_ratio (`float` or `"auto"`, *optional*, defaults to `"auto"`): which rows are kept, see
                [`BilevelSFTTrainer.curate`]; `None` keeps all.
            private (`bool`, *optional*): whether a new repository is private.
            token (`str`, *optional*): to write with; `hub_token`, or the one logged in with, if `None`.
            revision (`str`, *optional*): branch, created if it does not exist; or a pull request, `refs/pr/N`.
            commit_message (`str`, *optional*): of the commit.
            license (`str`, *optional*): of the dataset, where its source does not say.
            language (`str` or `list[str]`, *optional*): of the rows, ISO 639 codes, where their source does not say.
            sensitive (`bool`): show no rows in the card.
            collection (`str`, *optional*): title of a collection for the dataset and, where it was pushed, the model.

        Returns:
            `huggingface_hub.CommitInfo`: the commit; `None` on other processes than the main one.

        Raises:
            `ValueError`: if no row has a score yet, or `keep_ratio` is out of range.
            [`~trl_bilevel.hub_errors.PublishError`]: if the Hub cannot be reached or refuses.
        """
        if not self.is_world_process_zero():
            return None
        check_repo_id(repo_id)
        token = token or self.args.hub_token
        options: dict[str, Any] = {
            "keep_ratio": keep_ratio,
            "private": private,
            "revision": revision,
            "commit_message": commit_message,
            "license": license,
            "language": language,
            "sensitive": sensitive,
        }
        command = push_command(self.args.output_dir, repo_id, **options)
        is_stream, has_trained = self._is_streamed, self.state.global_step > 0
        if not (is_stream or has_trained or self.data_selector.scored.any()):
            raise ValueError(
                "No row of this trainer has a score, so there is nothing to publish. Train first. A run that is on "
                f"disk is published by `{command}`."
            )
        if has_trained:  # the records of a run whose selector was read from there are left as they are
            self._save_records(self.args.output_dir)  # whatever fails from here on, the command can do it again
        can_retry = has_trained and self.args.save_training_rows and not is_stream
        with as_rows(self.curate()) as scored:
            commit = publish_curated_dataset(
                scored,
                self._run_facts,
                repo_id,
                token=token,
                retry_command=command if can_retry else None,
                selector=selector_table(self.data_selector),
                **options,
            )
        self._curated_repo_id = commit.repo_url.repo_id
        if collection is not None:
            repos = {self._curated_repo_id: "dataset"}
            if self.hub_model_id is not None:
                repos[self.hub_model_id] = "model"
            add_to_collection(collection, repos, self._curated_repo_id.split("/")[0], token, private)
        return commit

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer: before training starts, or at the first push; says what is missing if it cannot be."""
        with explained(self._repo_id):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """
        As in Trainer: the model or adapter, its processing class and its card.

        Raises:
            [`~trl_bilevel.hub_errors.PublishError`]: if the Hub cannot be reached or refuses. The model is on disk.
        """
        if not self.args.push_to_hub:  # it has been said before training
            self._warn_about_published_reports()
        self._is_pushing = True
        try:
            with explained(self._repo_id, self._upload_command()):
                return super().push_to_hub(*args, **kwargs)
        finally:
            self._is_pushing = False

    @property
    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name

    def _upload_command(self) -> str:
        return upload_command(self.args.output_dir, self._repo_id, self.args.hub_private_repo, self.args.hub_revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self.args.published():
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        jobs = self.push_in_progress.jobs if getattr(self, "push_in_progress", None) is not None else []
        for error in filter(None, (job.exception() for job in jobs)):
            logger.warning(
                f"An upload of a checkpoint failed ({error.__class__.__name__}); the files are on disk. To publish "
                f"them later: `{self._upload_command()}`."
            )

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        folder = output_dir or self.args.output_dir
        remove_base_model(folder)  # of another run in the same folder
        with self.args.published(), self._published_base(folder):
            super()._save(output_dir, *args, **kwargs)

    @contextmanager
    def _published_base(self, folder: str) -> Iterator[None]:
        """Have PEFT name a base model on disk by its folder only where the adapter's folder is pushed."""
        if not ((self.args.push_to_hub or self._is_pushing) and is_peft_model(self.model)):
            yield
            return
        base = self.model.get_base_model()
        with ExitStack() as put_back:
            # What is written into the adapter's configuration, and two that are written into PEFT's card
            for owner, name in (
                (self.model.active_peft_config, "base_model_name_or_path"),
                (base.config, "_name_or_path"),
                (base, "name_or_path"),
            ):
                path = getattr(owner, name, None)
                if path is not None and os.path.isabs(path):
                    if owner is self.model.active_peft_config:  # for `trl-bilevel score`
                        write_base_model(self.args.output_dir if is_checkpoint(folder) else folder, path)
                    setattr(owner, name, Path(path).name)
                    put_back.callback(setattr, owner, name, path)
            yield

    def _warn_about_published_paths(self) -> None:
        """Files that Trainer and its reporters write, and push, and that name the folder they are in."""
        args = self.args
        checkpoints = args.hub_strategy in ("checkpoint", "all_checkpoints") and args.metric_for_best_model is not None
        if args.push_to_hub and os.path.isabs(args.output_dir) and checkpoints:
            logger.warning(
                f"`output_dir={args.output_dir!r}` will be read in the trainer state of the checkpoints that are "
                "pushed. Pass a relative path to publish nothing about this machine."
            )
        if args.push_to_hub:
            self._warn_about_published_reports()

    def _warn_about_published_reports(self) -> None:
        """TensorBoard's folder has the host's name, and all options are in its files."""
        if "tensorboard" in self.args.report_to and "TENSORBOARD_LOGGING_DIR" not in os.environ:
            logger.warning(
                "TensorBoard's files in `runs` are pushed with the model: the name of this machine and all options, "
                "`output_dir` and addresses among them, can be read there. Set the environment variable "
                "`TENSORBOARD_LOGGING_DIR` to a folder outside of `output_dir` to keep them here."
            )

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """As TRL's, with the metadata by which PEFT and the Hub know an adapter, the datasets, and the results."""
        if not self.is_world_process_zero():
            return
        own_tags = [tags] if isinstance(tags, str) else tags or []
        names = [dataset_name, self._curated_repo_id, *source_ids(self._run_facts["training"])]
        datasets = [name for name in dict.fromkeys(names) if name and is_hub_id(name)]
        folder = Path(self.args.output_dir)
        build_model_card(
            self._run_facts,
            self.state.log_history,
            model_name=model_name or (self.hub_model_id or folder.name).split("/")[-1],
            repo_id=self.hub_model_id or folder.name,
            is_adapter=is_peft_model(self.model),
            datasets=datasets,
            tags={*own_tags, *self._tag_names},
            citation=PAPER_CITATION,
        ).save(folder / "README.md")
