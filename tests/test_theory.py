"""The paper's theorems, as `benchmarks/theory.py` shows them at length."""

import importlib.util
import math
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("theory")  # the same courses serve all tests


@pytest.fixture(scope="module")
def theory():
    spec = importlib.util.spec_from_file_location("theory", ROOT / "benchmarks" / "theory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def courses(theory):
    args = theory.TheoryArguments(num_steps=2000)
    names = ("BDS, loss", "BDS, loss, fast weights", "BMO", "direct mixing")
    return {name: theory.solve(theory.METHODS[name], args, seed=0, step_size=3.0) for name in names}


@pytest.mark.parametrize(("method", "useless_weight"), [("BDS, loss", 1e-3), ("BMO", 1e-2)])
def test_global_optimum_in_finite_time_with_full_coverage(theory, courses, method, useless_weight):
    course = courses[method]
    assert theory.steps_to(course, 0.01) < 2000
    assert course.useless_weight[-1] < useless_weight
    assert course.coverage == 1.0


def test_direct_mixing_stays_away_from_the_optimum(theory, courses):
    course = courses["direct mixing"]
    # lambda = 1/2. Of 12 known questions each has a part of the validation loss, a useful row and three useless ones
    # of 60 rows, so the answer's probability goes to right / (right + 3 * wrong)
    right, wrong = 0.5 / 12 + 0.5 / 60, 0.5 / 60
    assert course.validation_losses[-1].item() == pytest.approx(math.log((right + 3 * wrong) / right), abs=0.01)
    assert theory.steps_to(course, 0.3) is None
    assert course.coverage <= 0.5  # none of the questions with useless rows
    assert course.useless_weight[-1].item() == pytest.approx(36 / 60)


def test_weights_that_run_ahead_of_the_model_keep_what_validation_knows_only(courses):
    fast, slow = courses["BDS, loss, fast weights"], courses["BDS, loss"]
    assert fast.coverage < slow.coverage
    assert fast.useful_weight_range[0] < 0.01 < 0.4 < slow.useful_weight_range[0]


def test_table(theory, capsys, tmp_path):
    figure = tmp_path / "theory.png"
    theory.main(theory.TheoryArguments(num_steps=20, seeds=[0], step_sizes=[1.0], figure=str(figure)))
    printed = capsys.readouterr().out
    rows = re.findall(r"^[│|] *(\S.*?) *[│|] *1", printed, flags=re.MULTILINE)
    assert rows == list(theory.METHODS)
    assert figure.read_bytes().startswith(b"\x89PNG")
