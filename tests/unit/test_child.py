"""What the launcher sends to a process of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from deploy.child import Child
from deploy.states import ProcessState
from protocol import control
from protocol.errors import PeerGone


class PlayedChannel:
    """Takes what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, packet: control.ToProcess) -> None:
        self.sent.append(packet)


@pytest.mark.parametrize("state", [ProcessState.STOPPED, ProcessState.UNRESPONSIVE])
async def test_a_process_that_stands_still_lets_go_of_a_vm_when_it_goes_on(state: ProcessState) -> None:
    """Else a VM that has moved away would stay with it for ever."""
    channel = PlayedChannel()
    child = Child(cast(Any, SimpleNamespace(target="alpha/kvm")), 1, cast(Any, channel))
    child.state = state

    with pytest.raises(PeerGone, match=f"alpha/kvm is {state.value}"):
        await child.remove_vm("vm1", 1)

    ((order, vm),) = [(packet.id, packet.vm) for packet in channel.sent if isinstance(packet, control.RemoveVm)]
    assert vm == "vm1"
    child.answered(control.Answer(order))


async def test_a_process_that_has_ended_is_told_nothing() -> None:
    channel = PlayedChannel()
    child = Child(cast(Any, SimpleNamespace(target="alpha/kvm")), 1, cast(Any, channel))
    child.state = ProcessState.FAILED
    child.exited.set()

    with pytest.raises(PeerGone):
        await child.remove_vm("vm1", 1)

    assert not channel.sent
