"""Turns the package's docstrings, written as Hugging Face writes them, into Markdown for the API reference."""

import re
from typing import Any

import griffe


_SECTION = re.compile(r"(Args|Parameters|Attributes|Returns|Raises):")
_TITLES = {"Args": "Parameters"}
# name (`type`, *optional*, defaults to `x`): or: name, name, ...: or: `ErrorType`:
_ITEM = re.compile(r"(?P<names>[`\[\]\w*., ~]+?)(?: \((?P<type>.+?)\))?:(?: (?P<text>.*))?")
_REFERENCE = re.compile(r"\[`(?P<target>~?[\w.]+)`\]")
_PUBLIC = (
    "IMPROVE_ANSWER_TEMPLATE",
    "BilevelSFTConfig",
    "BilevelSFTTrainer",
    "DataSelector",
    "RefinementConfig",
    "SelfRefiningCallback",
    "SelfRefiningCollator",
    "load_curated_dataset",
)
_MATH = {r"\lambda": "λ", r"\in": "∈", "L_{val}": "L_val", "L_{train}": "L_train"}


class HFDocstrings(griffe.Extension):
    """Rewrites every docstring once it is loaded; griffe itself then reads plain Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """
    Markdown of a docstring: sections as definition lists, references as links to this reference or as code.

    Example:

    ```python
    >>> print(to_markdown("Do it.\\n\\nArgs:\\n    size (`int`): how much."))
    Do it.
    <BLANKLINE>
    **Parameters**
    <BLANKLINE>
    `size` (`int`)
    :   how much.

    ```
    """
    lines: list[str] = []
    section: str | None = None
    is_code = False
    for line in _plain(docstring).split("\n"):
        if is_code or line.lstrip().startswith("```"):
            is_code = is_code != line.lstrip().startswith("```")
            section = None if not line.startswith(" ") else section
            lines.append(line)
        elif match := _SECTION.fullmatch(line):
            section = match[1]
            lines += [f"**{_TITLES.get(section, section)}**", ""]
        elif line and not line.startswith(" "):
            section = None
            lines.append("**Example**" if line == "Example:" else line)
        elif section is None:
            lines.append(line)
        else:
            new = _section_line(section, line.removeprefix("    "))
            lines += new[1:] if new[0] == "" and lines[-1] == "" and len(new) > 1 else new
    # The text of an item without one on its own line starts on the next
    return re.sub(r"\n:\n +", "\n:   ", "\n".join(lines)).strip("\n")


def _section_line(section: str, line: str) -> list[str]:
    """A line of a section, less the section's own indentation."""
    if line.startswith("> "):
        return ["", f"***{line.removeprefix('> ')}***", ""]
    if line.startswith(" ") or not line:
        return [line]
    match = _ITEM.fullmatch(line)
    if match is None:
        return [f"    {line}"]  # text of the item above
    names = match["names"] if section in ("Returns", "Raises") else f"`{match['names']}`"
    kind = f" ({match['type']})" if match["type"] else ""
    text = [f":   {match['text']}"] if match["text"] else [":"]
    return ["", f"{names}{kind}", *text]


def _plain(text: str) -> str:
    text = re.sub(r"\$([^$]+)\$", lambda math: f"`{_unicode(math[1])}`", text)
    return _REFERENCE.sub(_link, text)


def _unicode(math: str) -> str:
    for name, sign in _MATH.items():
        math = math.replace(name, sign)
    return math


def _link(reference: re.Match[str]) -> str:
    target = reference["target"].lstrip("~")
    name = target.removeprefix("trl_bilevel.")
    public = target.split(".")[-1] if target.startswith("trl_bilevel.") and name.split(".")[-1] in _PUBLIC else name
    if public.split(".")[0] in _PUBLIC:
        return f"[`{public}`][trl_bilevel.{public}]"
    return f"`{target.split('.')[-1] if reference['target'].startswith('~') else target}`"
