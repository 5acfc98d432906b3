"""Nothing that a file holds is ever run: no pickles, no remote code."""

import ast
import os
from pathlib import Path

import pytest
import torch

import trl_bilevel
from trl_bilevel.selector_files import _read_logits
from trl_bilevel.value_function import OPTIMIZER_FILE_NAME, ValueFunction


_PACKAGE = Path(trl_bilevel.__file__).parent
_LOADERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def unsafe_calls(source: str) -> list[str]:
    """Calls and options in source code that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _LOADERS:
            found.append(ast.unparse(node))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        owner, _, method = name.rpartition(".")
        if owner in _LOADERS and method in ("load", "loads", "Unpickler", "open"):
            found.append(ast.unparse(node))
        if name == "torch.load" and ast.unparse(options.get("weights_only", ast.Constant(False))) != "True":
            found.append(ast.unparse(node))
        if ast.unparse(options.get("trust_remote_code", ast.Constant(False))) == "True":
            found.append(ast.unparse(node))
        if name in ("eval", "exec", "np.load") and not (name == "np.load" and "allow_pickle" not in options):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "from pickle import loads",
        "load(name, trust_remote_code=True)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert unsafe_calls(source)


def test_the_package_runs_nothing_that_a_file_holds():
    files = sorted(_PACKAGE.rglob("*.py"))
    assert files
    found = {str(file.relative_to(_PACKAGE)): unsafe_calls(file.read_text(encoding="utf-8")) for file in files}
    assert {file: calls for file, calls in found.items() if calls} == {}


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path):
    ran = tmp_path / "ran"
    torch.save(Payload(ran), tmp_path / "logits.pt")
    torch.load(tmp_path / "logits.pt", weights_only=False)
    assert ran.is_dir()  # so it would run, if it were let
    ran.rmdir()
    with pytest.raises(ValueError, match="cannot be read as a tensor"):
        _read_logits(tmp_path / "logits.pt")

    torch.save({"state": Payload(ran), "param_groups": []}, tmp_path / OPTIMIZER_FILE_NAME)
    model = torch.nn.Linear(2, 1)
    values = ValueFunction(model, ["weight"], lambda parameters: torch.optim.AdamW(parameters), 1.0)
    with pytest.raises(ValueError, match="cannot be read as the state of an optimizer"):
        values.load_optimizer(tmp_path)
    assert not ran.exists()
