"""What a screen promises, against closed forms and simulations in float64."""

import numpy as np
import pytest
from scipy.stats import norm

from trl_bilevel.screening.calibration import (
    calibrate,
    conformal_p_values,
    good_probabilities,
    noise_rate,
    noise_rate_given_power,
    rows_to_drop,
    storey_estimate,
    trusted_rows_needed,
)


def _draw(seed, num_rows, num_trusted, bad_share, shift=2.5):
    """Scores of rows, of which the last are bad, and of trusted rows; and which rows are good."""
    generator = np.random.default_rng(seed)
    num_bad = round(bad_share * num_rows)
    scores = generator.normal(size=num_rows)
    scores[num_rows - num_bad :] += shift
    return scores, generator.normal(size=num_trusted), np.arange(num_rows) < num_rows - num_bad


def test_p_values_count_the_trusted_rows_that_are_at_least_as_bad():
    generator = np.random.default_rng(0)
    scores, calibration = generator.integers(6, size=40) / 2, generator.integers(6, size=15) / 2  # with ties
    expected = [(1 + sum(other >= score for other in calibration)) / 16 for score in scores]
    assert conformal_p_values(scores, calibration) == pytest.approx(expected, abs=0)


def test_p_values_of_good_rows_are_uniform():
    # P(p <= k / (n + 1)) = k / (n + 1) exactly, for scores without ties
    num_trusted, found = 19, []
    for seed in range(400):
        scores, calibration, _ = _draw(seed, 25, num_trusted, 0.0)
        found.append(conformal_p_values(scores, calibration))
    for k in (1, 4, 10):
        share = np.mean(np.concatenate(found) <= k / 20 + 1e-12)
        assert share == pytest.approx(k / 20, abs=0.02)


def test_the_noise_rate_is_that_of_the_rows_beyond_the_trusted_ones():
    # Bad rows far away have the smallest p-value: none is above lambda, and of the good rows 1 - lambda are
    scores, calibration, _ = _draw(1, 100_000, 20_000, 0.3, shift=50.0)
    assert noise_rate(scores, calibration).estimate == pytest.approx(0.3, abs=0.01)
    assert storey_estimate(np.array([0.1, 0.15, 0.3, 0.9])) == pytest.approx(2 / 4 / 0.8)
    assert storey_estimate(np.array([0.9, 0.8])) == 1.0


@pytest.mark.parametrize("num_trusted", [60, 200])
@pytest.mark.parametrize("bad_share", [0.0, 0.1, 0.25, 0.5, 0.7])
def test_noise_rate_promise_and_probabilities_over_draws(bad_share, num_trusted):
    errors, dropped_good, mean_good = [], [], []
    for seed in range(60):
        scores, calibration, good = _draw(seed, 400, num_trusted, bad_share)
        found = calibrate(scores, calibration)
        errors.append(found.noise_rate.estimate - bad_share)
        dropped_good.append(good[found.dropped].mean() if found.dropped.any() else 0.0)
        mean_good.append(found.good_probability.mean())
    assert np.abs(errors).mean() < 0.06
    assert np.mean(dropped_good) < 0.1
    assert np.mean(mean_good) == pytest.approx(1 - bad_share, abs=0.1)


@pytest.mark.parametrize("bad_share", [0.0, 0.1, 0.5])
def test_the_interval_of_the_noise_rate_holds_the_truth(bad_share):
    # Bad rows that overlap less with the good ones, whose tail would otherwise count as good
    rates = [noise_rate(*_draw(seed, 400, 80, bad_share, shift=4.0)[:2]) for seed in range(200)]
    covered = np.mean([rate.low <= bad_share <= rate.high for rate in rates])
    assert covered > 0.82  # 90 %, and for clean data at least that, as a rate is never below 0
    assert bad_share == 0 or covered < 0.99
    assert all(rate.low <= rate.estimate <= rate.high for rate in rates)


