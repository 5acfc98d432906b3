"""Curated datasets on the Hub: published in one commit, and loaded again."""

import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
from datasets import Dataset, load_dataset
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .curation import SAMPLE_ID_COLUMN, SCORE_COLUMNS
from .dataset_card import CONFIGS, FIGURE_PATH, build_card, split_name
from .parquet_files import column, write_parquet
from .refined_rows import RESPONSES_COLUMN


logger = logging.getLogger(__name__)

_ROWS_PER_FILE = 500_000
_ATTEMPTS = 4
_FIRST_WAIT = 1.0  # seconds; doubles
_TRANSIENT = (408, 429, 500, 502, 503, 504)


class PublishError(RuntimeError):
    """The Hub did not take a dataset or a model. It is on disk still; the message says what to do."""


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
    language: str | list[str] | None = None,
    sensitive: bool = False,
    retry_command: str | None = None,
    ask_license: Callable[[], str | None] | None = None,
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
        license (`str`, *optional*): of the dataset, as the Hub abbreviates it; that of the source if `None`.
        language (`str` or `list[str]`, *optional*): of the rows, ISO 639 codes; that of the source if `None`.
        sensitive (`bool`): show no rows in the card.
        retry_command (`str`, *optional*): publishes later what is on disk; part of the error.
        ask_license (`Callable`, *optional*): called if no license is known; without it that is a warning.

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
    api = HfApi(token=token)
    with explained(repo_id, retry_command):
        repo_id = _retried(
            lambda: api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        ).repo_id
        if revision is not None:
            _retried(lambda: api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True))
        ask_once = cache(ask_license) if ask_license is not None else None
        for attempt in range(_ATTEMPTS):
            info = _retried(lambda: api.dataset_info(repo_id, revision=revision))
            existing = {sibling.rfilename for sibling in info.siblings or []}
            old_card = _read_card(api, repo_id, info.sha) if "README.md" in existing else None
            terms = _resolve_terms(api, repo_id, facts, license, language, old_card, ask_once)
            with tempfile.TemporaryDirectory() as folder:
                card = build_card(scored, num_kept, facts, repo_id, *terms, sensitive, old_card, Path(folder))
                operations = _commit_operations(scored, num_kept, card, existing, Path(folder))
                message = commit_message or f"Curated dataset: {num_kept:,} of {len(scored):,} rows"
                try:
                    return _retried(
                        partial(
                            api.create_commit,
                            repo_id,
                            operations,
                            repo_type="dataset",
                            commit_message=message,
                            revision=revision,
                            parent_commit=info.sha,
                        )
                    )
                except HfHubHTTPError as error:
                    # Somebody else's commit, or ours whose answer was lost: what is there now is read again
                    if error.response.status_code != 412 or attempt == _ATTEMPTS - 1:
                        raise
    raise AssertionError("unreachable")


