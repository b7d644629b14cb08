"""A real ultravisor whose secure VM a played kvm and qemu save and restore, step by step (S1, S3, S5, S6, S7)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol import ucalls as u
from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.errors import HostFault
from protocol.messages import SVM_FREEZE, SVM_LOAD, SVM_START
from services.testing.image import PlayedImage
from services.ultravisor.migration.handshake import Host
from services.ultravisor.migration.ledger import Entry, LedgerTorn
from shared.memfd import SealedMemory
from shared.migration_policy import POLICY_FILE
from tests.unit.migration_pair import debuggable, make_host
from tests.unit.test_migration_calls import DIRTY_OFFSET, KERNEL, Refused, fetch, give, step
from tests.unit.ultravisor_rig import LPID, N_PAGES, UltravisorRig, played_image, ultravisor_rig

SECRET = b"the secret of this secure VM: 4711"
SECRET_GFN, SHARED_GFN = 41, 40
Saved = list[bytes]
"""The head, and the records behind it."""


async def save(rig: UltravisorRig) -> Saved:
    """All of a snapshot but its last step."""
    pieces = [await fetch(rig, u.UV_SAVE_BEGIN), await fetch(rig, u.UV_EXPORT_STOP, DIRTY_OFFSET)]
    while (results := await step(rig, u.UV_EXPORT_PAGES, 0))[0]:
        pieces.append(rig.stream.read(0, results[0]))
    more = 1
    while more:
        n_bytes, more = await step(rig, u.UV_EXPORT_STATE, 0)
        pieces.append(rig.stream.read(0, n_bytes))
    return pieces


async def restore(rig: UltravisorRig, saved: Saved) -> None:
    """All of a restore; raises Refused."""
    await give(rig, u.UV_RESTORE_BEGIN, saved[0])
    checked = [(await give(rig, u.UV_IMPORT_RECORD, record))[0] for record in saved[1:]]
    assert checked[-1] == 1
    await step(rig, u.UV_IMPORT_READY, 0)
    await step(rig, u.UV_RESTORE_START, 0)
    await trio.testing.wait_all_tasks_blocked()


def reason(rig: UltravisorRig, event: str = "restore-refused") -> str:
    """The operator's of the last refusal."""
    return str(rig.audited(event)[-1]["reason"])


@dataclass
class Machine:
    """One host over several incarnations of its VM: identity and ledger stay."""

    nursery: trio.Nursery
    key: RSAPrivateKey
    image: PlayedImage
    host: Host
    ledger_fd: int
    marks: list[SealedMemory]

    @contextmanager
    def booted(self, *, restoring: bool = False, host: Host | None = None) -> Iterator[UltravisorRig]:
        with ultravisor_rig(
            self.nursery, self.key, host=host or self.host, ledger_fd=self.ledger_fd, restoring=restoring
        ) as rig:
            self.marks.append(SealedMemory("dirty", N_PAGES, others_write=True))
            rig.partition.take_dirty_map(os.dup(self.marks[-1].fd))
            yield rig

    @contextmanager
    def restoring(self, host: Host | None = None) -> Iterator[UltravisorRig]:
        with self.booted(restoring=True, host=host) as rig:
            yield rig

    async def secure(self, rig: UltravisorRig) -> None:
        await rig.secure(self.image)
        rig.page(SECRET_GFN)[: len(SECRET)] = SECRET
        assert not await rig.share(SHARED_GFN)

    async def saved(self) -> Saved:
        """A snapshot of a secure VM that was just booted."""
        with self.booted() as rig:
            rig.life.void_snapshots("vm1")
            await self.secure(rig)
            pieces = await save(rig)
            await step(rig, u.UV_SAVE_COMMIT, 0)
            return pieces


@pytest.fixture
async def machine(nursery: trio.Nursery, key: RSAPrivateKey) -> AsyncIterator[Machine]:
    ledger_fd = os.memfd_create("ledger", os.MFD_CLOEXEC)
    image = played_image(key, KERNEL, {"secret": b"the key of the disk"})
    made = Machine(nursery, key, image, make_host("alpha"), ledger_fd, [])
    yield made
    os.close(ledger_fd)
    for marks in made.marks:
        marks.close()


