"""The card of a trained model or adapter."""

from collections.abc import Collection
from importlib import resources
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment

from .dataset_card import option_cell
from .dataset_sources import source_text


_RESULTS = {
    "eval_loss": "loss on the evaluation rows, nats per token",
    "validation_loss": "loss on the trusted rows, {unit}",
    "training_loss": "loss on the training rows, nats per token",
    "selector/effective_sample_ratio": "effective share of the training rows",
}


def build_model_card(
    facts: dict[str, Any],
    log_history: list[dict[str, float]],
    model_name: str,
    repo_id: str,
    is_adapter: bool,
    datasets: list[str],
    tags: Collection[str],
    citation: str,
) -> ModelCard:
    """
    The card, with the metadata by which the Hub and PEFT know a model.

    Args:
        facts (`dict`): of the run, see [`~trl_bilevel.run_records.describe_run`].
        log_history (`list[dict]`): of the trainer; the last value of each result is shown.
        model_name (`str`): title.
        repo_id (`str`): model repository.
        is_adapter (`bool`): whether the repository holds a PEFT adapter.
        datasets (`list[str]`): repositories of the rows it was trained on.
        tags (`Collection[str]`): of the repository.
        citation (`str`): of the method, BibTeX.
    """
    data = ModelCardData(
        base_model=facts["base_model"],
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=datasets or None,
        tags=sorted(tags),
    )
    results = {
        label.format(unit=validation_loss_unit(facts)): next(
            entry[name] for entry in reversed(log_history) if name in entry
        )
        for name, label in _RESULTS.items()
        if any(name in entry for entry in log_history)
    }
    template = resources.files("trl_bilevel").joinpath("cards/model_card.md.jinja").read_text(encoding="utf-8")
    text = (
        Environment(keep_trailing_newline=True, trim_blocks=True)
        .from_string(template)
        .render(
            model_name=model_name,
            base_model=facts["base_model"],
            repo_id=repo_id,
            is_adapter=is_adapter,
            training=f"{source_text(facts['training'])}: {facts['training']['num_rows']} rows",
            validation=f"{source_text(facts['validation'])}: {facts['validation']['num_rows']} rows",
            method=facts["method"],
            options={name: option_cell(value) for name, value in facts["options"].items()},
            results=results,
            versions=", ".join(f"{name} {number}" for name, number in facts["packages"].items()),
            citation=citation,
        )
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def validation_loss_unit(facts: dict[str, Any]) -> str:
    """
    What the losses of the trusted rows of a run are in.

    Example:

    ```python
    >>> validation_loss_unit({"options": {"validation_loss_type": "dpo"}}), validation_loss_unit({"options": {}})
    ('nats per pair', 'nats per token')

    ```
    """
    return "nats per pair" if facts["options"].get("validation_loss_type") == "dpo" else "nats per token"
