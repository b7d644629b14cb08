"""Trace files as processes write them, without processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.run_dirs import TRACE_SUFFIX, file_stem
from deploy.trace.events import Event
from deploy.trace.merge import Trace
from protocol.links import KVM_GUEST, LinkKind
from protocol.startup import GuestEntry, LinkEntry, ProcessConfig, VmEntry
from protocol.wire import MessageKind, encode
from services.runtime.tracer import Tap, Tracer

LPID = 7


def config_of(target: str, seed: int = 1) -> ProcessConfig:
    """A start configuration of which only the names matter."""
    return ProcessConfig(
        cluster="c",
        host="alpha",
        role=target.partition("/")[2],
        target=target,
        run_dir="",
        state_dir="",
        log_file="",
        trace_file="",
        record=False,
        debuggable=False,
        secure_memory_bytes=0,
        seed=seed,
        vms=[],
        links=[],
        descriptors=[],
    )


def vm_of(name: str = "vm1", lpid: int = LPID, time: str = "wall") -> VmEntry:
    """A VM."""
    return VmEntry(
        name=name,
        lpid=lpid,
        incarnation=1,
        memory_bytes=1 << 26,
        ram_segment="",
        time=time,
        secure_allowed=True,
        debuggable=False,
        guest=GuestEntry(),
        disks=[],
        devices=[],
    )


class End:
    """An end of a link, of which only the tap matters."""

    tap: Tap | None = None


class Recording:
    """A process that records into `directory`; after `move` its file is called otherwise."""

    def __init__(self, directory: Path, target: str, *, move: int = 0, seed: int = 1, time: str = "wall") -> None:
        place = f"{target}.{move}" if move else target
        self.path = directory / f"{file_stem(place)}{TRACE_SUFFIX}"
        self._file = self.path.open("ab", buffering=0)
        self.tracer = Tracer(self._file.fileno(), config_of(target, seed))
        self.tracer.add_vm(vm_of(time=time))
        self.tracer.switch(on=True)
        self._ends: dict[str, End] = {}

    def link(
        self,
        kind: LinkKind = KVM_GUEST,
        vm: str | None = "vm1",
        peer: str = "alpha/kvm",
        clock: Callable[[], int] | None = None,
    ) -> str:
        """Open a link; its id."""
        link_id = f"{vm or 'alpha'}:{kind.name}.1"
        entry = LinkEntry(id=link_id, kind=kind.name, endpoint="", vm=vm, peer=peer, peer_public_key="", binds=False)
        end = self._ends[link_id] = End()
        self.tracer.add_end(end, entry, clock)
        return link_id

    def saw(self, link: str, frame: bytes, *, outward: bool = True) -> None:
        """A message went out or came in."""
        tap = self._ends[link].tap
        assert tap is not None
        tap(outward, [frame])

    def sent(self, link: str, kind: MessageKind, number: int, correlation: int, body: Any, cause: int = 5) -> None:  # noqa: ANN401
        """As `saw`, outward, of what is encoded here."""
        self.saw(link, encode(kind, number, correlation, cause, body))

    def came(self, link: str, kind: MessageKind, number: int, correlation: int, body: Any, cause: int = 5) -> None:  # noqa: ANN401
        """As `sent`, inward."""
        self.saw(link, encode(kind, number, correlation, cause, body), outward=False)

    def close(self) -> Path:
        """All is in the file."""
        self.tracer.flush()
        self._file.close()
        return self.path


def events_of(*paths: Path) -> list[Event]:
    """What the files hold."""
    return list(Trace(list(paths)).events())
