"""Answers that are swapped on purpose: what is swapped, and who sees it."""

import numpy as np
import pytest
from datasets import Dataset

from trl_bilevel.ranking_warning import ranking_warning
from trl_bilevel.screening.answer_statistics import STATISTICS, AnswerStatistics
from trl_bilevel.screening.positive_control import run_control, swap_answers
from trl_bilevel.screening.verdict import conclude, read_verdict, save_verdict, summarize


def _statistics(loss, generator, num_rows):
    values = {name: generator.normal(size=num_rows) for name in STATISTICS}
    values |= {"loss": loss, "begin_loss": loss, "num_tokens": np.exp(values["num_tokens"])}
    return AnswerStatistics(**values, answer_hash=generator.integers(1 << 60, size=num_rows))


def test_every_prompt_gets_another_answer_of_about_its_length():
    rows = [{"input_ids": [1, 2, *[10 + i] * (i + 1)], "labels": [-100, -100, *[10 + i] * (i + 1)]} for i in range(6)]
    swapped = swap_answers(Dataset.from_list(rows))
    assert [row["input_ids"] for row in swapped] == [
        *([1, 2, *[11 + i] * (i + 2)] for i in range(5)),
        [1, 2, 10],  # the ring closes: the longest is followed by the shortest
    ]
    assert all(row["labels"][:2] == [-100, -100] and row["labels"][2:] == row["input_ids"][2:] for row in swapped)


def test_of_a_conversation_the_last_answer_is_swapped_and_of_text_the_second_half():
    chat = {"input_ids": [1, 5, 6, 1, 7, 8, 0], "labels": [-100, 5, 6, -100, 7, 8, -100]}
    other = {"input_ids": [1, 9, 1, 4], "labels": [-100, 9, -100, 4]}
    swapped = swap_answers(Dataset.from_list([chat, other]))
    assert swapped["input_ids"] == [[1, 5, 6, 1, 4], [1, 9, 1, 7, 8]]
    text = Dataset.from_list([{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7, 8, 9]}])
    assert swap_answers(text)["input_ids"] == [[1, 2, 7, 8, 9], [5, 6, 3, 4]]


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 0.35, 0.65), (4.0, 0.9, 1.0)])
def test_a_model_that_sees_nothing_is_at_chance(shift, low, high):
    found = []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        trusted = _statistics(generator.normal(size=80), generator, 80)
        swapped = _statistics(generator.normal(size=80) + shift, generator, 80)
        found.append(run_control(swapped, trusted).auroc)
    assert low < np.mean(found) < high


@pytest.fixture
def verdict():
    """A hundred rows of which thirty have losses that trusted rows never have; row 5 has no answer."""
    generator = np.random.default_rng(0)
    loss = generator.normal(size=100) + 6 * (np.arange(100) < 30)
    loss[5] = np.nan
    trusted = _statistics(generator.normal(size=90), generator, 90)
    swapped = _statistics(generator.normal(size=90) + 4, generator, 90)
    return conclude([_statistics(loss, generator, 100)], [trusted], [swapped])


def test_a_verdict_says_what_it_drops_and_promises(verdict, tmp_path):
    assert verdict.model_sees
    assert np.isnan(verdict.score[5])
    assert verdict.reasons[5] == "no answer left after truncation"
    assert not verdict.dropped[5]
    assert verdict.left_out.sum() == verdict.dropped.sum() + 1 == verdict.facts["num_left_out"]
    assert verdict.dropped[:30].sum() >= 25
    assert verdict.dropped[30:].sum() <= 0.25 * verdict.dropped.sum()
    said = summarize(verdict.facts)
    assert f"drops {verdict.dropped.sum()} rows" in said[-1]
    assert "if good rows are like the trusted ones" in said[-1]
    assert ranking_warning({"screening": verdict.facts}, 0.5) is None
    save_verdict(tmp_path, verdict, "rows", "trusted")
    assert read_verdict(tmp_path, "other rows") is None
    assert read_verdict(tmp_path, "rows", "other trusted rows") is None
    again = read_verdict(tmp_path, "rows", "trusted")
    for before, after in zip(verdict, again, strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_evidence_of_two_models_is_joined(verdict):
    """The second sees what the first is blind to."""
    generator = np.random.default_rng(1)
    seen = [generator.normal(size=100) + 6 * mask for mask in (np.arange(100) < 20, np.arange(100) >= 80)]
    of_rows = [_statistics(loss, generator, 100) for loss in seen]
    trusted = [_statistics(generator.normal(size=200), generator, 200) for _ in range(2)]
    swapped = [_statistics(generator.normal(size=200) + shift, generator, 200) for shift in (0, 4)]
    alone, both = conclude(of_rows[:1], trusted[:1], swapped[:1]), conclude(of_rows, trusted, swapped)
    assert alone.dropped[80:].sum() <= 3
    assert both.dropped[:20].sum() >= 15
    assert both.dropped[80:].sum() >= 15
    assert not alone.model_sees
    assert both.model_sees


def test_weights_as_good_as_equal_are_said_to_be_noise():
    assert "cannot be told from noise" in ranking_warning({}, 0.9992)
    assert ranking_warning({}, 0.8) is None
