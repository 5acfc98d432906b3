"""Online self-refining generation inside the trainer: the formula, recovery, and what comes out."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import left_padding_collator, prompt_completion_rows
from datasets import Dataset, Features, Json, List, Value
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from trl_bilevel import IMPROVE_ANSWER_TEMPLATE, SelfRefiningCollator
from trl_bilevel.losses import closed_form_log_weights
from trl_bilevel.refined_responses import ResponseStore
from trl_bilevel.refinement import Candidates


# The tiny models are untrained: nearly every response runs into the length limit, and is used all the same
REFINE = {
    "refine_ratio": 0.5,
    "refine_start_step": 0,
    "refine_every_steps": 3,
    "num_refined_responses": 2,
    "refine_max_new_tokens": 6,
    "refine_discard_flawed": False,
}
SGD = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def _lora(dropout=0.2):
    return LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def _logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def _parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def _token_log_probs(model, prompt, completion):
    """From plain logits, one sequence at a time."""
    tokens = torch.tensor([[*prompt, *completion]])
    log_probs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


class _Snapshot(TrainerCallback):
    """Parameters and weights before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.parameters = {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalization", ["token", "row"])
def test_refined_rows_change_the_loss_as_the_formula_says(
    make_trainer, build_model, validation_dataset, level, normalization
):
    """
    A step on responses that another policy generated, against autograd on plain logits.

    Step 0 moves the policy away from the one that generated; step 1 trains on two responses for each of its rows.
    """
    clip = 1.2
    snapshot = _Snapshot(1)
    trainer = make_trainer(
        **{**REFINE, "refine_ratio": 1.0}, **SGD, max_steps=2, selector_learning_rate=2.0, validation_weight=0.4,
        importance_ratio_clip=clip, importance_sampling_level=level, loss_normalization=normalization,
        train_sampling_strategy="sequential", per_device_validation_batch_size=3, callbacks=[snapshot],
    )  # fmt: skip
    weights_before, logits_before = [], []
    weigh = trainer.data_selector.weights_of

    def record(rows):
        weights_before.append(weigh(rows))
        logits_before.append(trainer.data_selector.logits[rows].clone())
        return weights_before[-1]

    trainer.data_selector.weights_of = record
    trainer.train()

    rows = range(4, 8)
    responses = [trainer.response_store.responses_of(row, up_to_step=0) for row in rows]
    assert [len(of_row) for of_row in responses] == [2] * 4
    generator, policy = build_model(), build_model()
    policy.load_state_dict(snapshot.parameters)
    weights = weights_before[1]
    row_losses, row_tokens, row_nll, all_ratios, num_clipped = [], [], [], [], 0
    for of_row in responses:
        sums, counts, means, nll = [], [], [], []
        for response in of_row:
            now = _token_log_probs(policy, response.prompt_ids, response.completion_ids)
            with torch.no_grad():
                then = _token_log_probs(generator, response.prompt_ids, response.completion_ids)
            torch.testing.assert_close(torch.tensor(response.log_probs), then, rtol=1e-4, atol=1e-5)
            log_ratio = now.detach() - then
            if level == "sequence":
                log_ratio = log_ratio.mean().expand(len(log_ratio))
            ratio = log_ratio.exp().clamp(max=clip)
            all_ratios.append(ratio)
            num_clipped += int((log_ratio.exp() > clip).sum())
            sums.append(-(ratio * now).sum())
            means.append(-(ratio * now).mean())
            nll.append(-now.detach().mean())
            counts.append(len(now))
        row_losses.append(sum(sums) / 2 if normalization == "token" else sum(means) / 2)
        row_tokens.append(sum(counts) / 2)
        row_nll.append(sum(nll) / 2)
    if level == "token":
        assert 0 < num_clipped < 8 * 6, "the test needs ratios on both sides of the limit"
    weighted = sum(weight * loss for weight, loss in zip(weights, row_losses, strict=True))
    training = weighted / (sum(row_tokens) if normalization == "token" else 4)

    stream = trainer._get_paired_sampler(trainer.get_train_dataloader().dataset).validation_stream
    validation_sums, validation_tokens = [], []
    for index in stream.rows(3, 6):
        row = trainer.validation_dataset[index]
        start = row["labels"].count(-100)
        validation_sums.append(-_token_log_probs(policy, row["input_ids"][:start], row["input_ids"][start:]).sum())
        validation_tokens.append(len(row["input_ids"]) - start)
    if normalization == "token":
        validation = sum(validation_sums) / sum(validation_tokens)
    else:
        validation = sum(s / n for s, n in zip(validation_sums, validation_tokens, strict=True)) / 3
    loss = 0.4 * validation + 0.6 * training
    loss.backward()
    assert _logged(trainer, "loss")[1] == pytest.approx(loss.item(), abs=1e-5)
    expected = {name: (value - 0.5 * value.grad).detach() for name, value in policy.named_parameters()}
    torch.testing.assert_close(dict(trainer.model.named_parameters()), expected, rtol=1e-4, atol=1e-5)

    # The selector follows the likelihood of the responses itself, without the ratios
    means = torch.tensor(row_nll)
    baseline = (weights * means).sum() / weights.sum()
    torch.testing.assert_close(
        trainer.data_selector.logits[4:8], logits_before[1] - 2.0 * (means - baseline), rtol=1e-4, atol=1e-5
    )
    assert _logged(trainer, "refine/row_ratio") == [0.0, 1.0]
    ratios = torch.cat(all_ratios)
    for name, value in (
        ("importance_ratio", ratios.mean()),
        ("clip_ratio", torch.tensor(num_clipped / len(ratios))),
        ("effective_sample_ratio", ratios.sum() ** 2 / (len(ratios) * ratios.square().sum())),
    ):
        assert _logged(trainer, f"refine/{name}") == [pytest.approx(value.item(), rel=1e-4)], name


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_ratio_is_one_while_the_policy_stands_still(make_trainer, build_model, tokenizer, family, padding):
    """Invariant 4; with labels shifted twice, or log-probabilities of a sampler, it would not be."""
    trainer = make_trainer(
        model=build_model(family), learning_rate=0.0, max_steps=6, **REFINE, loss_normalization="row",
        data_collator=left_padding_collator(tokenizer.pad_token_id) if padding == "left" else None,
    )  # fmt: skip
    trainer.train()
    ratios = _logged(trainer, "refine/importance_ratio")
    assert len(ratios) == 5  # from the second step on
    assert ratios == pytest.approx([1.0] * 5, abs=1e-5)
    assert _logged(trainer, "refine/effective_sample_ratio") == pytest.approx([1.0] * 5, abs=1e-5)
    assert _logged(trainer, "refine/clip_ratio") == [0.0] * 5
    # The responses' plain likelihood is what was stored
    model = build_model(family).eval()
    for response in trainer.response_store.table().to_pylist()[:6]:
        with torch.no_grad():
            expected = _token_log_probs(model, response["prompt_ids"], response["completion_ids"])
        torch.testing.assert_close(torch.tensor(response["log_probs"]), expected, rtol=1e-4, atol=1e-4)


def test_ratio_is_one_on_a_4bit_model(make_trainer, build_model, tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(model=model, peft_config=lora, learning_rate=0.0, max_steps=6, **REFINE)
    trainer.train()
    ratios = _logged(trainer, "refine/importance_ratio")
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-3)
    assert len(ratios) == 5


def test_ratios_of_a_prompt_that_shows_the_answer_start_elsewhere(make_trainer, build_model, tokenizer):
    """The ratio is to the policy under the prompt that generated; the response is trained on the bare question."""
    trainer = make_trainer(
        learning_rate=0.0, max_steps=4, **{**REFINE, "refine_every_steps": 100},
        refine_prompt_template=IMPROVE_ANSWER_TEMPLATE,
    )  # fmt: skip
    trainer.train()
    responses = trainer.response_store.table().to_pylist()
    model = build_model().eval()
    for response in responses[:4]:
        row = trainer._source_dataset[response["row"]]
        assert tokenizer.decode(response["prompt_ids"]) == row["prompt"]
        asked = tokenizer(
            f"{row['prompt']}\n\nHere is an answer that may be wrong or poor:\n\n{row['completion']}\n\n"
            "Write a better answer to the same question. Give the answer only."
        )["input_ids"]
        with torch.no_grad():
            expected = _token_log_probs(model, asked, response["completion_ids"])
        torch.testing.assert_close(torch.tensor(response["log_probs"]), expected, rtol=1e-4, atol=1e-4)
    assert any(abs(ratio - 1) > 1e-4 for ratio in _logged(trainer, "refine/importance_ratio"))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_keeps_its_own_loss(make_trainer, build_model, tokenizer, train_dataset, padding, workers):
    """Invariant 5, refined rows among others: shuffled twice, truncated, one row dropped; checked by id."""
    rows = list(train_dataset)
    rows[5] = {"prompt": "a very long prompt " * 10, "completion": " lost"}
    max_length = 24
    trainer = make_trainer(
        **{**REFINE, "refine_every_steps": 100, "refine_max_new_tokens": 50}, max_length=max_length, learning_rate=0.0,
        train_dataset=Dataset.from_list(rows), shuffle_dataset=True, dataloader_num_workers=workers, max_steps=-1,
        num_train_epochs=3, data_collator=left_padding_collator(tokenizer.pad_token_id) if padding == "left" else None,
    )  # fmt: skip
    seen = {}
    trainer.data_selector.update = lambda indices, losses: seen.update(zip(indices.tolist(), losses.tolist()))
    trainer.train()
    answers = {}
    for response in trainer.response_store.table().to_pylist():
        assert len(response["prompt_ids"]) + len(response["completion_ids"]) <= max_length
        answers.setdefault(response["row"], []).append((response["prompt_ids"], response["completion_ids"]))
    assert len(answers) == 12
    assert set(seen) == set(range(24)) - {5}
    model = build_model().eval()
    for row, loss in seen.items():
        prompt = tokenizer(rows[row]["prompt"])["input_ids"]
        original = tokenizer(rows[row]["prompt"] + rows[row]["completion"] + "<eos>")["input_ids"][:max_length]
        expected = []
        for start, completion in answers.get(row, [(prompt, original[len(prompt) :])]):
            assert start == prompt
            with torch.no_grad():
                expected.append(-_token_log_probs(model, start, completion).mean().item())
        assert loss == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_every_refresh_replaces_the_responses(make_trainer):
    """The public code looks a row's response up once; later refreshes never reach it."""
    trainer = make_trainer(**{**REFINE, "refine_mode": "random", "refine_ratio": 1.0}, max_steps=12)
    batches = []
    compute_loss = trainer.compute_loss

    def record(model, inputs, *args, **kwargs):
        rows = inputs["step_rows"]
        batches.append([span.log_probs.tolist() for span in rows.refined_spans if span is not None])
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    trainer.train()
    table = trainer.response_store.table().to_pylist()
    assert sorted({response["step"] for response in table}) == [0, 3, 6, 9]
    for step, batch in enumerate(batches):
        newest = (step - 1) // 3 * 3  # a batch is collated a step ahead
        stored = [response["log_probs"] for response in table if response["step"] <= newest]
        of_newest = [response["log_probs"] for response in table if response["step"] == newest]
        assert all(log_probs in stored for log_probs in batch)
        assert step == 0 or any(log_probs in of_newest for log_probs in batch)
    assert batches[0] == []


@pytest.mark.parametrize("mode", ["lowest_weight", "random"])
def test_answers_that_proved_good_are_left_alone(make_trainer, mode):
    trainer = make_trainer(**{**REFINE, "refine_mode": mode, "refine_ratio": 1.0, "refine_start_step": 7}, max_steps=9)
    good = []
    choose = trainer.refiner.refresh

    def record(store, step, candidates):
        good.append(trainer.data_selector.proved_good)
        return choose(store, step, candidates)

    trainer.refiner.refresh = record
    trainer.train()
    asked = {response["row"] for response in trainer.response_store.table().to_pylist()}
    assert len(good) == 1
    assert 0 < good[0].sum() < 24
    assert asked == set((~good[0]).nonzero().flatten().tolist())


def test_lowest_weights_among_the_others_are_asked(make_trainer):
    options = {**REFINE, "refine_mode": "lowest_weight", "refine_ratio": 0.25, "refine_start_step": 7}
    trainer = make_trainer(**options, max_steps=9)
    refresh, found = trainer.refiner.refresh, []

    def record(store, step, candidates):
        found.append((trainer.data_selector.logits.clone(), trainer.data_selector.proved_good))
        return refresh(store, step, candidates)

    trainer.refiner.refresh = record
    trainer.train()
    ((logits, good),) = found
    others = (~good).nonzero().flatten()
    assert len(others) > 6
    asked = {response["row"] for response in trainer.response_store.table().to_pylist()}
    assert asked == set(others[logits[others].argsort()[:6]].tolist())


def test_bmo_weighs_new_answers_at_once(make_trainer):
    """No selector has to learn them: the step that first sees them weighs by their loss."""
    trainer = make_trainer(
        selection_method="bmo", **{**REFINE, "refine_ratio": 1.0, "refine_temperature": 0.0,
                                   "num_refined_responses": 1},
        learning_rate=0.0, max_steps=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    table = {response["row"]: response for response in trainer.response_store.table().to_pylist()}
    losses = torch.tensor([-sum(table[row]["log_probs"]) / len(table[row]["log_probs"]) for row in range(4, 8)])
    expected = closed_form_log_weights(losses, 1.0)
    torch.testing.assert_close(trainer.data_selector.logits[4:8], expected, rtol=1e-4, atol=1e-5)


def test_value_function_learns_original_answers_only(make_trainer):
    trainer = make_trainer(
        peft_config=_lora(), value_function="adapter", **{**REFINE, "refine_ratio": 0.5}, max_steps=8
    )
    fit, seen = trainer._fit_value_function, []

    def record(value_function, inputs):
        rows = inputs["step_rows"]
        seen.extend(zip(rows.is_refined.tolist(), (rows.value_coefficients > 0).tolist(), strict=True))
        return fit(value_function, inputs)

    trainer._fit_value_function = record
    trainer.train()
    assert set(seen) == {(True, False), (False, True)}


# ---- Guard rails ----
def _answering(trainer, answer):
    """Let every question be answered by the same tokens."""
    group_size = trainer.args.num_refined_responses
    trainer.refiner.generator.generate = lambda prompts, seed: [answer for _ in prompts for _ in range(group_size)]


def test_truncated_responses_are_counted_and_not_used(make_trainer):
    trainer = make_trainer(**{**REFINE, "refine_discard_flawed": True}, max_steps=5)
    _answering(trainer, trainer.processing_class(" and on and on")["input_ids"][:6])
    trainer.train()
    assert _logged(trainer, "refine/truncated_ratio") == [1.0, 1.0]
    assert _logged(trainer, "refine/used_ratio") == [0.0, 0.0]
    assert set(_logged(trainer, "refine/row_ratio")) == {0.0}
    curated = trainer.curate()
    assert set(curated["response_source"]) == {"original"}
    assert set(curated["original_completion"]) == {None}
    assert curated["completion"] == trainer._source_dataset["completion"]
    assert sum(len(responses) for responses in curated["refined_responses"]) == 2 * 12 * 2


def test_collapse_is_warned_of(make_trainer, caplog):
    trainer = make_trainer(**REFINE, max_steps=2)
    _answering(trainer, [*trainer.processing_class(" same")["input_ids"], trainer.processing_class.eos_token_id])
    trainer.train()
    assert "answers all 12 refined questions alike, by ' same'" in caplog.text


@pytest.mark.parametrize(("reward", "flaw"), [(-1.0, "rejected"), (1.0, "identical")])
def test_original_that_is_turned_down_speaks_for_nothing(make_trainer, reward, flaw):
    """Else a row would go back to it."""
    options = {**REFINE, "num_refined_responses": 1, "refine_discard_flawed": True}
    trainer = make_trainer(**options, reward_funcs=lambda completions, **kwargs: [reward] * len(completions))
    question = trainer.refiner.reader.read(0)
    tokens = [*trainer.processing_class(question.original)["input_ids"], trainer.processing_class.eos_token_id]
    assert trainer.refiner._judge([question], [tokens], [question.original], [[-0.1] * len(tokens)]) == [(False, flaw)]


def test_reward_functions_accept_and_reject(make_trainer):
    def even_rows(prompts, completions, **kwargs):
        assert all(isinstance(completion, str) for completion in completions)
        return [1.0 if int(prompt.split()[1]) % 2 == 0 else 0.0 for prompt in prompts]

    trainer = make_trainer(**REFINE, max_steps=3, reward_funcs=even_rows)
    trainer.train()
    assert len(trainer.response_store.table()) == 24
    for response in trainer.response_store.table().to_pylist():
        assert response["used"] == (response["row"] % 2 == 0)
        if not response["used"]:
            assert response["flaw"] in ("rejected", "truncated", "empty")


def test_reward_functions_are_tried_before_training(make_trainer):
    def of_another_dataset(completions, solution, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(TypeError, match="solution"):
        make_trainer(**REFINE, reward_funcs=of_another_dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine_start_step": 50}, "No answer will be regenerated"),
        ({"refine_start_step": 3, "max_steps": -1, "num_train_epochs": 1}, "Less than an epoch follows"),
    ],
)
def test_schedules_that_do_little_are_warned_of(make_trainer, caplog, options, message):
    trainer = make_trainer(**{**REFINE, **options})
    trainer.train()
    assert message in caplog.text


def test_checkpoint_with_refined_answers_needs_refinement(make_trainer):
    trainer = make_trainer(**REFINE, save_strategy="steps", save_steps=4)
    trainer.train()
    plain = make_trainer(output_dir=trainer.args.output_dir)
    with pytest.raises(ValueError, match="which `refine_ratio=0` would drop"):
        plain.train(resume_from_checkpoint=True)


def test_bad_setups_are_refused_before_training(make_trainer, train_dataset):
    with pytest.raises(ValueError, match="without `reward_funcs`"):
        make_trainer(**REFINE, refine_reward_threshold=0.5)
    with pytest.raises(ValueError, match="no effect without refinement"):
        make_trainer(reward_funcs=lambda **kwargs: [])
    with pytest.raises(ValueError, match="by itself"):
        make_trainer(data_collator=SelfRefiningCollator(lambda rows: {}))
    text = Dataset.from_list([{"text": f"{row['prompt']}{row['completion']}"} for row in train_dataset])
    with pytest.raises(ValueError, match="language-modeling rows"):
        make_trainer(**REFINE, train_dataset=text, validation_dataset=text.select(range(8)).map(_other))


def _other(row):
    return {"text": "trusted " + row["text"]}


def test_collator_that_shortens_responses_is_refused(make_trainer, tokenizer):
    whole = left_padding_collator(tokenizer.pad_token_id)

    def shortening(rows):
        return {name: value[:, :-1] for name, value in whole(rows).items()}

    trainer = make_trainer(**REFINE, max_steps=4, data_collator=shortening)
    with pytest.raises(ValueError, match="tokens of a refined response"):
        trainer.train()


# ---- Recovery ----
RECOVERY = {
    **REFINE,
    "refine_start_step": 2,
    "max_steps": -1,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


def _assert_same_run(first, second):
    assert torch.equal(first.data_selector.weights(), second.data_selector.weights())
    assert first.curate().to_dict() == second.curate().to_dict()
    torch.testing.assert_close(_parameters(first.model), _parameters(second.model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "stops"),
    [({}, (1, 2, 3, 5, 6, 9)), ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, (2, 5, 6)),
     ({"dataloader_num_workers": 2}, (2, 5)),
     pytest.param(
         {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1}, (2, 5),
         marks=pytest.mark.slow,
     ),
     ({"selection_method": "bmo", "gradient_accumulation_steps": 2}, (1, 2, 3, 4))],
    ids=["plain", "accumulation", "workers", "persistent workers", "bmo"],
)  # fmt: skip
def test_resumed_run_equals_the_unbroken_one(make_trainer, options, stops):
    """Invariant 6, before, at and after refreshes, with batches that were collated ahead."""

    # Persistent workers draw no new seed for the second epoch, which shifts the numbers that dropout gets, also in SFT
    dropout = 0.0 if options.get("dataloader_persistent_workers") else 0.2

    def make(**more):
        return make_trainer(peft_config=_lora(dropout), **{**RECOVERY, **options}, **more)

    unbroken = make()
    unbroken.train()
    assert any(source == "refined" for source in unbroken.curate()["response_source"])
    for stop_at in stops:
        resumed = make(output_dir=f"{unbroken.args.output_dir}-{stop_at}")
        resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-{stop_at}")
        _assert_same_run(resumed, unbroken)


class _Killed(Exception):
    pass


def test_run_killed_within_a_refresh_generates_only_what_is_missing(make_trainer):
    options = {**RECOVERY, "refine_batch_size": 4, "refine_ratio": 0.5}
    unbroken = make_trainer(**options)
    unbroken.train()

    broken = make_trainer(**options, output_dir=unbroken.args.output_dir + "-killed")
    generate = broken.refiner.generator.generate
    calls = []

    def killed_at_the_second_batch_of_the_second_refresh(prompts, seed):
        calls.append(len(prompts))
        if len(calls) == 5:  # 12 questions: 3 batches a refresh
            raise _Killed
        return generate(prompts, seed)

    broken.refiner.generator.generate = killed_at_the_second_batch_of_the_second_refresh
    with pytest.raises(_Killed):
        broken.train()

    resumed = make_trainer(**options, output_dir=broken.args.output_dir)
    generate_again = resumed.refiner.generator.generate
    again = []

    def count(prompts, seed):
        again.append(len(prompts))
        return generate_again(prompts, seed)

    resumed.refiner.generator.generate = count
    resumed.train(resume_from_checkpoint=True)
    _assert_same_run(resumed, unbroken)
    assert len(again) == 2 + 3  # the two missing batches, and the third refresh


def test_refresh_after_the_last_checkpoint_is_not_generated_again(make_trainer, monkeypatch):
    options = {**RECOVERY, "save_steps": 4}
    unbroken = make_trainer(**options)
    unbroken.train()

    broken = make_trainer(**options, output_dir=unbroken.args.output_dir + "-killed")
    step = broken.training_step

    def killed(*args, **kwargs):
        if broken.state.global_step == 7:  # after the refresh of step 5, before the checkpoint of step 8
            raise _Killed
        return step(*args, **kwargs)

    broken.training_step = killed
    with pytest.raises(_Killed):
        broken.train()

    resumed = make_trainer(**options, output_dir=broken.args.output_dir)
    steps = []
    answer = resumed.refiner._answer
    resumed.refiner._answer = lambda questions, step, *rest: steps.append(step) or answer(questions, step, *rest)
    resumed.train(resume_from_checkpoint=True)
    assert 5 not in steps
    assert 8 in steps
    _assert_same_run(resumed, unbroken)


def test_changed_settings_are_not_mixed_with_what_was_generated_before(make_trainer):
    options = {**RECOVERY, "save_steps": 4}
    first = make_trainer(**options)
    first.train()
    again = make_trainer(**{**options, "refine_temperature": 0.5}, output_dir=first.args.output_dir)
    again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-4")
    assert set(again.response_store.table().column("step").to_pylist()) == {2, 5, 8}
    for response in again.response_store.table().to_pylist():
        temperature = json.loads(response["settings"])["refine_temperature"]
        assert temperature == (1.0 if response["step"] < 4 else 0.5)


def test_a_run_that_goes_on_otherwise_takes_no_answers_of_the_first_attempt(make_trainer, tmp_path):
    """Each refresh after the checkpoint is made anew, by the model as it is then."""
    options = {**RECOVERY, "save_steps": 4, "max_steps": 12}
    first = make_trainer(**options)
    first.train()
    for change in (
        {"validation_weight": 0.4}, {"selector_learning_rate": 3.0}, {"filter_ratio": 0.5}, {"weight_decay": 0.3},
        {"importance_ratio_clip": 1.01}, {"importance_sampling_level": "sequence"},
        {"gradient_accumulation_steps": 2, "max_steps": 12}, {"validation_dataset": prompt_completion_rows(10, 2000)},
        {"reward_funcs": partial(lambda share, completions, **_: [share] * len(completions), 0.5)},
    ):  # fmt: skip
        folder = tmp_path / next(iter(change))
        shutil.copytree(first.args.output_dir, folder)
        again = make_trainer(**{**options, **change}, output_dir=str(folder))
        steps, answer = [], again.refiner._answer

        def record(questions, step, *rest, steps=steps, answer=answer):
            steps.append(step)
            return answer(questions, step, *rest)

        again.refiner._answer = record
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert sorted(set(steps)) == [5, 8], change


def test_a_refresh_of_other_rows_is_made_anew(make_trainer, tmp_path):
    """The same options, but the run came to the step another way: what is there of it is removed, and not used."""
    trainer = make_trainer(**REFINE, max_steps=12)
    store = ResponseStore(tmp_path / "responses")
    candidates = Candidates(torch.ones(24).bool().numpy(), scores=torch.arange(24.0).numpy())
    first = trainer.refiner.refresh(store, 6, candidates)
    store.write_part(6, 0, first.slice(0, 2))
    asked, answer = [], trainer.refiner._answer
    trainer.refiner._answer = lambda them, *rest: asked.extend(each.row for each in them) or answer(them, *rest)
    resumed = ResponseStore(tmp_path / "responses")
    assert trainer.refiner.refresh(resumed, 6, candidates).equals(first)
    assert asked == []
    other = ResponseStore(tmp_path / "responses")
    table = trainer.refiner.refresh(other, 6, candidates._replace(scores=-candidates.scores))
    assert sorted(asked) == list(range(12, 24)) == sorted(set(table.column("row").to_pylist()))
    assert other.table().equals(table)
    assert other.read_plan(6).rows == list(range(12, 24))


def test_checkpoint_holds_every_response_and_its_origin(make_trainer):
    trainer = make_trainer(**RECOVERY)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-12"
    store = ResponseStore.load(checkpoint, checkpoint / "elsewhere")
    assert store.table().equals(trainer.response_store.table())
    assert set(store.table().column("step").to_pylist()) == {2, 5, 8}  # one at 11 would reach no batch
    for response in store.table().to_pylist():
        assert len(response["log_probs"]) == len(response["completion_ids"])
        assert json.loads(response["settings"])["refine_max_new_tokens"] == 6
        assert response["weight"] > 0


def test_training_again_starts_from_the_original_answers(make_trainer):
    trainer = make_trainer(**REFINE, max_steps=4)
    trainer.train()
    first = trainer.response_store.folder
    trainer.train()
    assert trainer.response_store.folder != first
    assert first.is_dir()
    assert _logged(trainer, "refine/row_ratio")[0] == 0.0


# ---- What comes out ----
def _curated(make_trainer, tokenizer, rows, trusted, **options):
    trainer = make_trainer(
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        validation_dataset=Dataset.from_list(trusted), max_steps=4,
        **{**REFINE, "refine_ratio": 1.0, **options},
    )  # fmt: skip
    answer = tokenizer("fine", add_special_tokens=False)["input_ids"]
    _answering(trainer, [*answer, tokenizer.eos_token_id])
    trainer.train()
    return trainer.curate()


def _chat(number, answer):
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]


def test_curated_messages_have_a_new_last_answer(make_trainer, tokenizer):
    system = {"role": "system", "content": "Be kind."}
    rows = [{"messages": [system, *_chat(row, "yes"), *_chat(row, f"old {row}")]} for row in range(8)]
    curated = _curated(make_trainer, tokenizer, rows, [{"messages": _chat(row, "sure")} for row in range(8)])
    assert curated.column_names[0] == "messages"
    for row, (before, after) in enumerate(zip(rows, curated, strict=True)):
        assert after["response_source"] == "refined"
        assert after["messages"][:-1] == before["messages"][:-1]
        assert after["messages"][-1] == {"role": "assistant", "content": "fine"}
        assert after["original_completion"] == f"old {row}"


def test_curated_conversations_have_a_new_completion(make_trainer, tokenizer):
    chats = [_chat(row, f"old {row}") for row in range(8)]
    rows = [{"id": row, "prompt": chat[:1], "completion": chat[1:], "note": "kept"} for row, chat in enumerate(chats)]
    trusted = [{"prompt": chat[:1], "completion": chat[1:]} for chat in (_chat(row, "sure") for row in range(8))]
    curated = _curated(make_trainer, tokenizer, rows, trusted)
    assert curated.column_names[:4] == ["id", "prompt", "completion", "note"]
    assert curated[3]["completion"] == [{"role": "assistant", "content": "fine"}]
    assert curated[3]["original_completion"] == [{"role": "assistant", "content": "old 3"}]
    assert curated["note"] == ["kept"] * 8


def test_curated_tokens_have_a_new_answer(make_trainer, tokenizer):
    rows = [{"input_ids": [40 + row, 50, 60, 1], "labels": [-100, -100, 60, 1]} for row in range(8)]
    trusted = [{"input_ids": [70 + row, 50, 61, 1], "labels": [-100, -100, 61, 1]} for row in range(8)]
    curated = _curated(make_trainer, tokenizer, rows, trusted)
    answer = [*tokenizer("fine")["input_ids"], tokenizer.eos_token_id]
    assert curated[2]["input_ids"] == [42, 50, *answer]
    assert curated[2]["labels"] == [-100, -100, *answer]
    assert curated[2]["original_completion"] == [60, 1]


def test_curated_tokens_keep_the_targets_of_earlier_turns(make_trainer, tokenizer):
    rows = [{"input_ids": [40 + row, 50, 51, 60, 1], "labels": [-100, 50, -100, 60, 1]} for row in range(8)]
    trusted = [{"input_ids": [70 + row, 50, 61, 1], "labels": [-100, -100, 61, 1]} for row in range(8)]
    curated = _curated(make_trainer, tokenizer, rows, trusted)
    answer = [*tokenizer("fine")["input_ids"], tokenizer.eos_token_id]
    assert curated[2]["labels"] == [-100, 50, -100, *answer]
    assert curated[2]["original_completion"] == [60, 1]


def test_curated_messages_of_mixed_types(make_trainer, tokenizer):
    """Tool calls as JSON, which Arrow has no type for; a row that ends with one keeps it."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "old", "tool_calls": None}]
    rows = [{"messages": [plain[0], call] if row == 3 else [{**plain[0], "content": f"Hi {row}"}, plain[1]]}
            for row in range(8)]  # fmt: skip
    message = {"role": Value("string"), "content": Value("string"), "tool_calls": List(Json())}
    dataset = Dataset.from_list(rows, features=Features({"messages": List(message)}))
    trusted = [{"messages": _chat(row, "sure")} for row in range(8)]
    curated = _curated(make_trainer, tokenizer, dataset, trusted)
    assert curated.features["messages"] == dataset.features["messages"]
    assert curated[3]["messages"] == dataset[3]["messages"]
    assert curated[3]["response_source"] == "original"
    assert curated[4]["messages"][-1]["content"] == "fine"
    assert curated[4]["original_completion"] == "old"


def test_curated_text_trains_plain_trl_and_survives_parquet(make_trainer, tokenizer, tmp_path):
    rows = list(prompt_completion_rows(8))
    curated = _curated(make_trainer, tokenizer, rows, list(prompt_completion_rows(8, 1000)))
    assert curated["completion"] == ["fine"] * 8
    assert curated["original_completion"] == [row["completion"] for row in rows]
    curated.to_parquet(tmp_path / "curated.parquet")
    again = Dataset.from_parquet(str(tmp_path / "curated.parquet"), cache_dir=str(tmp_path / "cache"))
    assert again.to_dict() == curated.to_dict()
    responses = again[0]["refined_responses"]
    assert len(responses) == 2
    assert math.isfinite(responses[0]["log_prob"])
    assert responses[0]["log_prob"] < 0
    assert responses[0]["text"] == "fine"


def test_two_answers_are_settled_by_vote(make_trainer, tokenizer):
    trainer = make_trainer(**{**REFINE, "refine_ratio": 1.0, "num_refined_responses": 3}, max_steps=2)
    answers = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ("lone", "fine", "fine")]
    trainer.refiner.generator.generate = lambda prompts, seed: [answer for _ in prompts for answer in answers]
    trainer.train()
    assert set(trainer.curate()["completion"]) == {"fine"}
