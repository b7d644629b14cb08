"""What a qemu that lies cannot do to kvm."""

from __future__ import annotations

import msgspec
import pytest

from protocol import messages as m
from protocol.codes import HCode
from protocol.errors import MalformedMessage
from tests.unit.kvm_rig import kvm_rig
from tests.unit.ultravisor_rig import MEMORY_BYTES


async def test_s5_a_processor_that_the_vm_does_not_have_is_not_started() -> None:
    with kvm_rig() as rig:
        assert (await rig.qemu.deliver(m.MEMSLOT_SET, m.MemslotBody(0, 0, MEMORY_BYTES))).code == HCode.H_SUCCESS

        assert (await rig.qemu.deliver(m.VM_START, m.StartBody(1, 0, {}))).code == HCode.H_PARAMETER

        assert "VCPU_START" not in rig.guest.names()
        assert (await rig.qemu.deliver(m.VM_START, m.StartBody(0, 0, {}))).code == HCode.H_SUCCESS


@pytest.mark.parametrize("number", [-1, 32, 1 << 63])
def test_s5_no_processor_is_started_with_a_register_that_it_does_not_have(number: int) -> None:
    body = msgspec.msgpack.encode(m.StartBody(0, 0x100, {3: 1, number: 2}))

    for message in (m.VM_START, m.VCPU_START, m.SVM_START):
        with pytest.raises(MalformedMessage):
            message.decode_body(body)
