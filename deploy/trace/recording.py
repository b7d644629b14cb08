"""Traces of running clusters: which processes record, and what they wrote since then."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deploy.client import LauncherClient
from deploy.run_dirs import Paths
from deploy.tables import processes_of
from deploy.trace.filters import is_of
from protocol.errors import UserError

_SECONDS = 2.0


def paths_of(client: LauncherClient, status: dict[str, Any]) -> Paths:
    """The directories of the cluster that answers."""
    return Paths(client.run_dir, Path(status["state_dir"]))


def targets_of(status: dict[str, Any], process: str | None = None) -> list[str]:
    """The processes of a cluster that can be asked, or those that `process` names; raises UserError for none."""
    targets = [row["target"] for row in processes_of(status) if row["state"] not in ("gone", "failed", "stopped")]
    chosen = [target for target in targets if process is None or is_of(target, process)]
    if not chosen:
        raise UserError(f'--process: no "{process}" runs; there is: {", ".join(targets)}')
    return chosen


@contextmanager
def recording(client: LauncherClient, targets: list[str]) -> Iterator[list[str]]:
    """The processes that did not record before, and do for as long as the block runs; the others go on afterwards."""
    switched = []
    try:
        for target in targets:
            if not client.query(target, "recording", {}, _SECONDS)["recording"]:
                switched.append(target)
                order(client, target, on=True)
        yield switched
    finally:
        for target in switched:
            _end(client, target)


def order(client: LauncherClient, target: str, *, on: bool) -> None:
    """Have a process record, or not; all that it noted is in its file then. Raises UserError when its file is full."""
    answer = client.query(target, "record", {"on": on}, _SECONDS)
    if on and answer["full"]:
        raise UserError(f"the trace of {target} is full: `pefbox restart` begins another, as does the next start")


def flush(client: LauncherClient, targets: list[str]) -> None:
    """Have what was noted so far in the files; of a process that does not answer there is what it wrote by itself."""
    for target in targets:
        with suppress(UserError):
            client.query(target, "recording", {}, _SECONDS)


def _end(client: LauncherClient, target: str) -> None:
    # Of one that has ended meanwhile, or does not answer, the file has what it wrote.
    with suppress(UserError):
        order(client, target, on=False)


class Window:
    """What is recorded from now on, to be copied to a directory of its own."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._from = {path: path.stat().st_size if path.exists() else 0 for path in files}

    def take_whole(self, files: Iterable[Path]) -> None:
        """Files that were being recorded into before: only from its beginning can a trace be read."""
        self._from |= dict.fromkeys(files, 0)

    def copy_to(self, directory: Path) -> int:
        """Copy; the number of bytes. Raises UserError."""
        n_bytes = 0
        for path, offset in self._from.items():
            if not path.exists() or path.stat().st_size <= offset:
                continue
            with path.open("rb") as source, (directory / path.name).open("wb") as copy:
                source.seek(offset)
                shutil.copyfileobj(source, copy)
                n_bytes += copy.tell()
        return n_bytes


def make_new_dir(path: Path) -> None:
    """Make the directory of a recording; raises UserError when it has something in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        taken = any(path.iterdir())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if taken:
        raise UserError(f"{path}: is not empty; a recording gets a directory of its own")