async def refused(rig: UltravisorRig, call: Call, message: bytes = b"") -> UCode:
    """The code of a step that is refused."""
    with pytest.raises(Refused) as error:
        await (give(rig, call, message) if message else step(rig, call, 0))
    return error.value.code


# -- all goes well -----------------------------------------------------------------------------------------------


async def test_a_secure_vm_goes_on_out_of_its_snapshot_with_pages_processor_and_files(machine: Machine) -> None:
    saved = await machine.saved()

    with machine.restoring() as rig:
        await restore(rig, saved)

        assert rig.partition.secure
        assert bytes(rig.page(SECRET_GFN)[: len(SECRET)]) == SECRET
        assert rig.state(SHARED_GFN) == "SHARED_INV"
        assert rig.guest.names() == ["SVM_LOAD", "SVM_THAW"]
        assert rig.life.files[LPID].peek("secret") == b"the key of the disk"
        assert [line.event for line in rig.audit()] == ["restore-begun", "restored"]
        await step(rig, u.UV_RESTORE_START, 0)
        assert len(rig.audited("restored")) == 1


async def test_nothing_of_it_stays_where_it_was_saved(machine: Machine) -> None:
    with machine.booted() as rig:
        await machine.secure(rig)
        await save(rig)
        await step(rig, u.UV_SAVE_COMMIT, 0)

        assert rig.partition.svm is None
        assert rig.account.used_bytes == 0
        assert rig.guest.names()[-1] == "SVM_ENDED"
        assert rig.audited("snapshot-taken")
        assert rig.audited("svm-terminated") == [{"reason": "saved"}]
        await step(rig, u.UV_SAVE_COMMIT, 0)
        assert len(rig.audited("snapshot-taken")) == 1


async def test_s1_no_byte_that_the_vm_wrote_is_in_the_snapshot_in_plain(machine: Machine) -> None:
    saved = b"".join(await machine.saved())

    for secret in (SECRET, b"registers", b"the key of the disk", KERNEL[:32]):
        assert secret not in saved


async def test_a_vm_that_may_go_nowhere_can_be_saved_all_the_same(machine: Machine) -> None:
    machine.image = played_image(machine.key, KERNEL, {POLICY_FILE: b'{"may_migrate": false}'})
    saved = await machine.saved()

    with machine.restoring() as rig:
        await restore(rig, saved)
        assert await refused(rig, u.UV_EXPORT_OFFER) is UCode.U_PERMISSION
        assert "may not migrate" in reason(rig, "migration-refused")


# -- it stays ------------------------------------------------------------------------------------------------------


async def test_a_snapshot_that_is_cancelled_leaves_the_vm_running_and_cannot_be_restored(machine: Machine) -> None:
    with machine.booted() as rig:
        await machine.secure(rig)
        pieces = await save(rig)
        await step(rig, u.UV_EXPORT_CANCEL, 0)

        assert rig.partition.secure
        assert rig.guest.names()[-1] == "SVM_THAW"
        assert rig.audited("snapshot-cancelled")
        assert await refused(rig, u.UV_SAVE_COMMIT) is UCode.U_STATE
    with machine.restoring() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, pieces[0]) is UCode.U_PERMISSION
        assert "not completed" in reason(rig)
        assert rig.account.used_bytes == 0


async def test_a_guest_that_does_not_stand_still_is_not_saved_yet(machine: Machine) -> None:
    with machine.booted() as rig:
        await machine.secure(rig)
        rig.guest.codes[SVM_FREEZE.number] = HCode.H_BUSY
        await fetch(rig, u.UV_SAVE_BEGIN)
        with pytest.raises(Refused) as error:
            await step(rig, u.UV_EXPORT_STOP, 0, DIRTY_OFFSET)
        assert error.value.code is UCode.U_RETRY
        assert await refused(rig, u.UV_SAVE_COMMIT) is UCode.U_STATE
        assert rig.partition.secure


async def test_a_guest_that_cannot_be_saved_goes_on_and_the_operator_hears_why(machine: Machine) -> None:
    with machine.booted() as rig:
        await machine.secure(rig)
        rig.guest.codes[SVM_FREEZE.number] = HCode.H_FUNCTION
        await fetch(rig, u.UV_SAVE_BEGIN)
        with pytest.raises(Refused, match="UV_EXPORT_STOP: U_PERMISSION"):
            await step(rig, u.UV_EXPORT_STOP, 0, DIRTY_OFFSET)
        assert "the guest cannot be saved" in reason(rig, "snapshot-refused")
        assert "the guest cannot be saved" in str(rig.partition.migration_refusal)
        await step(rig, u.UV_EXPORT_CANCEL, 0)
        await fetch(rig, u.UV_SAVE_BEGIN)
        assert rig.partition.migration_refusal is None


