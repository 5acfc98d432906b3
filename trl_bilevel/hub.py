"""Curated datasets on the Hub: published in one commit, and loaded again."""

import logging
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_dataset
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .curation import SAMPLE_ID_COLUMN, SCORE_COLUMNS, check_keep_ratio, count_kept
from .dataset_card import CONFIGS, FIGURE_PATH, build_card, split_name
from .hub_errors import ATTEMPTS, explained, retried
from .parquet_files import column, write_parquet
from .refined_rows import RESPONSES_COLUMN
from .run_records import num_dropped
from .selector_files import selector_table_name, write_selector_table


logger = logging.getLogger(__name__)

_ROWS_PER_FILE = 500_000


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` for what cannot be a repository's name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id={repo_id!r}` cannot be a repository's name: {error}") from error


def publish_curated_dataset(
    scored: Dataset,
    facts: dict[str, Any],
    repo_id: str,
    keep_ratio: float | str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    sensitive: bool = False,
    retry_command: str | None = None,
    ask_license: Callable[[], str | None] | None = None,
    selector: pa.Table | None = None,
) -> CommitInfo:
    """
    Publish a curated dataset with its scores, refined answers, and card, in one commit.

    A second push writes the same files anew: nothing is committed if nothing changed, and what was written by hand in
    the card stays.

    Args:
        scored (`datasets.Dataset`): all N rows, as `curate()` returns them without a `keep_ratio`.
        facts (`dict`): of the run, for the card, see [`~trl_bilevel.run_records.describe_run`].
        repo_id (`str`): of the dataset repository, created if it does not exist.
        keep_ratio (`float` or `"auto"`, *optional*): share of the rows in the configuration `curated`, in (0, 1];
            `"auto"` leaves out those that a screen says can be dropped; all if `None`.
        private (`bool`, *optional*): whether a new repository is private; the account's default if `None`.
        token (`str`, *optional*): to write with; the one logged in with if `None`.
        revision (`str`, *optional*): branch, created if it does not exist, or a pull request, `refs/pr/N`; `main` if
            `None`.
        commit_message (`str`, *optional*): of the commit.
        license (`str`, *optional*): of the dataset, as the Hub abbreviates it; that of the source if `None`.
        language (`str` or `list[str]`, *optional*): of the rows, ISO 639 codes; that of the source if `None`.
        sensitive (`bool`): show no rows in the card.
        retry_command (`str`, *optional*): publishes later what is on disk; part of the error.
        ask_license (`Callable`, *optional*): called if no license is known; without it that is a warning.
        selector (`pyarrow.Table`, *optional*): the weights for other runs, see
            [`~trl_bilevel.selector_files.selector_table`], which [`DataSelector.from_pretrained`] reads.

    Returns:
        `huggingface_hub.CommitInfo`: the commit, or the last one if nothing changed.

    Raises:
        `ValueError`: for a ratio out of range or a repository name that cannot be.
        [`~trl_bilevel.hub_errors.PublishError`]: if the Hub cannot be reached or refuses. The old revision is whole.
    """
    num_kept = count_kept(len(scored), keep_ratio, num_dropped(facts))
    check_repo_id(repo_id)
    api = HfApi(token=token)
    with explained(repo_id, retry_command):
        repo_id = retried(
            lambda: api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        ).repo_id
        if revision is not None and not revision.startswith("refs/"):  # as a pull request, which is there already
            retried(lambda: api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True))
        ask_once = cache(ask_license) if ask_license is not None else None
        for attempt in range(ATTEMPTS):
            info = retried(lambda: api.dataset_info(repo_id, revision=revision))
            existing = {sibling.rfilename for sibling in info.siblings or []}
            old_card = _read_card(api, repo_id, info.sha) if "README.md" in existing else None
            terms = _resolve_terms(api, repo_id, facts, license, language, old_card, ask_once)
            with tempfile.TemporaryDirectory() as folder:
                card = build_card(scored, num_kept, facts, repo_id, *terms, sensitive, old_card, Path(folder))
                operations = _commit_operations(scored, num_kept, selector, card, existing, Path(folder))
                message = commit_message or f"Curated dataset: {num_kept:,} of {len(scored):,} rows"
                try:
                    return retried(
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
                    if error.response.status_code != 412 or attempt == ATTEMPTS - 1:
                        raise
    raise AssertionError("unreachable")


def _commit_operations(
    scored: Dataset, num_kept: int, selector: pa.Table | None, card: DatasetCard, existing: set[str], folder: Path
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Write the files of a commit to a folder that holds the card's figure; files of ours that are no more leave."""
    files = write_configs(scored, num_kept, folder)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    selector_name = selector_table_name(split_name(scored))
    if selector is not None:
        write_selector_table(folder, selector, selector_name)
        files.append(selector_name)
    ours = (*(f"{config}/{split_name(scored)}-" for config in CONFIGS), selector_name)
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
        [`~trl_bilevel.hub_errors.PublishError`]: if the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    with explained(f"The collection {title!r}"):
        collection = retried(
            lambda: api.create_collection(title, namespace=namespace, private=bool(private), exists_ok=True)
        )
        for repo_id, kind in repos.items():
            retried(
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
    check_keep_ratio(keep_ratio)
    dataset = load_dataset(repo_id, "curated", split=split, **options)
    if keep_ratio is not None:
        num_rows = len(load_dataset(repo_id, "scores", split=split, **options))
        num_kept = count_kept(num_rows, keep_ratio)
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
    has_others = training["has_other_rows"] or training.get("has_unnamed_source")
    licenses: set[str | None] = {None} if has_others else set()
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
        path = retried(lambda: api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision))
    except RemoteEntryNotFoundError:
        return None
    try:
        return DatasetCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (YAMLError, ValueError) as error:
        raise ValueError(
            f"The metadata of the card of {repo_id} cannot be read ({error.__class__.__name__}). Mend the YAML at its "
            "top, then push again."
        ) from error
