"""Log files of the processes as lines for people, from several files in order of time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from deploy.run_dirs import LAUNCHER_LOG, file_stem
from protocol.errors import UserError

_HIDDEN = ("timestamp", "level", "event", "process")


def log_files(state_dir: Path, target: str) -> list[Path]:
    """The logs that `target` means: one process, all processes of a host or VM, or the launcher."""
    directory = state_dir / "log"
    if target == "launcher":
        return [directory / LAUNCHER_LOG]
    exact = directory / f"{file_stem(target)}.log"
    found = [exact] if exact.is_file() else sorted(directory.glob(f"{file_stem(target)}.*.log"))
    if not found or not target.replace("/", "").replace("-", "").isalnum():
        stems = sorted(path.stem.replace(".", "/") for path in directory.glob("*.log"))
        raise UserError(f'no log of "{target}"; there are: {", ".join(stems) or "none"}')
    return found


class LogReader:
    """Reads a growing file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The whole lines that were added since the last time; a line that is no JSON comes as event."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._offset += len(line)
                    yield _parsed(line)
        except FileNotFoundError:
            return


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {"event": line.decode(errors="replace").rstrip()}


def in_order(readers: list[LogReader]) -> list[dict[str, Any]]:
    """What is new in all files, oldest first; a line without a time keeps its place in its file."""
    keyed: list[tuple[str, dict[str, Any]]] = []
    for reader in readers:
        last = ""
        for entry in reader.read():
            last = str(entry.get("timestamp", last))
            keyed.append((last, entry))
    return [entry for _, entry in sorted(keyed, key=lambda pair: pair[0])]


def as_text(entry: dict[str, Any]) -> str:
    """`12:00:00.123456 warning alpha/kvm peer failed peer=vm1/guest`."""
    time = str(entry.get("timestamp", ""))[11:26]
    level = str(entry.get("level", ""))
    facts = " ".join(f"{name}={value}" for name, value in entry.items() if name not in _HIDDEN)
    return f"{time:<15} {level:<7} {entry.get('process', ''):<16} {entry.get('event', '')} {facts}".rstrip()
