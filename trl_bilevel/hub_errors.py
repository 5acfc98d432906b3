"""What goes wrong between here and the Hub: tried again, or explained with what to do."""

import errno
import json
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled


logger = logging.getLogger(__name__)

ATTEMPTS = 4
_FIRST_WAIT = 1.0  # seconds; doubles
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_HAS_FAILED = "the Hub has failed. Push again in a while"
_LONGEST_MESSAGE = 300  # characters


class PublishError(RuntimeError):
    """The Hub did not take a dataset or a model. It is on disk still; the message says what to do."""


def retried(call: Any) -> Any:
    """Once more, after a while, for what may pass: a busy or broken server, a cut connection."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, json.JSONDecodeError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if attempt == ATTEMPTS - 1 or (status is not None and status not in _TRANSIENT):
                raise
            wait = _FIRST_WAIT * 2**attempt
            logger.warning(f"The Hub did not answer ({error.__class__.__name__}, {status}); again in {wait:.0f} s.")
            time.sleep(wait)
    raise AssertionError("unreachable")


@contextmanager
def explained(repo_id: str, retry_command: str | None = None) -> Iterator[None]:
    """
    Turns errors of the Hub's client into a [`PublishError`] that names the cure.

    No token and no address of a request is in its message.

    Args:
        repo_id (`str`): what is published.
        retry_command (`str`, *optional*): publishes later what is on disk.
    """
    later = f" To publish it later: `{retry_command}`." if retry_command else ""
    namespace = repo_id.split("/")[0] if "/" in repo_id else "your account"
    try:
        yield
    except (HfHubHTTPError, httpx2.TransportError, OSError, RuntimeError) as error:
        # An upload's own error is the cause of the client's
        reason = _reason(error.__cause__ or error if isinstance(error, RuntimeError) else error, namespace)
        if reason is None:
            raise
        raise PublishError(f"{repo_id} was not published{reason}.{later}") from error
    except json.JSONDecodeError as error:
        if not _is_of_the_client(error):
            raise
        # It reads a broken server's page before its status
        raise PublishError(f"{repo_id} was not published: {_HAS_FAILED}.{later}") from error
    except ValueError as error:
        if not isinstance(error.__cause__, HfHubHTTPError):
            raise
        # The client's error where the Hub does not accept a card
        problems = "; ".join(line.removeprefix("- ") for line in str(error).splitlines()[1:])
        raise PublishError(
            f"{repo_id} was not published: its card is refused ({problems}). Pass another value, or mend the card on "
            f"the Hub.{later}"
        ) from error


def _reason(error: BaseException, namespace: str) -> str | None:
    """What is wrong and what cures it, for what can go wrong between here and the Hub."""
    if isinstance(error, OfflineModeIsEnabled):
        return ": offline mode is on. Unset `HF_HUB_OFFLINE`, and push again"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reasons = {
            401: "the token is missing or not valid. Log in with `hf auth login`, or pass `token=`",
            403: f"the token may not write to {namespace}. It needs the permission to write to the contents of "
            f"repositories of {namespace}, and you must be a member of it",
            404: f"{namespace} does not exist, or you cannot see the repository or revision. Check its name",
            409: "the name is taken by something else, or the repository changed meanwhile. Push again",
            412: "the repository changed meanwhile. Push again",
            429: "the Hub has had too many requests. Push again in a while",
        }
        if status in reasons or status in _TRANSIENT or status >= 500:
            said = _one_line(error.server_message or "")
            also = f" (the Hub says: {said})" if status == 403 and said else ""  # storage may be used up
            return f" ({status}): {reasons.get(status, _HAS_FAILED)}{also}"
        return f" ({status}): the Hub refuses it: {_one_line(error.server_message or 'it does not say why')}"
    if isinstance(error, (httpx2.TransportError, ConnectionError, LocalEntryNotFoundError)):
        return f": the Hub cannot be reached ({error.__class__.__name__}). Push again"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" under {Path(error.filename).parent}" if error.filename else f" under {tempfile.gettempdir()}"
        return f": {os.strerror(error.errno)}. Free some space{where}, or set `TMPDIR`"
    return None


def _is_of_the_client(error: BaseException) -> bool:
    """Whether an error came up within a call of the Hub's client."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.partition(".")[0] == "huggingface_hub" for module in modules)


def _one_line(message: str) -> str:
    """What a server says, short and without control characters."""
    shown = (character if character.isprintable() else "\ufffd" for character in " ".join(message.split()))
    return "".join(shown)[:_LONGEST_MESSAGE]
