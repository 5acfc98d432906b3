"""The gate besides behaviour: style, types, and that what is shipped is what is documented."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement
from trl import SFTConfig

from trl_bilevel import BilevelSFTConfig, RefinementConfig, WeightedSFTConfig
from trl_bilevel.bilevel_sft_config import SelectionMethod
from trl_bilevel.selection_methods import SELECTION_METHODS


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_style_and_types(command):
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _own_fields():
    inherited = {option.name for option in fields(SFTConfig)}
    return [
        option
        for config in (BilevelSFTConfig, WeightedSFTConfig)
        for option in fields(config)
        if option.name not in inherited
    ]


@pytest.mark.parametrize("option", _own_fields(), ids=lambda option: option.name)
def test_documented_defaults_are_the_real_ones(option):
    documentation = BilevelSFTConfig.__doc__ + RefinementConfig.__doc__ + WeightedSFTConfig.__doc__
    documented = re.search(rf"^\s+{option.name} \((.*?)\):$", documentation, flags=re.MULTILINE)
    assert documented, f"{option.name} is not in a docstring"
    default = re.search(r"defaults to `(.*)`", documented[1])
    assert (ast.literal_eval(default[1]) if default else None) == option.default
    assert option.metadata["help"]


def test_constraints_pin_every_requirement_within_its_range():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for requirement in map(Requirement, requirements):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_lower_bounds_are_the_oldest_versions_of_the_ranges():
    command = [sys.executable, str(ROOT / ".ci" / "lower_bounds.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    bounds = dict(line.split("==") for line in printed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    assert requirements.keys() - bounds.keys() == {"torch"}
    for name, specifier in requirements.items() - {("torch", requirements["torch"])}:
        assert {str(s) for s in specifier if s.operator == ">="} == {f">={bounds[name]}"}
        assert specifier.contains(bounds[name])


@pytest.mark.xdist_group("gate")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process")
def test_a_group_goes_to_one_worker(request):
    """Else every worker launches the processes of a group for itself; pytest-xdist tells groups by the test's id."""
    assert request.node.nodeid.endswith("@gate")


def test_no_file_names_a_package_registry_or_model_hub_host():
    hosts = ["pypi" + ".org", "huggingface" + ".co", "files.python" + "hosted"]
    for path in ROOT.rglob("*"):
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml"} and not {".git", ".venv"} & set(path.parts):
            text = path.read_text()
            assert not any(host in text for host in hosts), path


def test_every_selection_method_is_a_choice():
    assert set(get_args(SelectionMethod)) == set(SELECTION_METHODS)


def _modules():
    return sorted(path for path in (ROOT / "trl_bilevel").rglob("*.py") if path.name != "__init__.py")


def _scripts():
    return [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", _modules() + _scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path):
    lines = path.read_text().splitlines()
    says_why = "more than 400 lines" in (ast.get_docstring(ast.parse(path.read_text())) or "")
    assert len(lines) <= (450 if says_why else 400)
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            documentation = (ast.get_docstring(node, clean=False) or "").count("\n") + 1
            assert node.end_lineno - node.lineno + 1 - documentation <= 60, node.name


def test_contributing_lists_every_module():
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    missing = [
        path.name
        for path in _modules()
        if path.parent.name not in ("demo", "scripts") and f"`{path.name}`" not in listed
    ]
    assert not missing