async def until_asked(rig: UltravisorRig, name: str) -> None:
    """Returns once the ultravisor has asked the guest so; what it does in a thread comes before."""
    with trio.fail_after(5):
        while True:
            if name in rig.guest.names():
                return
            await trio.sleep(0.001)


@pytest.mark.parametrize("call", [u.UV_SAVE_BEGIN, u.UV_EXPORT_OFFER])
async def test_a_guest_that_is_just_being_started_is_neither_saved_nor_moved_yet(machine: Machine, call: Call) -> None:
    """It is secure for its ultravisor already, and has no state that could be saved."""
    machine.image = played_image(machine.key, KERNEL, {POLICY_FILE: b'{"may_migrate": true}'})
    with machine.booted() as rig:
        started = rig.guest.held[SVM_START.number] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.secure, machine.image)
            await until_asked(rig, "SVM_START")
            assert rig.partition.secure
            assert await refused(rig, call) is UCode.U_RETRY
            started.set()
        await step(rig, call, 0)


async def test_a_snapshot_is_no_migration_and_a_second_one_waits(machine: Machine) -> None:
    with machine.booted() as rig:
        await machine.secure(rig)
        await save(rig)
        for call, message in ((u.UV_SAVE_BEGIN, b""), (u.UV_EXPORT_OFFER, b""), (u.UV_EXPORT_READY, b"ready")):
            assert await refused(rig, call, message) is UCode.U_STATE
        await step(rig, u.UV_SAVE_COMMIT, 0)
        assert await refused(rig, u.UV_EXPORT_CANCEL) is UCode.U_STATE


# -- decisions -----------------------------------------------------------------------------------------------------


async def test_s6_a_commit_that_cannot_be_stored_is_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.booted() as rig:
        await machine.secure(rig)
        await save(rig)
        monkeypatch.setattr(rig.ledger, "record", failing(HostFault("no space")))
        assert await refused(rig, u.UV_SAVE_COMMIT) is UCode.U_PERMISSION
        assert "cannot be stored" in reason(rig, "snapshot-refused")
        assert rig.partition.secure
        await step(rig, u.UV_EXPORT_CANCEL, 0)
        assert rig.guest.names()[-1] == "SVM_THAW"


async def test_s6_a_commit_that_may_be_stored_keeps_the_vm_still_until_the_snapshot_is_void(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine.booted() as rig:
        await machine.secure(rig)
        pieces = await save(rig)
        store = rig.ledger.record
        monkeypatch.setattr(rig.ledger, "record", storing_then(store, LedgerTorn("torn")))
        assert await refused(rig, u.UV_SAVE_COMMIT) is UCode.U_PERMISSION
        monkeypatch.setattr(rig.ledger, "record", failing(LedgerTorn("torn")))
        assert await refused(rig, u.UV_EXPORT_CANCEL) is UCode.U_RETRY
        assert "SVM_THAW" not in rig.guest.names()
        monkeypatch.setattr(rig.ledger, "record", store)
        await step(rig, u.UV_EXPORT_CANCEL, 0)
        assert rig.guest.names()[-1] == "SVM_THAW"
    with machine.restoring() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, pieces[0]) is UCode.U_PERMISSION
        assert "started again since" in reason(rig)


async def test_s6_a_start_that_cannot_be_stored_does_not_happen_and_may_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = await machine.saved()
    with machine.restoring() as rig:
        monkeypatch.setattr(rig.ledger, "record", failing(HostFault("no space")))
        with pytest.raises(Refused, match="UV_RESTORE_START: U_PERMISSION"):
            await restore(rig, saved)
        await step(rig, u.UV_IMPORT_ABANDON, 0)
        assert not rig.partition.secure
        assert "SVM_THAW" not in rig.guest.names()
        assert rig.account.used_bytes == 0
    with machine.restoring() as rig:
        await restore(rig, saved)
        assert rig.partition.secure


