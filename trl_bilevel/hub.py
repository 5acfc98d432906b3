"""Curated datasets on the Hub: published in one commit, and loaded again."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from datasets import Dataset, load_dataset
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .curation import SAMPLE_ID_COLUMN
from .dataset_card import FIGURE_PATH, build_card
from .refined_rows import RESPONSES_COLUMN


logger = logging.getLogger(__name__)

CONFIGS = ("curated", "scores", "refined")
_SCORE_COLUMNS = (SAMPLE_ID_COLUMN, "weight", "rank", "scored", "response_source")
_ROWS_PER_FILE = 500_000
_ATTEMPTS = 4
_FIRST_WAIT = 1.0  # seconds; doubles
_TRANSIENT = (408, 429, 500, 502, 503, 504)


class PublishError(RuntimeError):
    """The Hub did not take a dataset. It is on disk still; the message says what to do."""


def publish_curated_dataset(
    scored: Dataset,
    facts: dict[str, Any],
    repo_id: str,
    keep_ratio: float | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    sensitive: bool = False,
    retry_command: str | None = None,
) -> CommitInfo:
    """
    Publish a curated dataset with its scores, refined answers, and card, in one commit.

    A second push writes the same files anew: nothing is committed if nothing changed, and what was written by hand in
    the card stays.

    Args:
        scored (`datasets.Dataset`): all N rows, as `curate()` returns them without a `keep_ratio`.
        facts (`dict`): of the run, for the card, see [`~trl_bilevel.run_records.describe_run`].
        repo_id (`str`): of the dataset repository, created if it does not exist.
        keep_ratio (`float`, *optional*): share of the rows in the configuration `curated`, in (0, 1]; all if `None`.
        private (`bool`, *optional*): whether a new repository is private; the account's default if `None`.
        token (`str`, *optional*): to write with; the one logged in with if `None`.
        revision (`str`, *optional*): branch, created if it does not exist; `main` if `None`.
        commit_message (`str`, *optional*): of the commit.
        license (`str`, *optional*): of the dataset; that of the source, where it says, if `None`.
        sensitive (`bool`): show no rows in the card.
        retry_command (`str`, *optional*): publishes later what is on disk; part of the error.

    Returns:
        `huggingface_hub.CommitInfo`: the commit, or the last one if nothing changed.

    Raises:
        `ValueError`: for a ratio out of range or a repository name that cannot be.
        [`PublishError`]: if the Hub cannot be reached or refuses. The old revision is whole.
    """
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise ValueError(f"`keep_ratio` must be larger than 0 and at most 1, got {keep_ratio}.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id={repo_id!r}` cannot be a repository's name: {error}") from error
    num_kept = len(scored) if keep_ratio is None else max(1, round(keep_ratio * len(scored)))
    later = f" To publish it later: `{retry_command}`." if retry_command else ""
    api = HfApi(token=token)
    with _explained(repo_id, later):
        repo_id = _retried(
            lambda: api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        ).repo_id
        if revision is not None:
            _retried(lambda: api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True))
        info = _retried(lambda: api.dataset_info(repo_id, revision=revision))
        existing = {sibling.rfilename for sibling in info.siblings or []}
        old_card = _read_card(api, repo_id, info.sha) if "README.md" in existing else None
        with tempfile.TemporaryDirectory() as folder:
            files = write_configs(scored, num_kept, Path(folder))
            card = build_card(scored, num_kept, facts, repo_id, license, sensitive, old_card, Path(folder))
            (Path(folder) / "README.md").write_text(str(card), encoding="utf-8")
            operations: list[Any] = [
                CommitOperationAdd(name, str(Path(folder) / name)) for name in [*files, FIGURE_PATH, "README.md"]
            ]
            ours = tuple(f"{config}/" for config in CONFIGS)
            stale = sorted(name for name in existing if name.startswith(ours) and name not in files)
            operations += [CommitOperationDelete(name) for name in stale]
            message = commit_message or f"Curated dataset: {num_kept:,} of {len(scored):,} rows"
            return _retried(
                lambda: api.create_commit(
                    repo_id,
                    operations,
                    repo_type="dataset",
                    commit_message=message,
                    revision=revision,
                    parent_commit=info.sha,
                )
            )


def add_to_collection(
    title: str, repos: dict[str, str], namespace: str, token: str | None = None, private: bool | None = None
) -> str:
    """
    Put repositories into a collection, which is made if it does not exist.

    Args:
        title (`str`): of the collection.
        repos (`dict[str, str]`): `"dataset"` or `"model"` of each repository.
        namespace (`str`): whose collection it is.
        token (`str`, *optional*): to write with.
        private (`bool`, *optional*): whether a new collection is private.

    Returns:
        `str`: the collection's slug.

    Raises:
        [`PublishError`]: if the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    with _explained(f"The collection {title!r}", ""):
        collection = _retried(
            lambda: api.create_collection(title, namespace=namespace, private=bool(private), exists_ok=True)
        )
        for repo_id, kind in repos.items():
            _retried(
                lambda repo_id=repo_id, kind=kind: api.add_collection_item(
                    collection.slug, item_id=repo_id, item_type=kind, exists_ok=True
                )
            )
    return collection.slug


