"""The script that runs TRL's own tests with the class swapped, on a checkout of three tests."""

import importlib.util
import json
from pathlib import Path

import pytest
import trl


CHECKOUT = """
import pytest

from trl import SFTConfig, SFTTrainer


class TestSFTTrainer:
    def test_required(self):
        with pytest.raises(ValueError, match="`train_dataset` is required"):
            SFTTrainer(model="nowhere", args=SFTConfig("out", bf16=False, use_cpu=True))

    def test_of_trl_alone(self):
        assert SFTTrainer.__module__.startswith("trl.")

    def test_of_neither(self):
        raise OSError("no network")
"""


@pytest.fixture
def script():
    path = Path(__file__).parents[1] / "benchmarks" / "trl_tests.py"
    spec = importlib.util.spec_from_file_location("trl_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "trl"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "__init__.py").touch()
    (folder / "tests" / "test_sft_trainer.py").write_text(CHECKOUT)
    (folder / "VERSION").write_text(f"{trl.__version__}\n")
    return folder


def test_names_what_passes_with_sft_only(script, checkout, tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.json"
    monkeypatch.setattr("sys.argv", ["trl_tests.py", "--trl_dir", str(checkout), "--report_path", str(report)])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "Of 2 tests that pass with SFTTrainer 1 pass with BilevelSFTTrainer; 1 pass with neither" in printed
    outcomes = json.loads(report.read_text())
    assert outcomes["SFTTrainer"] == {
        "test_required": "passed",
        "test_of_trl_alone": "passed",
        "test_of_neither": "OSError: no network",
    }
    assert outcomes["swapped"]["test_required"] == "passed"
    assert outcomes["swapped"]["test_of_trl_alone"].startswith("AssertionError")
    # The checkout itself is as it was
    assert (checkout / "tests" / "test_sft_trainer.py").read_text() == CHECKOUT


def test_what_is_no_checkout_of_this_version_is_refused(script, checkout, tmp_path):
    with pytest.raises(FileNotFoundError, match="comes without tests"):
        script.check_checkout(tmp_path, any_version=False)
    (checkout / "VERSION").write_text("0.1.0")
    with pytest.raises(ValueError, match=r"is TRL 0\.1\.0, and .* is installed"):
        script.check_checkout(checkout, any_version=False)
    script.check_checkout(checkout, any_version=True)
    (checkout / "tests" / "test_sft_trainer.py").write_text("import trl\n")
    with pytest.raises(ValueError, match="does not import the trainer as"):
        script.check_checkout(checkout, any_version=True)
