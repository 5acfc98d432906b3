"""The head sees labelled positions only, and nothing else changes."""

import pytest
import torch
from accelerate.utils import is_peft_model
from conftest import build_tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from trl.trainer.utils import add_fused_lm_head

from trl_bilevel.batch_layout import PaddedLayout
from trl_bilevel.labelled_positions import full_forward, fused_forward, leaves_out_unlabelled, score_labels
from trl_bilevel.losses import lower_level_losses


@pytest.fixture
def cpu(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")


def _model(family, tokenizer):
    model = build_tiny_model(family, tokenizer)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def _batch():
    """Three rows: one padded on the right, one with two answers, one without any label."""
    ids = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4], labels[0, 7:] = -100, -100
    labels[1, :2], labels[1, 4:6] = -100, -100
    labels[2] = -100
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _sizes_of_head(model, run):
    """How many hidden states the head was given."""
    seen = []
    backbone = (model.get_base_model() if is_peft_model(model) else model).base_model
    handle = backbone.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state.shape[:2]))
    try:
        return run(), seen
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_outputs_and_gradients_are_trls(family, has_adapter, tokenizer, cpu):
    found = {}
    for name in ("trl", "ours"):
        model = _model(family, tokenizer)
        if has_adapter:
            torch.manual_seed(0)
            model = get_peft_model(
                model,
                LoraConfig(
                    init_lora_weights=False,
                    fan_in_fan_out=family == "gpt2",
                    target_modules=["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"],
                    task_type="CAUSAL_LM",
                ),
            )
        model.eval()
        options = {"output_router_logits": True} if family == "qwen3_moe" else {}
        batch = _batch()
        if name == "trl":
            outputs = model(**batch, **options, use_cache=False, fused_lm_head=True)
        else:
            outputs = fused_forward(model, model, batch, cpu, **options)
        loss = -outputs.log_probs.sum() + (outputs.aux_loss if options else 0)
        loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found[name] = outputs, gradients
    (expected, expected_gradients), (ours, gradients) = found["trl"], found["ours"]
    assert ours.label_mask.equal(expected.label_mask)
    assert ours.is_top1.equal(expected.is_top1)
    for field in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(ours, field), getattr(expected, field), atol=1e-5, rtol=0)
    if family == "qwen3_moe":
        assert ours.aux_loss.item() == pytest.approx(expected.aux_loss.item(), abs=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_smoothed_labels_are_those_of_transformers(family, is_compiled, tokenizer, cpu, monkeypatch):
    """The same log-probabilities as the fused head's, and the loss and gradients of `LabelSmoother`."""
    model, batch = _model(family, tokenizer).eval(), _batch()
    monkeypatch.setattr(cpu, "torch_compile", is_compiled)  # which takes all positions
    options = {"output_router_logits": True} if family == "qwen3_moe" else {}
    outputs, uniform_nll = full_forward(model, model, batch, cpu, **options)
    expected = model(**batch, **options, use_cache=False, fused_lm_head=True)
    assert outputs.label_mask.equal(expected.label_mask)
    assert outputs.is_top1.equal(expected.is_top1)
    for field in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(outputs, field), getattr(expected, field), atol=1e-5, rtol=0)
    assert (outputs.aux_loss is not None) == bool(options)
    sums = lower_level_losses(outputs.log_probs, outputs.label_mask, "nll", 0.2, uniform_nll)
    sums.sum().backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    reference = LabelSmoother(0.2)({"logits": logits}, batch["labels"], shift_labels=True, num_items_in_batch=1)
    reference.backward()
    torch.testing.assert_close(sums.sum(), reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5)


def test_unlabelled_positions_never_reach_the_head(tokenizer, cpu):
    model, batch = _model("llama", tokenizer), _batch()
    num_labelled = int((batch["labels"][:, 1:] != -100).sum())
    # The hook of `fused_forward` runs first, and leaves what the head is given
    head_inputs = []
    from trl.trainer import utils

    original = utils._ChunkedLogProbFunction.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            utils._ChunkedLogProbFunction,
            "apply",
            lambda hidden, *rest: head_inputs.append(len(hidden)) or original(hidden, *rest),
        )
        fused_forward(model, model, batch, cpu)
    assert head_inputs == [num_labelled]
    # Nothing of it stays behind
    _, seen = _sizes_of_head(model, lambda: model(**batch, fused_lm_head=True))
    assert seen == [(3, 9)]


def test_a_batch_without_labels_stays_connected(tokenizer, cpu):
    model, batch = _model("llama", tokenizer), _batch()
    batch["labels"][:] = -100
    outputs = fused_forward(model, model, batch, cpu)
    outputs.log_probs.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_where_positions_move_or_shapes_must_stay_trls_forward_is_used(tokenizer, cpu, tmp_path):
    model = _model("llama", tokenizer)
    assert leaves_out_unlabelled(model, cpu)
    compiled = TrainingArguments(str(tmp_path), use_cpu=True, torch_compile=True, report_to="none")
    assert not leaves_out_unlabelled(model, compiled)
    prompted = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert not leaves_out_unlabelled(prompted, cpu)


def test_selected_rows_lose_the_columns_that_others_needed():
    inputs = {"input_ids": torch.arange(15).view(3, 5), "attention_mask": torch.ones(3, 5)}
    rows = torch.tensor([True, False, True])
    selected, layout = PaddedLayout(torch.tensor([3, 5, 2])).select(inputs, rows)
    assert selected["input_ids"].tolist() == [[0, 1, 2], [10, 11, 12]]
    assert selected["attention_mask"].shape == (2, 3)
    assert layout.widths.tolist() == [3, 2]
    whole, layout = PaddedLayout().select(inputs, rows)
    assert whole["input_ids"].shape == (2, 5)
    assert layout.widths is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_labels_are_scored_as_a_plain_forward_pass_scores_them(tokenizer, cpu, family):
    model, batch = _model(family, tokenizer).eval(), _batch()
    found = score_labels(model, batch, cpu)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = logits[:, :-1].double().log_softmax(-1)
    mask = batch["labels"][:, 1:] != -100
    assert torch.equal(found.label_mask, mask)
    wanted = log_p.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * mask
    torch.testing.assert_close(found.log_probs.double(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy.double(), -(log_p.exp() * log_p).sum(-1) * mask, atol=1e-5, rtol=0)
    assert not found.log_probs.requires_grad


def test_without_labels_there_is_nothing_to_score(tokenizer, cpu):
    batch = _batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = score_labels(_model("llama", tokenizer), batch, cpu)
    assert not found.log_probs.any()
    assert not found.label_mask.any()
