"""Files that are written whole or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


_PAGE = 4096  # bytes


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
