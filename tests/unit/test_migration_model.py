"""Every order of events of a migration within bounds (S1, S3, S6), and faults of the protocol that this must find.

`make chaos` tries more at once than the bounds of an ordinary run allow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.ultravisor.migration.exporter import Exporter, ExportPhase
from services.ultravisor.migration.importer import Importer, ImportPhase
from services.ultravisor.migration.ledger import Ledger
from services.ultravisor.migration.payloads import PRIVATE
from services.ultravisor.migration.records import Direction, MakeAead, Record, RecordOpener, RecordSealer
from services.ultravisor.migration.statements import Word, sign
from services.ultravisor.page_state import GfnState
from tests.unit.migration_world import Bounds, Parts, Violation, search

pytestmark = pytest.mark.slow

FULL = os.environ.get("PEFBOX_MODEL") == "full"
ONE_OF_EACH_CRASH = Bounds(writes=2 if FULL else 1, tampering=0, full_disks=0, orders=0, total=5)
"""A crash of each of the four processes and a cut, all in one run."""
ANYTHING_ONCE = Bounds(total=2 if FULL else 1)
ONE_EVENT = Bounds(total=1)
LOST_ANSWER_AND_ORDER = Bounds(writes=0, crashes=0, full_disks=0, total=2)

EVERY_EXPORT_PHASE = {phase.value for phase in ExportPhase}
EVERY_IMPORT_PHASE = {phase.value for phase in ImportPhase}


@pytest.mark.parametrize("bounds", [ONE_OF_EACH_CRASH, ANYTHING_ONCE], ids=["crashes", "anything"])
def test_in_every_order_of_events_the_vm_runs_on_one_side_with_its_newest_pages(bounds: Bounds) -> None:
    found = search(Parts(), bounds)

    assert found.n_states > 1000 and found.n_ends > 100
    assert {source for source, _ in found.phases} >= EVERY_EXPORT_PHASE
    # CHECKED lasts no longer than the loading of the state, which the model does at once.
    assert {destination for _, destination in found.phases} >= EVERY_IMPORT_PHASE - {ImportPhase.CHECKED.value}


# -- faults: each is a class with one rule left out ------------------------------------------------------------------


class CancelsAfterToken(Exporter):
    def cancel(self) -> None:
        self.phase = ExportPhase.RETURNED


class ForgetsToken(Exporter):
    """The decision is not stored, so that it is unknown after a crash."""

    def take_ready(self, raw: bytes) -> bytes:
        self._expect(ExportPhase.FINISHED)
        self._opener.open(raw)
        self.phase = ExportPhase.TOKEN_GIVEN
        return self.token()

    def _store_given(self) -> None:
        pass


class ForgetsDirtyPages(Exporter):
    def dirtied(self, gfns: object) -> None:
        self._expect(ExportPhase.COPYING, ExportPhase.STOPPED)


class RunsUntilToken(Exporter):
    @property
    def guest_may_run(self) -> bool:
        return self.phase is not ExportPhase.TOKEN_GIVEN and self.phase is not ExportPhase.MOVED


class BelievesAnyWord(Exporter):
    """Neither signature nor migration of a statement is looked at."""

    def take_statement(self, raw: bytes) -> None:
        self._expect(ExportPhase.TOKEN_GIVEN, ExportPhase.FINISHED)
        self.phase = ExportPhase.RETURNED if Word.ABANDONED.value.encode() in raw else ExportPhase.MOVED


class ReturnsByStarted(Exporter):
    """STARTED is taken for the end of the migration, not of the VM here."""

    def take_statement(self, raw: bytes) -> None:
        super().take_statement(raw)
        self.phase = ExportPhase.RETURNED


class SendsPlainPages(Exporter):
    def pages(self, gfns: Sequence[int]) -> bytes:
        return super().pages(gfns) + b"".join(bytes(self._read_page(gfn)) for gfn in gfns)


class StartsWithoutToken(Importer):
    def ready(self) -> bytes:
        record = super().ready()
        self.phase = ImportPhase.STARTED
        return record


class StartsAfterAbandoning(Importer):
    def take_token(self, raw: bytes) -> bytes:
        if self.phase is ImportPhase.ABANDONED:
            self.phase = ImportPhase.READY
        return super().take_token(raw)


class AbandonsAfterStart(Importer):
    """Its word says so, while the VM goes on."""

    def abandon(self) -> bytes:
        if self.phase is ImportPhase.STARTED:
            return sign(self._identity, Word.ABANDONED, self._session.session_id)
        return super().abandon()


class KeepsSharedPages(Importer):
    def _take_final(self, record: Record) -> None:
        kept = [bytes(self._frames.pages[gfn]) for gfn in range(len(self._versions))]  # type: ignore[attr-defined]
        super()._take_final(record)
        for gfn, state in enumerate(self.states):
            if GfnState(state) not in PRIVATE:
                self._frames.write(gfn, kept[gfn])


class KeepsWhatCame(Importer):
    def _wipe(self) -> None:
        self.phase = ImportPhase.ABANDONED


class AnySequence(RecordOpener):
    def open(self, raw: bytes | memoryview) -> Record:
        self._sequence = int.from_bytes(raw[8:16], "little")
        return super().open(raw)


class OneKeySealer(RecordSealer):
    """Every migration under the same key, and none named in what is sealed."""

    def __init__(self, key: bytes, session_id: bytes, direction: Direction, *, aead: MakeAead) -> None:
        super().__init__(bytes(len(key)), bytes(len(session_id)), direction, aead=aead)


class OneKeyOpener(RecordOpener):
    def __init__(self, key: bytes, session_id: bytes, direction: Direction, *, aead: MakeAead) -> None:
        super().__init__(bytes(len(key)), bytes(len(session_id)), direction, aead=aead)


def always_abandoned(ledger: Ledger, identity: Ed25519PrivateKey, session_id: bytes, live: object) -> bytes:
    return sign(identity, Word.ABANDONED, session_id)


FAULTS: list[tuple[Parts, str]] = [
    (Parts(exporter=CancelsAfterToken), "S6"),
    (Parts(exporter=ForgetsToken), "S6"),
    (Parts(exporter=ForgetsDirtyPages), "S3"),
    (Parts(exporter=RunsUntilToken), "S3"),
    (Parts(exporter=BelievesAnyWord), "S6"),
    (Parts(exporter=ReturnsByStarted), "S6"),
    (Parts(exporter=SendsPlainPages), "S1"),
    (Parts(importer=StartsWithoutToken), "S6"),
    (Parts(importer=StartsAfterAbandoning), "S3"),
    (Parts(importer=AbandonsAfterStart), "S6"),
    (Parts(importer=KeepsSharedPages), "S1"),
    (Parts(importer=KeepsWhatCame), "S1"),
    (Parts(opener=AnySequence), "S3"),
    (Parts(sealer=OneKeySealer, opener=OneKeyOpener), "S3"),
    (Parts(word_of_destination=always_abandoned), "S6"),
]


def _name(fault: Parts | str) -> str:
    if isinstance(fault, str):
        return fault
    plain: dict[str, Callable[..., object]] = vars(Parts())
    return next(str(part.__name__) for name, part in vars(fault).items() if part is not plain[name])


@pytest.mark.parametrize(("fault", "invariant"), FAULTS, ids=_name)
def test_a_fault_of_the_protocol_is_found(fault: Parts, invariant: str) -> None:
    with pytest.raises(Violation, match=f"^{invariant}: "):
        search(fault, LOST_ANSWER_AND_ORDER if fault.importer is AbandonsAfterStart else ONE_EVENT)