def write_configs(scored: Dataset, num_kept: int, folder: Path) -> list[str]:
    """
    Write the configurations as Parquet files, and return their names.

    `curated` has the `num_kept` best rows, their own columns first; `scores` every row's id, weight and rank, and
    whether it was kept; `refined` the rows with a regenerated answer, if there are any.
    """
    split = split_name(scored)
    curated = scored.filter(lambda ranks: [rank <= num_kept for rank in ranks], batched=True, input_columns="rank")
    if RESPONSES_COLUMN in curated.column_names:
        curated = curated.remove_columns(RESPONSES_COLUMN)
    scores = scored.select_columns(list(_SCORE_COLUMNS))
    scores = scores.add_column("kept", [rank <= num_kept for rank in scored["rank"]])
    tables = {"curated": curated, "scores": scores}
    if RESPONSES_COLUMN in scored.column_names:
        refined = scored.filter(
            lambda sources: [source == "refined" for source in sources], batched=True, input_columns="response_source"
        )
        if len(refined):
            tables["refined"] = refined
    names = []
    for config, table in tables.items():
        (folder / config).mkdir()
        num_files = -(-len(table) // _ROWS_PER_FILE)
        for number in range(num_files):
            name = f"{config}/{split}-{number:05d}-of-{num_files:05d}.parquet"
            table.shard(num_files, number, contiguous=True).to_parquet(folder / name)
            names.append(name)
    return names


def split_name(dataset: Dataset) -> str:
    """The split that a dataset is of; `train` if it does not say, or of a part of one."""
    name = str(dataset.split) if dataset.split else "train"
    return name if name.isidentifier() else "train"


def load_curated_dataset(
    repo_id: str,
    min_weight: float | None = None,
    keep_ratio: float | None = None,
    split: str = "train",
    **options: Any,
) -> Dataset:
    """
    Load a published curated dataset, cut anew by its scores.

    Args:
        repo_id (`str`): of the dataset repository.
        min_weight (`float`, *optional*): keep rows of at least this weight; weights have mean 1 over the source.
        keep_ratio (`float`, *optional*): share of the source's rows to keep, those of the best rank, in (0, 1].
        split (`str`): of the dataset.
        **options: of [`~datasets.load_dataset`], such as `revision` and `token`.

    Returns:
        `datasets.Dataset`: rows of the configuration `curated`; all of them without `min_weight` and `keep_ratio`.

    Raises:
        `ValueError`: for a ratio out of range, or larger than that of the published rows, or if no row is left.
    """
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise ValueError(f"`keep_ratio` must be larger than 0 and at most 1, got {keep_ratio}.")
    dataset = load_dataset(repo_id, "curated", split=split, **options)
    if keep_ratio is not None:
        num_rows = len(load_dataset(repo_id, "scores", split=split, **options))
        num_kept = max(1, round(keep_ratio * num_rows))
        if num_kept > len(dataset):
            raise ValueError(
                f"`keep_ratio={keep_ratio}` asks for {num_kept} of {num_rows} rows, but only the best {len(dataset)} "
                f"were published ({len(dataset) / num_rows:.3f} of them). Ask for fewer, or publish more."
            )
        dataset = dataset.filter(
            lambda ranks: [rank <= num_kept for rank in ranks], batched=True, input_columns="rank"
        )
    if min_weight is not None:
        dataset = dataset.filter(
            lambda weights: [weight >= min_weight for weight in weights], batched=True, input_columns="weight"
        )
    if len(dataset) == 0:
        raise ValueError(f"No row of {repo_id} has a weight of {min_weight} or more.")
    return dataset


def _read_card(api: HfApi, repo_id: str, revision: str) -> DatasetCard | None:
    try:
        path = _retried(lambda: api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision))
    except EntryNotFoundError:
        return None
    return DatasetCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)


def _retried(call: Any) -> Any:
    """Once more, after a while, for what may pass: a busy or broken server, a cut connection."""
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except (HfHubHTTPError, httpx2.TransportError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if attempt == _ATTEMPTS - 1 or (status is not None and status not in _TRANSIENT):
                raise
            wait = _FIRST_WAIT * 2**attempt
            logger.warning(f"The Hub did not answer ({error.__class__.__name__}, {status}); again in {wait:.0f} s.")
            time.sleep(wait)
    raise AssertionError("unreachable")


@contextmanager
def _explained(repo_id: str, later: str) -> Iterator[None]:
    """Errors that name the cure; no token or address of the request is in them."""
    namespace = repo_id.split("/")[0] if "/" in repo_id else "your account"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PublishError(
            f"{repo_id} was not published: offline mode is on. Unset `HF_HUB_OFFLINE`, and push again.{later}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "the token is missing or not valid. Log in with `hf auth login`, or pass `token=`",
            403: f"the token may not write to {namespace}. It needs the permission to write to the contents of "
            f"repositories of {namespace}, and you must be a member of it",
            404: f"{namespace} does not exist, or you cannot see the repository or revision. Check its name",
            409: "the name is taken by something else, or the repository changed meanwhile. Push again",
            412: "the repository changed meanwhile. Push again",
            429: "the Hub has had too many requests. Push again in a while",
        }
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) and status == 404:
            reason = reasons[404]
        else:
            reason = reasons.get(status, "the Hub has failed. Push again in a while")
        raise PublishError(f"{repo_id} was not published ({status}): {reason}.{later}") from error
    except (httpx2.TransportError, ConnectionError) as error:
        raise PublishError(
            f"{repo_id} was not published: the Hub cannot be reached ({error.__class__.__name__}). Push again.{later}"
        ) from error
    except OSError as error:
        raise PublishError(
            f"{repo_id} was not published: {os.strerror(error.errno) if error.errno else error}. Free some space "
            f"under {tempfile.gettempdir()}, or set `TMPDIR`.{later}"
        ) from error
