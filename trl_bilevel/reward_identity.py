"""What a reward function is, in words that are the same in every session: another one would accept other responses."""

import functools
import hashlib
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any


_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DEEPEST = 6  # of what a function holds; beyond that by its type, as objects may hold themselves


def describe_reward_func(function: Callable[..., Any]) -> str:
    """
    Name, code and what is bound to it: the arguments of a partial, the attributes of an object, what a function closes
    over. Values that have no text of their own, such as models and arrays, are described by their type.

    Example:

    ```python
    >>> import functools
    >>> at_most, at_least = functools.partial(max, 3), functools.partial(max, 4)
    >>> describe_reward_func(at_most) == describe_reward_func(at_least)
    False

    ```
    """
    return _describe(function, 0)


def _describe(value: Any, depth: int) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if depth > _DEEPEST:
        return kind

    def inner(part: Any) -> str:
        return _describe(part, depth + 1)

    if isinstance(value, (list, tuple)):
        return f"{kind}[{', '.join(map(inner, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{kind}[{', '.join(sorted(map(inner, value)))}]"
    if isinstance(value, dict):
        return f"{kind}[{', '.join(f'{inner(key)}: {inner(part)}' for key, part in value.items())}]"
    if isinstance(value, CodeType):
        return (
            f"{value.co_name} {hashlib.sha256(value.co_code).hexdigest()} {inner((value.co_names, value.co_consts))}"
        )
    if isinstance(value, functools.partial):
        return f"{kind}[{inner(value.func)}, {inner(value.args)}, {inner(value.keywords)}]"
    if inspect.ismethod(value):
        return f"{inner(value.__func__)} of {inner(value.__self__)}"
    if inspect.isfunction(value):
        cells = [_cell_content(cell) for cell in value.__closure__ or ()]
        bound = inner((value.__defaults__, value.__kwdefaults__, cells))
        return f"{value.__qualname__} {inner(value.__code__)} {bound}"
    if inspect.isbuiltin(value) or inspect.isclass(value):
        return str(value.__qualname__)
    if callable(value):
        return f"{kind}[{inner(type(value).__call__)}, {inner(_attributes(value))}]"
    return kind


def _attributes(value: Any) -> dict[str, Any]:
    return vars(value) if "__dict__" in dir(value) else {}


def _cell_content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
