"""Files that are written whole or not at all, and what is said of those that are damaged all the same."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import SafetensorError


_PAGE = 4096  # bytes
# What readers raise for a file that was cut off or changed, or that lacks a part
_SIGNS_OF_DAMAGE = (SafetensorError, pa.ArrowException, AttributeError, LookupError, OSError, TypeError, ValueError)


def write_whole(path: str | os.PathLike, write: Callable[[Path], Any]) -> Path:
    """
    Write a file under another name, and give it its own when it is whole.

    Whatever happens, `path` holds what it held before or all of the new; several processes may write the same file.
    Only a process that is killed leaves its part behind, as `*.partial`.

    Args:
        path (`str` or `os.PathLike`): in an existing folder.
        write (`Callable`): called with the path to write to.

    Returns:
        `pathlib.Path`: the file written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def disk_full_explained(folder: str | os.PathLike) -> Iterator[None]:
    """
    Say that the disk is full, whatever a library made of it.

    Args:
        folder (`str` or `os.PathLike`): what is written to.

    Raises:
        `OSError`: with `errno.ENOSPC`, in place of an error of the block, if there is no room for a page.
    """
    try:
        yield
    except Exception as error:
        is_named = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if not is_named and shutil.disk_usage(folder).free >= _PAGE:
            raise
        raise OSError(
            errno.ENOSPC,
            "The disk is full. What was whole before is whole; make room, and resume with "
            "`resume_from_checkpoint=True`",
            os.fspath(folder),
        ) from error


@contextmanager
def damage_explained(path: str | os.PathLike, cure: str) -> Iterator[None]:
    """
    Around the reading of a file, and of what must be in it: name the file and the cure, whatever a library says.

    Args:
        path (`str` or `os.PathLike`): the file.
        cure (`str`): a sentence.

    Raises:
        `ValueError`: in place of an error of the block, but for those of the operating system, such as a file that
            is not there or may not be read.
    """
    try:
        yield
    except _SIGNS_OF_DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{os.fspath(path)} is damaged and cannot be read ({reason}). {cure}") from error
