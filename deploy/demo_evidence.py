"""What the demo looks through for a guest's secrets: copies of all that the host's side could have seen.

Taken at a mark, before the guest is asked to reveal anything: all normal RAM, every frame that kvm and qemu sent or
received, what ultravisors and guests recorded, all logs, and, as root, the memory of both processes. A secret counts as
found when the bytes are there, raw or in hexadecimal, whole or in the 8-byte words in which registers travel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.manifest import read_manifest
from deploy.run_dirs import Paths
from deploy.secret_search import SecretSearch
from protocol.errors import UserError

SEGMENT_DIR = Path("/dev/shm")
_CHUNK_BYTES = 16 << 20
_OVERLAP_BYTES = 128


@dataclass(frozen=True, slots=True)
class Evidence:
    """Copies by what they are: `normal RAM pefbox-...`, `frames of alpha/kvm`, `memory of vm1/qemu`."""

    copies: dict[str, list[bytes]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Bytes in all copies."""
        return sum(len(piece) for pieces in self.copies.values() for piece in pieces)

    def where(self, secrets: Mapping[str, bytes]) -> dict[str, list[str]]:
        """For each of `secrets` the copies that hold it in any of its forms."""
        search = SecretSearch(secrets)
        places: dict[str, list[str]] = {name: [] for name in secrets}
        for what, pieces in self.copies.items():
            for name in search.names_in(pieces):
                places[name].append(what)
        return places


def take_evidence(paths: Paths, host_targets: dict[str, int]) -> Evidence:
    """Copy everything now. `host_targets` are kvm and qemu processes with their pids."""
    evidence = Evidence()
    manifest = read_manifest(paths.manifest)
    for name in [] if manifest is None else manifest.segments:
        evidence.copies[f"normal RAM {name}"] = list(_data_of(SEGMENT_DIR / name))
    for target in host_targets:
        evidence.copies[f"frames of {target}"] = [paths.trace_file(target).read_bytes()]
    own = {paths.trace_file(target) for target in host_targets}
    for path in sorted(set(paths.trace_dir.iterdir()) - own):
        evidence.copies[f"trace {path.name}"] = [path.read_bytes()]
    for log in sorted(paths.log_dir.iterdir()):
        evidence.copies[f"log {log.name}"] = [log.read_bytes()]
    for target, pid in host_targets.items():
        if os.geteuid() != 0:
            evidence.left_out.append(f"memory of {target} (only root can read it)")
            continue
        evidence.copies[f"memory of {target}"] = list(_process_memory(pid))
    return evidence


def _data_of(path: Path) -> Iterator[bytes]:
    """The parts of a sparse file that are no holes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        end = os.fstat(fd).st_size
        at = 0
        while at < end:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(fd, start, os.SEEK_HOLE)
            yield os.pread(fd, at - start, start)
    finally:
        os.close(fd)


def _process_memory(pid: int) -> Iterator[bytes]:
    """Every readable private mapping of a process. Guest RAM is left out: its segment is copied by itself."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            if not rights.startswith("r") or str(SEGMENT_DIR) in line or "[v" in line:
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            yield from _read_span(memory.fileno(), start, end)


def _read_span(fd: int, start: int, end: int) -> Iterator[bytes]:
    at = start
    while at < end:
        n = min(_CHUNK_BYTES, end - at)
        try:
            data = os.pread(fd, n, at)
        except OSError:
            return
        if not data:
            return
        yield data
        at += len(data)
        if at < end:
            at -= min(_OVERLAP_BYTES, len(data) - 1)


def frame_is_hole(segment: Path, offset: int, n_bytes: int) -> bool:
    """Whether no byte of the range is backed by memory: reading it would find zeros. Raises UserError."""
    try:
        fd = os.open(segment, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{segment}: {error.strerror}") from None
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + n_bytes
    except OSError:
        return True
    finally:
        os.close(fd)


def read_frame(segment: Path, offset: int, n_bytes: int) -> bytes:
    """The raw bytes of a frame in a RAM segment."""
    fd = os.open(segment, os.O_RDONLY)
    try:
        return os.pread(fd, n_bytes, offset)
    finally:
        os.close(fd)
