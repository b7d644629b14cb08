"""The file that a snapshot is written to: it appears under its name whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from deploy.manifest import Manifest
from protocol.errors import UserError

_MODE = 0o600
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP)
"""What file systems without hard links say."""


class SnapshotTarget:
    """A file beside `path`, of this user alone, until it is published. `fd` is open for writing.

    `pefbox clean` removes it when the launcher is killed meanwhile.
    """

    def __init__(self, path: Path, manifest: Manifest, *, replace: bool) -> None:
        """Raises UserError for a path that cannot be the file's, or that is one's already unless `replace`."""
        self.path = path
        self._replace = replace
        self._published = False
        try:
            _check(path, replace=replace)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        self._part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self._manifest = manifest
        manifest.add_file(str(self._part))
        try:
            self.fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        except OSError as error:
            manifest.drop_file(str(self._part))
            raise UserError(f"{path}: cannot be made: {error.strerror}") from None

    def publish(self) -> None:
        """Give it its name; returns once a crash cannot undo that. Raises UserError, and it has no name then."""
        try:
            if self._replace or not self._link():
                os.replace(self._part, self.path)
            self._published = True
            _sync_directory(self.path.parent)
        except FileExistsError:
            raise UserError(_exists(self.path)) from None
        except OSError as error:
            self.take_back()
            raise UserError(f"{self.path}: cannot be made: {error.strerror}") from None

    def _link(self) -> bool:
        """Whether it has its name, which a link takes from no other file; False where there are no links."""
        try:
            os.link(self._part, self.path)
        except OSError as error:
            if error.errno in _NO_LINKS and not self.path.exists():
                return False
            raise
        return True

    def take_back(self) -> None:
        """It is no snapshot after all."""
        if self._published:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._published = False

    def close(self) -> None:
        """Done with it: what has no name goes."""
        os.close(self.fd)
        with contextlib.suppress(OSError):
            self._part.unlink()
        self._manifest.drop_file(str(self._part))


def _check(path: Path, *, replace: bool) -> None:
    """Raises UserError, OSError."""
    if not path.name or not path.parent.is_dir():
        raise UserError(f"{path.parent}: is no directory to put a snapshot in")
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: is no regular file")
    if path.exists() and not replace:
        raise UserError(_exists(path))


def _exists(path: Path) -> str:
    return f"{path}: exists already; --force replaces it"


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
