"""Traces of a running cluster, from the side of its commands: have it record, and find what it wrote since then."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.client import LauncherClient
from deploy.run_dirs import TRACE_SUFFIX, Paths
from deploy.tables import processes_of
from deploy.targets import is_of
from deploy.trace.reader import begins_at, place_of
from protocol.errors import UserError

_SECONDS = 2.0
_ALL_SECONDS = 10.0


def paths_of(client: LauncherClient, status: dict[str, Any]) -> Paths:
    """The directories of the cluster that answers."""
    return Paths(client.run_dir, Path(status["state_dir"]))


def begin(client: LauncherClient, process: str | None = None) -> dict[str, list[str]]:
    """Have `process` record, those of a host or VM, or all, also those that start later, until the client is closed.

    Gives `targets`, those of them that recorded `before`, and the `silent` ones, that did not answer. Raises UserError.
    """
    begun: dict[str, list[str]] = client.call("record", {"process": process}, _ALL_SECONDS)
    return begun


def flush(client: LauncherClient) -> None:
    """Have what was noted so far in the files; of a process that does not answer there is what it wrote by itself."""
    for row in processes_of(client.call("status")):
        if row["state"] == "running":
            with suppress(UserError):
                client.query(row["target"], "recording", {}, _SECONDS)


def files_of(directory: Path, process: str | None = None) -> list[Path]:
    """The trace files there, or those of `process`, of a host or VM."""
    files = sorted(directory.glob(f"*{TRACE_SUFFIX}"))
    return [path for path in files if process is None or is_of(place_of(path), process)]


class Window:
    """What is recorded from now on, to be copied to a directory of its own."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._from = {path: path.stat().st_size for path in files}

    def take_whole(self, targets: list[str]) -> None:
        """Processes that recorded before, or may have: only from its beginning can a trace be read."""
        for path in self._from:
            if any(is_of(place_of(path), target) for target in targets):
                self._from[path] = 0

    def copy_to(self, directory: Path, files: Iterable[Path]) -> list[Path]:
        """Copy what was added to `files`, all of those that are new; the files that have something.

        What was noted before this recording began may have been written since: such a file is copied whole, too.
        """
        return list(self._copies(directory, files))

    def _copies(self, directory: Path, files: Iterable[Path]) -> Iterator[Path]:
        for path in files:
            offset = self._from.get(path, 0)
            if path.stat().st_size <= offset:
                continue
            if not begins_at(path, offset):
                offset = 0
            with path.open("rb") as source, (directory / path.name).open("wb") as copy:
                source.seek(offset)
                shutil.copyfileobj(source, copy)
            yield directory / path.name


def make_new_dir(path: Path) -> None:
    """Make the directory of a recording; raises UserError when it has something in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        taken = any(path.iterdir())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if taken:
        raise UserError(f"{path}: is not empty; a recording gets a directory of its own")
