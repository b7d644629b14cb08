"""What two qemus say of themselves first, and why one of them does not take the other."""

from __future__ import annotations

import hashlib

import msgspec

from protocol.geometry import PAGE_BYTES
from protocol.startup import VmEntry
from services.qemu.migration.stream import VERSION, Hello
from shared.machine_type import VERSIONED_MACHINE
from shared.terminal_text import one_line

MAX_REASON_BYTES = 256
_DIGEST_CHARS = 16


def hello_of(vm: VmEntry, *, secure: bool) -> Hello:
    """The first frame of either side."""
    return Hello(
        machine=VERSIONED_MACHINE,
        vm=vm.name,
        page_bytes=PAGE_BYTES,
        n_pages=vm.memory_bytes // PAGE_BYTES,
        secure=secure,
        capabilities=capabilities_of(vm),
    )


def capabilities_of(vm: VmEntry) -> list[str]:
    """What both sides must have alike: each device with its settings, and what else a guest can tell of the machine."""
    devices = [f"device {index}: {device.kind} {_digest(device)}" for index, device in enumerate(vm.devices)]
    return [*devices, f"kernel: {vm.guest.kernel}", f"time: {vm.time}", f"dma: {_digest(vm.dma)}"]


def why_not(theirs: Hello, ours: Hello, there: str = "at the source") -> str | None:
    """Why a machine that says `theirs` cannot arrive where `ours` is said; None when it can; `there` is the other."""
    if theirs.version != VERSION:
        return f"the migration stream {there} is of version {theirs.version}, here it is {VERSION}"
    for what in ("machine", "vm", "page_bytes", "n_pages"):
        if getattr(theirs, what) != getattr(ours, what):
            return f"{what} is {getattr(theirs, what)!r} {there} and {getattr(ours, what)!r} here"
    missing = [capability for capability in theirs.capabilities if capability not in ours.capabilities]
    if missing:
        return f"not here as {there}: {missing[0]}"
    more = [capability for capability in ours.capabilities if capability not in theirs.capabilities]
    return f"not {there} as here: {more[0]}" if more else None


def printable(text: memoryview) -> str:
    """The beginning of a peer's text, for the operator."""
    return one_line(str(text[:MAX_REASON_BYTES], errors="replace"))


def _digest(struct: msgspec.Struct) -> str:
    return hashlib.sha256(msgspec.json.encode(struct, order="deterministic")).hexdigest()[:_DIGEST_CHARS]