def test_clean_data_is_left_alone_and_said_to_be_uninformative():
    told, dropped = [], 0
    for seed in range(200):
        found = calibrate(*_draw(seed, 300, 100, 0.0)[:2])
        told.append(found.is_informative)
        dropped += found.dropped.sum()
    assert np.mean(told) < 0.1
    assert dropped < 0.001 * 200 * 300
    assert calibrate(*_draw(0, 300, 100, 0.5)[:2]).is_informative


def test_the_cut_is_benjamini_and_hochbergs():
    p_values = np.random.default_rng(3).uniform(size=50) ** 3
    order = np.sort(p_values)
    passing = np.flatnonzero(order <= 0.1 * np.arange(1, 51) / 50)  # the definition: the largest k that passes
    expected = p_values <= order[passing[-1]]
    assert rows_to_drop(p_values).tolist() == expected.tolist()
    assert 0 < expected.sum() < 50
    assert rows_to_drop(np.empty(0)).shape == (0,)


def test_probabilities_are_the_density_ratio_of_the_two_kinds():
    # Many rows: P(good | score) of two normal distributions is known, and no number is tuned to meet it
    bad_share, shift = 0.3, 2.0
    scores, calibration, _ = _draw(5, 200_000, 4_000, bad_share, shift)
    p_values = conformal_p_values(scores, calibration)
    found = good_probabilities(p_values, 4_000, 1 - bad_share)
    good, bad = (1 - bad_share) * norm.pdf(scores), bad_share * norm.pdf(scores - shift)
    assert np.abs(found - good / (good + bad)).mean() < 0.03
    order = np.argsort(p_values)
    assert (np.diff(found[order]) >= -1e-12).all()


@pytest.mark.parametrize("bad_share", [0.05, 0.1, 0.25, 0.3, 0.5])
def test_how_many_trusted_rows_a_promise_takes(bad_share):
    needed = trusted_rows_needed(bad_share)

    def drops(num_trusted):
        p_values = np.full(1000, 0.9)
        p_values[: round(1000 * bad_share)] = 1 / (num_trusted + 1)  # as small as it gets
        return rows_to_drop(p_values).sum()

    assert drops(needed) == round(1000 * bad_share)
    assert drops(needed - 1) == 0


def test_rows_without_a_score_are_neither_dropped_nor_counted():
    scores, calibration, _ = _draw(2, 200, 60, 0.4, shift=6.0)
    holed = np.insert(scores, [0, 100], np.nan)
    whole, found = calibrate(scores, calibration), calibrate(holed, np.append(calibration, np.nan))
    assert found.noise_rate == whole.noise_rate
    missing = np.isnan(holed)
    assert np.isnan(found.p_values[missing]).all()
    assert not found.dropped[missing].any()
    assert found.dropped[~missing].tolist() == whole.dropped.tolist()


def test_too_few_trusted_rows_for_a_noise_rate_say_nothing():
    assert noise_rate(np.arange(50.0), np.arange(3.0)) == (0.0, 0.0, 1.0)


def test_the_noise_rate_where_the_control_is_missed_now_and_then():
    """Rows of which 40 % are bad, and of those six in ten have a small p-value."""
    generator = np.random.default_rng(0)
    bad = generator.random(200_000) < 0.4
    is_seen = generator.random(200_000) < (0.6 - 0.2) / 0.8  # the others are small by chance, one time in five
    p_values = np.where(bad & is_seen, 0.01, generator.random(200_000))
    estimate = 1 - storey_estimate(p_values)
    assert estimate == pytest.approx(0.2, abs=0.01)
    assert noise_rate_given_power(estimate, power=0.6) == pytest.approx(0.4, abs=0.01)
    assert noise_rate_given_power(estimate, power=1.0) == pytest.approx(estimate)
    assert noise_rate_given_power(0.6, power=0.3) == 0.95  # never all of them
    assert noise_rate_given_power(0.0, power=0.1) == 0.0
