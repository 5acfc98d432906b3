"""Rows and options drawn at random: refused with a reason, or trained on without harm."""

import tempfile
import warnings

import numpy as np
import pytest
import torch
from conftest import QUIET_CPU_RUN, build_tiny_model, build_tokenizer, prompt_completion_rows
from datasets import Dataset
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.losses import closed_form_log_weights, filter_threshold, importance_ratios
from trl_bilevel.selector_updates import mirror_descent_step, selection_gradient


ROWS = 8
SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck)}
FEW = settings(max_examples=10, derandomize=True, **SLOW)
MANY = settings(max_examples=120, **SLOW)

# Whatever Arrow can store: no lone surrogates
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
SPECIAL = st.sampled_from(
    ["", "<eos>", "<|im_end|>", "\x00\x1b[31m", "\u202eevil", "{{ 7 * 7 }}", "a" * 500, "\U0001f469\u200d\U0001f467"]
)
ANY_TEXT = TEXT | SPECIAL
ROLES = st.sampled_from(["user", "assistant", "system"])
TOKENS = st.lists(st.integers(0, 299), max_size=20)
FORMATS = {
    "text": st.fixed_dictionaries({"text": ANY_TEXT}),
    "prompt-completion": st.fixed_dictionaries({"prompt": ANY_TEXT, "completion": ANY_TEXT}),
    "messages": st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": ROLES, "content": ANY_TEXT}), min_size=1, max_size=3)}
    ),
    "conversational prompt-completion": st.fixed_dictionaries(
        {
            "prompt": st.lists(st.fixed_dictionaries({"role": ROLES, "content": ANY_TEXT}), min_size=1, max_size=2),
            "completion": st.lists(
                st.fixed_dictionaries({"role": st.just("assistant"), "content": ANY_TEXT}), min_size=1, max_size=1
            ),
        }
    ),
    "tokens": TOKENS.map(lambda ids: {"input_ids": ids, "labels": ids}),
}
DATASETS = st.sampled_from(sorted(FORMATS)).flatmap(lambda name: st.lists(FORMATS[name], min_size=ROWS, max_size=ROWS))
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "selection_method": st.sampled_from(["bds", "bmo"]),
        "selector_activation": st.sampled_from(["softmax", "sigmoid"]),
        "selector_optimizer": st.sampled_from(["mirror_descent", "adam"]),
        "selector_learning_rate": st.sampled_from([0.0, 0.1, 100.0]),
        "selector_prior": st.sampled_from([0.01, 0.3, 0.9]),
        "value_function": st.sampled_from(["none", "adapter"]),
        "value_function_rows": st.sampled_from(["rejected", "all", "selected"]),
        "validation_weight": st.sampled_from([0.01, 0.5, 1.0]),
        "validation_weight_decay": st.sampled_from([0.0, 0.5]),
        "adaptive_validation_weight": st.sampled_from([None, False, True]),
        "per_device_validation_batch_size": st.integers(1, 3),
        "filter_ratio": st.sampled_from([0.0, 0.25, 0.9]),
        "bmo_temperature": st.sampled_from([0.01, 1.0, 50.0]),
        "loss_normalization": st.sampled_from(["token", "row"]),
        "amortized_selector": st.booleans(),
        "gradient_accumulation_steps": st.integers(1, 2),
        "packing": st.booleans(),
        "padding_free": st.booleans(),
        "max_length": st.sampled_from([None, 8, 64]),
        "refine_ratio": st.sampled_from([0.0, 0.5, 1.0]),
        "refine_mode": st.sampled_from(["lowest_weight", "random"]),
        "refine_start_step": st.sampled_from([0, 1, 0.5]),
        "refine_every_steps": st.integers(1, 2),
        "num_refined_responses": st.integers(1, 2),
        "refine_temperature": st.sampled_from([0.0, 1.0]),
        "importance_ratio_clip": st.sampled_from([1.0, 10.0]),
        "importance_sampling_level": st.sampled_from(["token", "sequence"]),
        "learning_rate": st.sampled_from([0.0, 1e-3, 1.0]),
    },
)


SHORT = {"per_device_train_batch_size": 2, "max_steps": 2, **QUIET_CPU_RUN}


@pytest.fixture(scope="module")
def parts():
    tokenizer = build_tokenizer()
    return tokenizer, lambda: build_tiny_model("llama", tokenizer)


def _train(parts, rows, validation, has_adapter=False, **options):
    """The trainer, trained; `None` if it refused with a reason before it started."""
    tokenizer, build = parts
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if has_adapter else None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # What users are told of their rows or options, by TRL or by us
        warnings.filterwarnings("ignore", category=UserWarning)
        try:
            config = BilevelSFTConfig(
                **{"output_dir": folder, "per_device_train_batch_size": 2, "max_steps": 2, **QUIET_CPU_RUN, **options}
            )
            trainer = BilevelSFTTrainer(
                build(),
                config,
                train_dataset=rows,
                validation_dataset=validation,
                processing_class=tokenizer,
                peft_config=adapter,
            )
        except (ValueError, TypeError) as refused:
            reason = str(refused)
        else:
            trainer.train()
            return trainer
    assert len(reason) > 20, "an error says what is wrong"
    return None