def _commit_operations(
    scored: Dataset, num_kept: int, card: DatasetCard, existing: set[str], folder: Path
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Write the files of a commit to a folder that holds the card's figure; files of ours that are no more leave."""
    files = write_configs(scored, num_kept, folder)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    ours = tuple(f"{config}/{split_name(scored)}-" for config in CONFIGS)
    stale = sorted(name for name in existing if name.startswith(ours) and name not in files)
    return [
        *(CommitOperationAdd(name, str(folder / name)) for name in [*files, FIGURE_PATH, "README.md"]),
        *(CommitOperationDelete(name) for name in stale),
    ]


def _resolve_terms(
    api: HfApi,
    repo_id: str,
    facts: dict[str, Any],
    license: str | None,
    language: str | list[str] | None,
    old_card: DatasetCard | None,
    ask_license: Callable[[], str | None] | None,
) -> tuple[str | None, list[str] | None]:
    """License and languages: as said now, else as in the card that is there, else as in the sources' cards."""
    languages = [language] if isinstance(language, str) else language
    if old_card is not None:
        for name, value in (("license", license), ("language", languages)):
            if value is not None:
                old_card.data[name] = value
    source = _describe_sources(api, facts["training"])
    license = license or source["license"]
    if license is None and (old_card is None or old_card.data.get("license") is None):
        license = ask_license() if ask_license is not None else None
        if not license:
            logger.warning(
                f"{repo_id} is published without a license, so nobody else may use it. Pass `license=`, or write it "
                "into the card."
            )
    return license, languages or source["language"]


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
    with explained(f"The collection {title!r}"):
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
    kept = column(scored, "rank") <= num_kept
    curated = scored.select(np.flatnonzero(kept))
    if RESPONSES_COLUMN in curated.column_names:
        curated = curated.remove_columns(RESPONSES_COLUMN)
    scores = scored.select_columns([SAMPLE_ID_COLUMN, *SCORE_COLUMNS]).add_column("kept", pa.array(kept))
    tables = {"curated": curated, "scores": scores}
    if RESPONSES_COLUMN in scored.column_names:
        is_refined = column(scored, "response_source") == "refined"
        if is_refined.any():
            tables["refined"] = scored.select(np.flatnonzero(is_refined))
    names = []
    for config, table in tables.items():
        num_files = -(-len(table) // _ROWS_PER_FILE)
        for number in range(num_files):
            name = f"{config}/{split}-{number:05d}-of-{num_files:05d}.parquet"
            write_parquet(table.shard(num_files, number, contiguous=True), folder / name)
            names.append(name)
    return names


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


def _describe_sources(api: HfApi, training: dict[str, Any]) -> dict[str, Any]:
    """License, if all sources have the same, and languages, from the cards of the repositories rows come from."""
    licenses: set[str | None] = {None} if training["has_other_rows"] else set()
    languages: list[str] = []
    for source in training["sources"]:
        try:
            card = _read_card(api, source["id"], source["revision"])
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:  # gone, not to be seen, or broken
            logger.warning(f"The card of {source['id']} cannot be read ({error.__class__.__name__}).")
            card = None
        found = card.data.to_dict() if card is not None else {}
        licenses.add(_as_text(found.get("license")))
        languages += _as_list(found.get("language"))
    (shared,) = licenses if len(licenses) == 1 else {None}
    own = training["license"] if len(training["sources"]) <= 1 else None
    return {"license": own or shared, "language": [*dict.fromkeys(languages)] or None}


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _as_text(value: Any) -> str | None:
    values = _as_list(value)
    return values[0] if len(values) == 1 else None


def _read_card(api: HfApi, repo_id: str, revision: str) -> DatasetCard | None:
    """
    The card of a revision, `None` if it has none.

    Raises:
        `ValueError`: for a card whose metadata cannot be read.
    """
    try:
        path = _retried(lambda: api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision))
    except RemoteEntryNotFoundError:
        return None
    try:
        return DatasetCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (YAMLError, ValueError) as error:
        raise ValueError(
            f"The metadata of the card of {repo_id} cannot be read ({error.__class__.__name__}). Mend the YAML at its "
            "top, then push again."
        ) from error


def _retried(call: Any) -> Any:
    """Once more, after a while, for what may pass: a busy or broken server, a cut connection."""
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if attempt == _ATTEMPTS - 1 or (status is not None and status not in _TRANSIENT):
                raise
            wait = _FIRST_WAIT * 2**attempt
            logger.warning(f"The Hub did not answer ({error.__class__.__name__}, {status}); again in {wait:.0f} s.")
            time.sleep(wait)
    raise AssertionError("unreachable")


@contextmanager
def explained(repo_id: str, retry_command: str | None = None) -> Iterator[None]:
    """
    Turns errors of the Hub's client into a [`PublishError`] that names the cure.

    No token and no address of a request is in its message.

    Args:
        repo_id (`str`): what is published.
        retry_command (`str`, *optional*): publishes later what is on disk.
    """
    later = f" To publish it later: `{retry_command}`." if retry_command else ""
    namespace = repo_id.split("/")[0] if "/" in repo_id else "your account"
    try:
        yield
    except (HfHubHTTPError, httpx2.TransportError, OSError, RuntimeError) as error:
        # An upload's own error is the cause of the client's
        reason = _reason(error.__cause__ or error if isinstance(error, RuntimeError) else error, namespace)
        if reason is None:
            raise
        raise PublishError(f"{repo_id} was not published{reason}.{later}") from error
    except ValueError as error:
        if not isinstance(error.__cause__, HfHubHTTPError):
            raise
        # The client's error where the Hub does not accept a card
        problems = "; ".join(line.removeprefix("- ") for line in str(error).splitlines()[1:])
        raise PublishError(
            f"{repo_id} was not published: its card is refused ({problems}). Pass another value, or mend the card on "
            f"the Hub.{later}"
        ) from error


def _reason(error: BaseException, namespace: str) -> str | None:
    """What is wrong and what cures it, for what can go wrong between here and the Hub."""
    if isinstance(error, OfflineModeIsEnabled):
        return ": offline mode is on. Unset `HF_HUB_OFFLINE`, and push again"
    if isinstance(error, HfHubHTTPError):
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
        return f" ({status}): {reasons.get(status, 'the Hub has failed. Push again in a while')}"
    if isinstance(error, (httpx2.TransportError, ConnectionError, LocalEntryNotFoundError)):
        return f": the Hub cannot be reached ({error.__class__.__name__}). Push again"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" under {Path(error.filename).parent}" if error.filename else f" under {tempfile.gettempdir()}"
        return f": {os.strerror(error.errno)}. Free some space{where}, or set `TMPDIR`"
    return None