async def test_s6_a_start_that_may_be_stored_uses_the_snapshot_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = await machine.saved()
    with machine.restoring() as rig:
        monkeypatch.setattr(rig.ledger, "record", storing_then(rig.ledger.record, LedgerTorn("torn")))
        with pytest.raises(Refused, match="UV_RESTORE_START"):
            await restore(rig, saved)
        await step(rig, u.UV_IMPORT_ABANDON, 0)
        assert not rig.partition.secure
    with machine.restoring() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, saved[0]) is UCode.U_PERMISSION
        assert "restored already" in reason(rig)


def failing(error: Exception) -> Callable[[Entry], None]:
    """A ledger on a full disk."""

    def record(_entry: Entry) -> None:
        raise error

    return record


def storing_then(store: Callable[[Entry], None], error: Exception) -> Callable[[Entry], None]:
    """A ledger that stores, and cannot tell."""

    def record(entry: Entry) -> None:
        store(entry)
        raise error

    return record


# -- rollback ------------------------------------------------------------------------------------------------------


async def test_s6_a_snapshot_is_restored_once(machine: Machine) -> None:
    saved = await machine.saved()
    with machine.restoring() as rig:
        await restore(rig, saved)
        assert await refused(rig, u.UV_RESTORE_BEGIN, saved[0]) is UCode.U_PERMISSION
    with machine.restoring() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, saved[0]) is UCode.U_PERMISSION
        assert "restored already" in reason(rig)


async def test_s3_an_older_snapshot_is_refused(machine: Machine) -> None:
    first = await machine.saved()
    with machine.restoring() as rig:
        await restore(rig, first)
        second = await save(rig)
        await step(rig, u.UV_SAVE_COMMIT, 0)
    with machine.restoring() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, first[0]) is UCode.U_PERMISSION
        await restore(rig, second)
        assert bytes(rig.page(SECRET_GFN)[: len(SECRET)]) == SECRET


async def test_s3_a_vm_that_was_started_again_is_not_restored(machine: Machine) -> None:
    first = await machine.saved()
    second = await machine.saved()

    with machine.restoring() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, first[0]) is UCode.U_PERMISSION
        assert "started again since" in reason(rig)
        await restore(rig, second)


async def test_s3_a_normal_vm_that_turns_secure_ends_what_could_be_restored(machine: Machine) -> None:
    """Its host said that it would be restored, and booted it."""
    saved = await machine.saved()
    with machine.restoring() as rig:
        await machine.secure(rig)
        assert rig.audited("snapshot-void") == [{"snapshots": 1, "reason": "the VM is started again"}]
    with machine.restoring() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, saved[0]) is UCode.U_PERMISSION


async def test_s6_a_vm_does_not_turn_secure_while_that_cannot_be_stored(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await machine.saved()
    with machine.restoring() as rig:
        monkeypatch.setattr(rig.ledger, "record", failing(HostFault("no space")))
        rig.load(machine.image)
        assert await rig.esm(machine.image)
        assert rig.audited("esm-refused") == [{"reason": "no space"}]


async def test_s6_another_ultravisor_restores_nothing(machine: Machine) -> None:
    saved = await machine.saved()
    with machine.restoring(make_host("beta")) as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, saved[0]) is UCode.U_PERMISSION
        assert "taken by another ultravisor" in reason(rig)


async def test_s6_what_may_be_started_otherwise_is_not_restored(machine: Machine) -> None:
    """The launcher's word counts: this incarnation boots, or arrives."""
    saved = await machine.saved()
    with machine.booted() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, saved[0]) is UCode.U_PERMISSION
        assert "not being restored" in reason(rig)


async def test_a_ledger_that_forgot_restores_nothing(machine: Machine) -> None:
    saved = await machine.saved()
    os.ftruncate(machine.ledger_fd, 0)
    with machine.restoring() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, saved[0]) is UCode.U_PERMISSION
        assert "not completed" in reason(rig)


async def test_a_debuggable_host_restores_only_what_allowed_it_or_was_saved_there(machine: Machine) -> None:
    saved = await machine.saved()
    with machine.restoring(debuggable(machine.host)) as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, saved[0]) is UCode.U_PERMISSION
        assert "debugger" in reason(rig)
    with machine.restoring() as rig:
        await restore(rig, saved)

    machine.image = played_image(machine.key, KERNEL, {POLICY_FILE: b'{"to_debuggable": true}'})
    allowed = await machine.saved()
    with machine.restoring(debuggable(machine.host)) as rig:
        await restore(rig, allowed)
    machine.host = debuggable(machine.host)
    there = await machine.saved()
    with machine.restoring() as rig:
        await restore(rig, there)


