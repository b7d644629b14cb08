"""Files on disk that outlive a run: appended to, or replaced as a whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import UserError


@contextlib.contextmanager
def told_by_line() -> Iterator[None]:
    """What the machine refuses becomes the one line that the operator reads. Raises UserError for an OSError."""
    try:
        yield
    except OSError as error:
        raise UserError(refusal(error)) from None


def refusal(error: OSError) -> str:
    """The file that it is about, where it is about one, and why."""
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{error.filename}: {reason}"


def open_to_append(path: Path) -> int:
    """Its descriptor; the file is made where there is none. Raises UserError."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A place in the directory of `path`, to write what `os.replace` then puts there: a full disk leaves what was
    there. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pefbox-") as directory:
        yield Path(directory) / "new"
