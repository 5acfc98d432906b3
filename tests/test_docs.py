"""The documentation: it builds without a warning, and what it says about the code is so."""

import ast
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pytest
import trl
from trl import SFTTrainer

import trl_bilevel
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, RefinementConfig
from trl_bilevel.scripts import curate, demo, push, report, score, screen, sft


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TROUBLES = ROOT / "docs" / "howto" / "troubleshoot.md"


class _Loaded(HTMLParser):
    """What a browser fetches by itself to show a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag != "a":
            self.addresses += [attributes[name] for name in ("src", "srcset", "href", "data") if attributes.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout + result.stderr
    return folder


def test_site_has_every_page_and_loads_nothing_from_a_network(site):
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in PAGES[1:]}
    assert pages <= {page.relative_to(site) for page in site.rglob("*.html")}
    for page in site.rglob("*.html"):
        parser = _Loaded()
        parser.feed(page.read_text())
        assert not [address for address in parser.addresses if "//" in address], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_reference_has_every_public_name_and_option(site):
    reference = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    for name in trl_bilevel.__all__:
        assert f'id="trl_bilevel.{name}"' in reference, name
    options = {
        *RefinementConfig.__dataclass_fields__,
        *BilevelSFTConfig.__annotations__,
        *trl_bilevel.WeightedSFTConfig.__annotations__,
    }
    for option in options:
        assert f"<dt><code>{option}</code>" in reference, option
    assert not re.search(r"\[<code>|\*optional\*|<p>:|\$\\", reference)  # markup that was not read as such


def test_example_of_the_docstring_converter():
    pytest.importorskip("griffe")
    path = ROOT / "docs" / "tools" / "hf_docstrings.py"
    result = subprocess.run(
        [sys.executable, "-m", "doctest", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _blocks(language):
    found = []
    for page in PAGES:
        blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), flags=re.S | re.M)
        for number, (indent, block) in enumerate(blocks):
            found.append(pytest.param(re.sub(rf"^{indent}", "", block, flags=re.M), id=f"{page.name}-{number}"))
    return found


def _parameters(function):
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _keywords_of(function):
    """Names that a call may give, `None` for functions of others."""
    name = ast.unparse(function)
    if name == "BilevelSFTTrainer":
        return _parameters(BilevelSFTTrainer.__init__) | _parameters(SFTTrainer.__init__)
    if name in trl_bilevel.__all__:
        return _parameters(getattr(trl_bilevel, name))
    if name in ("SFTTrainer", "SFTConfig"):
        return _parameters(getattr(trl, name))
    if name.startswith(("trainer.", "large.")) and name.count(".") == 1:
        return _parameters(getattr(BilevelSFTTrainer, name.split(".")[1]))
    return None


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_in_the_documentation_is_of_this_package(code):
    compile(code, "documentation", "exec")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl"):
            module = __import__(node.module, fromlist=["_"])
            for alias in node.names:
                assert getattr(module, alias.name) is not None
        elif isinstance(node, ast.Call):
            allowed = _keywords_of(node.func)
            given = {keyword.arg for keyword in node.keywords} - {None}
            if allowed is not None:
                if ast.unparse(node.func) == "load_curated_dataset":  # whose options go on
                    allowed = allowed | _parameters(datasets.load_dataset)
                assert given <= allowed, ast.unparse(node)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "trainer.data_selector":
            assert hasattr(trl_bilevel.DataSelector(1), node.attr), node.attr


_PARSERS = {
    "curate": curate,
    "demo": demo,
    "push": push,
    "report": report,
    "score": score,
    "screen": screen,
    "sft": sft,
}


@pytest.mark.parametrize("block", _blocks("bash"))
def test_commands_in_the_documentation_have_these_options(block):
    for line in block.replace("\\\n", " ").splitlines():
        words = re.search(r"\btrl-bilevel (\w+)(.*)", line.split("#")[0])
        if words is None:
            continue
        parser = _PARSERS[words[1]].make_parser()
        for option in re.findall(r"--(\w+)", words[2]):
            assert f"--{option}" in parser._option_string_actions, line


def _messages():
    """Every text in the package, with an ellipsis for what is put in."""
    for path in (ROOT / "trl_bilevel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_quoted_messages_are_those_of_the_code():
    quoted = re.findall(r"^\| `` (.*?) `` \|", TROUBLES.read_text(), flags=re.M)
    assert len(quoted) > 50
    messages = {re.sub(r"'…'|…+", "…", text) for text in _messages()}
    for quote in quoted:
        # `!r` puts quotation marks of its own, and what is put in may be text of the quote
        pattern = ".*".join(re.escape(part.strip()) for part in re.split(r"'?…'?", quote))
        assert any(re.match(pattern, text, flags=re.S) for text in messages), quote