def _check(trainer, rows):
    weights = trainer.data_selector.weights()
    assert weights.shape == (len(rows),)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert weights.mean().item() == pytest.approx(1, abs=1e-4)
    assert all(value.isfinite().all() for value in trainer.model.parameters())
    curated = trainer.curate()
    assert sorted(curated["rank"]) == list(range(1, len(rows) + 1))
    original = [source == "original" for source in curated["response_source"]]
    for name in rows.column_names:
        assert [value for value, kept in zip(curated[name], original, strict=True) if kept] == [
            value for value, kept in zip(rows[name], original, strict=True) if kept
        ]  # fmt: skip


def _try_rows(parts, drawn):
    rows = Dataset.from_list(drawn)
    trainer = _train(parts, rows, rows.select(range(4)))
    event("refused" if trainer is None else "trained")
    if trainer is not None:
        _check(trainer, rows)


def _try_options(parts, options, has_adapter):
    rows = prompt_completion_rows(ROWS)
    trainer = _train(parts, rows, prompt_completion_rows(6, 100), has_adapter, **options)
    event("refused" if trainer is None else "trained")
    if trainer is not None:
        _check(trainer, rows)


@FEW
@given(drawn=DATASETS)
@example(drawn=[{"prompt": "", "completion": ""}] * ROWS)
@example(drawn=[{"text": "<eos>"}] * ROWS)
def test_rows(parts, drawn):
    _try_rows(parts, drawn)


@settings(FEW, max_examples=25)
@given(options=OPTIONS, has_adapter=st.booleans())
def test_options(parts, options, has_adapter):
    _try_options(parts, options, has_adapter)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(drawn=DATASETS)
def test_many_rows(parts, drawn):
    _try_rows(parts, drawn)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(options=OPTIONS, has_adapter=st.booleans())
def test_many_options(parts, options, has_adapter):
    _try_options(parts, options, has_adapter)


# ---- Formulas ----
FLOATS = st.floats(-20, 20)
VECTORS = st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=8).map(
    lambda pairs: torch.tensor(pairs, dtype=torch.float64).T
)
FORMULAS = settings(max_examples=100, derandomize=True, deadline=None)


@FORMULAS
@given(pair=VECTORS, rate=st.floats(0, 5), seed=st.integers(0, 100))
def test_mirror_descent_does_not_care_for_the_order(pair, rate, seed):
    logits, losses = pair
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(logits)))
    after = mirror_descent_step(logits, logits, losses, rate)
    torch.testing.assert_close(mirror_descent_step(logits[order], logits[order], losses[order], rate), after[order])
    # Exponentiated gradient on the simplex: shares times exp(-rate * loss), normalised again
    shares = logits.softmax(0) * (-rate * losses).exp()
    torch.testing.assert_close(after.softmax(0), shares / shares.sum(), atol=1e-9, rtol=1e-6)


@FORMULAS
@given(pair=VECTORS)
def test_selection_gradient_of_softmax_weights_sums_to_zero(pair):
    logits, losses = pair
    rows = torch.arange(len(logits))
    gradient = selection_gradient(logits.exp(), rows, losses, "softmax")
    assert gradient.sum().item() == pytest.approx(0, abs=1e-9)


@FORMULAS
@given(pair=VECTORS, temperature=st.floats(0.01, 100))
def test_closed_form_weights_have_mean_one_and_prefer_low_losses(pair, temperature):
    _, losses = pair
    weights = closed_form_log_weights(losses, temperature).exp()
    assert weights.mean().item() == pytest.approx(1)
    assert weights[losses.argmin()] == weights.max()


@FORMULAS
@given(values=st.lists(st.floats(0, 10), min_size=1, max_size=20), ratio=st.floats(0, 0.99))
def test_filter_leaves_out_its_share_at_most_and_never_all(values, ratio):
    weights = torch.tensor(values)
    filtered = int((weights < filter_threshold(weights, ratio)).sum())
    assert filtered <= ratio * len(values)
    assert filtered < len(values)


@FORMULAS
@given(pair=VECTORS, clip=st.floats(1, 10), level=st.sampled_from(["token", "sequence"]))
def test_importance_ratios_are_positive_and_clipped(pair, clip, level):
    now, before = -pair.abs()[:, None].float()
    ratios = importance_ratios(now, torch.ones_like(now, dtype=torch.bool), before, clip, level)
    assert (ratios.ratios > 0).all()
    assert (ratios.ratios <= clip * (1 + 1e-6)).all()
    assert torch.equal(
        importance_ratios(now, torch.ones_like(now, dtype=torch.bool), now, clip, level).ratios, torch.ones_like(now)
    )
