"""A secure VM taken apart at its source, and put together where it arrives.

Pages and their states travel by themselves. The rest of what the ultravisor knows of the VM is one Struct: its memory
slots, its bounce pages, the files of its ESM blob with how far they were read, and the state of its processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.decoding import DECODE_ERRORS
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from protocol.messages import Gfn
from services.ultravisor.esm_files import EsmFilesState
from services.ultravisor.migration.payloads import ARRIVES_AS, MAX_STATE_BYTES
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.svm import MAX_SLOTS, Slot, Svm, SvmPhase


class SvmRest(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What is no page. Secret: it holds the key of the blob's files and the registers of the guest."""

    slots: Annotated[list[Slot], Meta(max_length=MAX_SLOTS)]
    bounce_gfns: Annotated[list[Gfn], Meta(max_length=MAX_SLOTS)]
    files: EsmFilesState
    processors: Annotated[bytes, Meta(max_length=MAX_STATE_BYTES)]

    def __repr__(self) -> str:
        return f"SvmRest({len(self.slots)} slots)"

    def encode(self) -> bytes:
        """As the exporter sends it."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> SvmRest:
        """Of what the importer got; raises MigrationRefused."""
        try:
            return msgspec.msgpack.decode(raw, type=cls)
        except DECODE_ERRORS as error:
            raise MigrationRefused(Reason.NOT_WHOLE, str(error)) from None


class SvmFrames:
    """The secure frames of a VM that arrives."""

    page_bytes = PAGE_BYTES

    def __init__(self, svm: Svm) -> None:
        self._svm = svm
        self._written: set[int] = set()
        """A page that was never touched takes no memory, and is not touched to find it zero."""

    def expect(self, gfns: Sequence[int]) -> None:
        """The contents of these pages are put next."""
        self._svm.memory.touch([gfn for gfn in gfns if gfn not in self._written])

    def write(self, gfn: int, content: bytes | memoryview) -> None:
        """Put the content of a page."""
        self._written.add(gfn)
        self._svm.secure_page(gfn)[:] = content

    def zero(self, gfn: int) -> None:
        """Zero a page."""
        if gfn in self._written:
            self._written.discard(gfn)
            self._svm.zero_secure(gfn)

    def wipe(self) -> None:
        """Zero every page of the VM; one that has ended has none any more."""
        if self._svm.phase is SvmPhase.ENDED:
            return
        for gfn in list(self._written):
            self.zero(gfn)


def states_to_send(svm: Svm) -> bytes:
    """The state that each frame will have where it arrives; raises MigrationRefused while one is in transition."""
    states = bytearray(svm.n_pages)
    for gfn in range(svm.n_pages):
        arriving = ARRIVES_AS.get(svm.states[gfn])
        if arriving is None:
            raise MigrationRefused(Reason.WRONG_PHASE, f"gfn {gfn:#x} is {svm.states[gfn].name}")
        states[gfn] = arriving
    return bytes(states)


def put_together(svm: Svm, states: bytes, rest: SvmRest) -> None:
    """Make a new `svm`, whose frames have come, the one that left. Raises MigrationRefused; `svm` is to be released.

    Its secure memory is charged here.
    """
    for slot in sorted(rest.slots, key=lambda slot: slot.gfn):
        _check_slot(svm, slot)
        if not svm.register_slot(slot):
            raise MigrationRefused(Reason.NO_ROOM, f"{slot.n_pages << PAGE_SHIFT} bytes of slot {slot.slot}")
    if not all(gfn < svm.n_pages for gfn in rest.bounce_gfns):
        raise MigrationRefused(Reason.NOT_WHOLE, "a bounce page outside the VM")
    svm.states.load(states)
    svm.map_all()


def _check_slot(svm: Svm, slot: Slot) -> None:
    inside = slot.gfn >= 0 and slot.n_pages > 0 and gpa_of(slot.gfn + slot.n_pages) <= svm.ram.size_bytes
    known = slot.slot in svm.slots or not 0 <= slot.slot < MAX_SLOTS
    if not inside or known or any(svm.in_slots(gfn) for gfn in (slot.gfn, slot.gfn + slot.n_pages - 1)):
        raise MigrationRefused(Reason.NOT_WHOLE, f"memory slot {slot.slot}")
