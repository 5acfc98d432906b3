"""What training adds to a screen, against simulation and by hand."""

import numpy as np
import pytest

from trl_bilevel.screening.calibration import noise_rate_given_power
from trl_bilevel.screening.training_evidence import (
    after_training,
    careful_prior,
    good_share,
    loss_probabilities,
    noise_rate_of,
    with_prior,
)
from trl_bilevel.screening.verdict import Verdict


def make_verdict(num_rows, power=0.6, estimate=0.1, high=0.2):
    facts = {
        "noise_rate": {"estimate": estimate, "low": 0.0, "high": high},
        "control_power": power,
        "control_auroc": 0.9,
        "num_dropped": 0,
        "num_left_out": 0,
        "is_informative": False,
    }
    score = np.linspace(1, 2, num_rows)
    return Verdict(score, score / 2, np.full(num_rows, 0.9), np.zeros(num_rows, bool), [""] * num_rows, facts)


@pytest.mark.parametrize("true_share", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("prior", [0.2, 0.6])
def test_the_share_is_found_whatever_it_started_from(true_share, prior):
    """Log-likelihood ratios of two normal distributions, which are the evidence they claim to be."""
    generator = np.random.default_rng(0)
    good = generator.random(50_000) < true_share
    ratios = 2 * (generator.normal(size=50_000) + np.where(good, 1.0, -1.0))  # log N(x; 1, 1) / N(x; -1, 1) = 2 x
    probabilities = 1 / (1 + np.exp(-(ratios + np.log(prior / (1 - prior)))))
    share = good_share(probabilities, prior)
    assert share == pytest.approx(true_share, abs=0.01)
    corrected = with_prior(probabilities, prior, share)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):  # calibrated
        part = (corrected >= low) & (corrected < low + 0.2)
        assert good[part].mean() == pytest.approx(corrected[part].mean(), abs=0.05)


def test_shares_at_the_ends_are_no_trap():
    assert good_share(np.ones(10), 0.2) == pytest.approx(1.0, abs=1e-5)
    assert good_share(np.zeros(10), 0.2) == pytest.approx(0.0, abs=1e-5)
    assert good_share(np.full(10, 0.2), 0.2) == 0.2  # no evidence
    assert good_share(np.array([0.1, 0.1, 0.3]), 0.2) == pytest.approx(
        _by_em(np.array([0.1, 0.1, 0.3]), 0.2), abs=1e-4
    )


def _by_em(probabilities, prior):
    share = prior
    for _ in range(20_000):
        share = with_prior(probabilities, prior, share).mean()
    return share


def test_the_probability_of_a_loss_keeps_the_mean_and_the_order():
    generator = np.random.default_rng(1)
    losses, probabilities = generator.random(200), generator.random(200)
    found = loss_probabilities(losses, probabilities)
    assert (np.diff(found[np.argsort(losses)]) <= 1e-12).all()
    assert found.mean() == pytest.approx(probabilities.mean())
    losses[:3], probabilities[3] = np.nan, np.nan
    found = loss_probabilities(losses, probabilities)
    assert found[:3].tolist() == probabilities[:3].tolist()
    assert np.isnan(found[3])
    assert not np.isnan(found[4:]).any()


def test_the_prior_is_careful():
    # Half as visible as the control: 0.2 + (0.6 - 0.2) / 2 = 0.4 of bad rows have a small p-value
    prior = careful_prior(make_verdict(5), smallest_share=0.2)
    assert prior.good_share == pytest.approx(1 - noise_rate_given_power(0.2, 0.4))
    assert prior.good_share == pytest.approx(1 - 0.2 * 0.8 / 0.2)
    assert prior.good_probability.tolist() == [prior.good_share] * 5  # all rows alike
    assert careful_prior(make_verdict(5, high=0.6), smallest_share=0.2).good_share == 0.2
    # A screen that suffices also says which
    sufficient = make_verdict(5, power=0.9)
    prior = careful_prior(sufficient, smallest_share=0.2)
    assert prior.good_share == 0.9
    assert prior.good_probability is sufficient.good_probability
    without_answer = make_verdict(5)
    without_answer.score[2] = np.nan
    assert np.isnan(careful_prior(without_answer, 0.2).good_probability).tolist() == [False, False, True, False, False]


def test_rows_that_training_holds_to_be_bad_are_dropped():
    verdict = make_verdict(6)
    verdict.score[5] = np.nan
    learned = np.array([0.99, 0.98, 0.97, 0.01, 0.02, 0.5])
    losses = np.array([0.1, 0.2, 0.3, 2.0, 3.0, np.nan])
    found = after_training(verdict, learned, losses, prior=0.5)
    share = good_share(learned[:5], 0.5)
    expected = with_prior(learned[:5], 0.5, share)
    expected[3:] = expected[3:].mean()  # the loss says otherwise than the weights: one step
    assert found.good_probability[:5] == pytest.approx(expected)
    assert found.dropped.tolist() == [False, False, False, True, True, False]
    assert found.left_out.tolist() == [False, False, False, True, True, True]
    assert found.score[:5].tolist() == losses[:5].tolist()
    assert found.is_learned
    assert not verdict.is_learned
    assert noise_rate_of(verdict) == 0.1
    assert noise_rate_of(found) == pytest.approx(1 - expected.mean())
    assert found.facts["num_dropped"] == 2
    assert found.facts["num_left_out"] == 3
    unseen = after_training(verdict, learned, np.full(6, np.nan), prior=0.5)
    assert unseen.good_probability[:5] == pytest.approx(with_prior(learned[:5], 0.5, share))
    assert unseen.score[:5].tolist() == verdict.score[:5].tolist()