# -- what was altered ----------------------------------------------------------------------------------------------


async def test_s3_records_of_two_snapshots_of_the_vm_do_not_mix(machine: Machine) -> None:
    with machine.booted() as rig:
        await machine.secure(rig)
        old = await save(rig)
        await step(rig, u.UV_EXPORT_CANCEL, 0)
        new = await save(rig)
        await step(rig, u.UV_SAVE_COMMIT, 0)
    for index in range(1, len(new)):
        with machine.restoring() as rig:
            mixed = [*new[:index], old[index], *new[index + 1 :]]
            with pytest.raises(Refused, match="UV_IMPORT_RECORD: U_PERMISSION"):
                await restore(rig, mixed)
            assert "altered" in reason(rig)
            await step(rig, u.UV_IMPORT_ABANDON, 0)
            assert rig.account.used_bytes == 0
            assert not rig.guest.names()
    with machine.restoring() as rig:
        await restore(rig, new)


async def test_s3_a_snapshot_that_lost_its_end_is_not_ready(machine: Machine) -> None:
    saved = await machine.saved()
    with machine.restoring() as rig:
        await give(rig, u.UV_RESTORE_BEGIN, saved[0])
        for record in saved[1:-1]:
            assert await give(rig, u.UV_IMPORT_RECORD, record) == [0]
        assert await refused(rig, u.UV_IMPORT_READY) is UCode.U_STATE
        assert await refused(rig, u.UV_RESTORE_START) is UCode.U_STATE


@pytest.mark.parametrize("at", [0, 1, 5, 40, 70, 80, -2, -1])
async def test_s3_a_head_that_was_altered_opens_nothing(machine: Machine, at: int) -> None:
    saved = await machine.saved()
    head = bytearray(saved[0])
    head[at] ^= 1
    with machine.restoring() as rig:
        assert await refused(rig, u.UV_RESTORE_BEGIN, bytes(head)) is UCode.U_PERMISSION
        assert reason(rig)


async def test_s5_malformed_heads_are_a_code_and_a_line(machine: Machine) -> None:
    with machine.restoring() as rig:
        for head in (b"\xc0", b"x" * 100, b"\x96\x01", os.urandom(16 << 10)):
            assert await refused(rig, u.UV_RESTORE_BEGIN, head) is UCode.U_PERMISSION
        assert (await rig.kvm.deliver(u.UV_RESTORE_BEGIN, [LPID, 0, 1 << 20]))[0] == UCode.U_PERMISSION
        assert (await rig.kvm.deliver(u.UV_RESTORE_BEGIN, [LPID, 1 << 60, 4]))[0] == UCode.U_PARAMETER


async def test_a_guest_that_does_not_take_its_state_ends_the_restore_and_not_the_snapshot(machine: Machine) -> None:
    saved = await machine.saved()
    with machine.restoring() as rig:
        rig.guest.codes[SVM_LOAD.number] = HCode.H_PARAMETER
        with pytest.raises(Refused, match="UV_IMPORT_READY"):
            await restore(rig, saved)
        await step(rig, u.UV_IMPORT_ABANDON, 0)
        assert rig.audited("restore-abandoned")
        assert rig.account.used_bytes == 0
    with machine.restoring() as rig:
        await restore(rig, saved)


async def test_a_host_without_an_identity_saves_nothing(machine: Machine) -> None:
    with ultravisor_rig(machine.nursery, machine.key) as rig:
        await machine.secure(rig)
        assert await refused(rig, u.UV_SAVE_BEGIN) is UCode.U_PERMISSION
        assert "no identity" in reason(rig, "snapshot-refused")


async def test_s3_a_snapshot_of_another_vm_is_refused(machine: Machine) -> None:
    saved = await machine.saved()
    with machine.restoring() as rig:
        rig.partition.entry = msgspec.structs.replace(rig.partition.entry, name="vm2")
        assert await refused(rig, u.UV_RESTORE_BEGIN, saved[0]) is UCode.U_PERMISSION
