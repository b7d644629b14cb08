"""Stores that kvm answers itself and of which the device hears by an event."""

from typing import Any

import pytest

from protocol import messages as m
from protocol.codes import HCode
from protocol.hcalls import H_LOGICAL_CI_STORE
from protocol.messages import Status
from services.kvm.user_space import MAX_DOORBELLS
from tests.unit.kvm_rig import KvmRig, kvm_rig
from tests.unit.ultravisor_rig import PlayedLink

NOTIFY = 1 << 45


class PlayedQemu(PlayedLink):
    """A qemu that notes what kvm sends."""

    peer_state = "up"

    def __init__(self) -> None:
        super().__init__()
        self.stores: list[m.MmioStoreBody] = []
        self.rung: list[m.MmioStoreBody] = []
        self.takes_events = True

    async def call_lasting(self, _message: Any, body: m.MmioStoreBody, _cause: int = 0) -> Status:  # noqa: ANN401
        """As Link.call_lasting."""
        self.stores.append(body)
        return Status(HCode.H_SUCCESS)

    def send_event(self, message: m.Message[Any, Any], body: m.MmioStoreBody, _cause: int = 0) -> bool:
        """As Link.send_event."""
        assert message is m.DOORBELL_RUNG
        if self.takes_events:
            self.rung.append(body)
        return self.takes_events


async def set_doorbell(rig: KvmRig, gpa: int, *, on: bool = True, size_bytes: int = 2) -> None:
    await rig.qemu.deliver(m.DOORBELL_SET, m.DoorbellBody(gpa, size_bytes, on))


async def store(rig: KvmRig, gpa: int, size_bytes: int = 2) -> None:
    assert await rig.hcall(H_LOGICAL_CI_STORE, size_bytes, gpa, 7) == HCode.H_SUCCESS


async def test_a_doorbell_is_answered_before_qemu_and_rung_in_order() -> None:
    qemu = PlayedQemu()
    with kvm_rig(qemu=qemu) as rig:
        await set_doorbell(rig, NOTIFY)
        await store(rig, NOTIFY)
        await store(rig, NOTIFY + 4)
    assert qemu.rung == [m.MmioStoreBody(NOTIFY, 2, 7)]
    assert qemu.stores == [m.MmioStoreBody(NOTIFY + 4, 2, 7)]


@pytest.mark.parametrize("size_bytes", [1, 4, 8])
async def test_a_store_of_another_width_is_an_exit(size_bytes: int) -> None:
    qemu = PlayedQemu()
    with kvm_rig(qemu=qemu) as rig:
        await set_doorbell(rig, NOTIFY)
        await store(rig, NOTIFY, size_bytes)
    assert not qemu.rung and len(qemu.stores) == 1


async def test_a_doorbell_taken_away_or_reset_is_an_exit_again() -> None:
    qemu = PlayedQemu()
    with kvm_rig(qemu=qemu) as rig:
        await set_doorbell(rig, NOTIFY)
        await set_doorbell(rig, NOTIFY, on=False)
        await store(rig, NOTIFY)
        await set_doorbell(rig, NOTIFY)
        await rig.qemu.deliver(m.VM_RESET, m.Empty())
        await store(rig, NOTIFY)
    assert not qemu.rung and len(qemu.stores) == 2


async def test_a_ring_that_cannot_be_sent_is_an_exit() -> None:
    """Nothing that a guest was told to be done is lost."""
    qemu = PlayedQemu()
    qemu.takes_events = False
    with kvm_rig(qemu=qemu) as rig:
        await set_doorbell(rig, NOTIFY)
        await store(rig, NOTIFY)
    assert len(qemu.stores) == 1


async def test_s5_a_hostile_qemu_cannot_make_kvm_remember_doorbells_without_end() -> None:
    qemu = PlayedQemu()
    with kvm_rig(qemu=qemu) as rig:
        for number in range(MAX_DOORBELLS + 1):
            await set_doorbell(rig, NOTIFY + 4 * number)
        await store(rig, NOTIFY + 4 * (MAX_DOORBELLS - 1))
        await store(rig, NOTIFY + 4 * MAX_DOORBELLS)
    assert (len(qemu.rung), len(qemu.stores)) == (1, 1)
