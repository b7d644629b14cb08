"""Exits to a qemu that does not answer them."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing

from protocol import messages as m
from protocol.codes import HCode, RtasStatus
from protocol.declare import Call
from protocol.errors import PeerGone
from protocol.hcalls import H_LOGICAL_CI_LOAD, H_LOGICAL_CI_STORE, H_RTAS
from protocol.rtas import GET_TIME_OF_DAY, status_word
from services.kvm.user_space import DEVICE_SECONDS, EXIT_SECONDS
from tests.unit.kvm_rig import KvmRig, kvm_rig
from tests.unit.ultravisor_rig import PlayedLink

REGISTER = 1 << 45
BLOCK = 0x100
POWER_OFF = 0x1234
LONG_SECONDS = 60.0


class SilentQemu(PlayedLink):
    """A qemu whose service loop answers every ping, and no exit until `answer` is set."""

    peer = "vm1/qemu"
    peer_state = "up"

    def __init__(self) -> None:
        super().__init__()
        self.exits: list[str] = []
        self.answer = trio.Event()

    async def call_lasting(self, message: m.Message[Any, Any], _body: m.Body, _cause: int = 0) -> m.Body:
        """As Link.call_lasting."""
        self.exits.append(message.name)
        await self.answer.wait()
        return m.Status(HCode.H_SUCCESS)


class LostQemu(SilentQemu):
    """A qemu that is known to be dead, or takes no messages."""

    def __init__(self, state: str) -> None:
        super().__init__()
        self.peer_state = state

    async def call_lasting(self, _message: m.Message[Any, Any], _body: m.Body, _cause: int = 0) -> m.Body:
        """As Link.call_lasting."""
        raise PeerGone(self.peer, self.peer_state)


EXITS = [
    (H_LOGICAL_CI_LOAD, (4, REGISTER), "wall", EXIT_SECONDS),
    (H_LOGICAL_CI_LOAD, (4, REGISTER), "instructions", EXIT_SECONDS),
    (H_LOGICAL_CI_STORE, (4, REGISTER, 1), "wall", EXIT_SECONDS),
    (H_LOGICAL_CI_STORE, (4, REGISTER, 1), "instructions", DEVICE_SECONDS),
]


@pytest.mark.parametrize(("call", "args", "time", "seconds"), EXITS)
async def test_s5_an_exit_that_qemu_never_answers_is_an_error_to_the_guest_and_told(
    call: Call, args: tuple[int, ...], time: str, seconds: float, autojump_clock: object
) -> None:
    with structlog.testing.capture_logs() as logged, kvm_rig(qemu=SilentQemu(), time=time) as rig:
        began = trio.current_time()

        with trio.fail_after(LONG_SECONDS):
            assert await rig.hcall(call, *args) == HCode.H_HARDWARE

        assert trio.current_time() - began == pytest.approx(seconds)
    assert [line["peer"] for line in logged if line["event"] == "exit not answered"] == ["vm1/qemu"]


async def test_s5_an_rtas_call_that_qemu_never_answers_is_a_hardware_error(autojump_clock: object) -> None:
    with kvm_rig(qemu=SilentQemu()) as rig:
        rig.memory.ram[BLOCK : BLOCK + 16] = struct.pack(">IIII", POWER_OFF, 0, 1, 0)

        with trio.fail_after(LONG_SECONDS):
            assert await rig.hcall(H_RTAS, BLOCK) == HCode.H_SUCCESS

        (status,) = struct.unpack(">I", rig.memory.ram[BLOCK + 12 : BLOCK + 16])
        assert status == status_word(RtasStatus.HARDWARE_ERROR)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("unresponsive", RtasStatus.BUSY),
        ("dead", RtasStatus.HARDWARE_ERROR),
        ("closed", RtasStatus.HARDWARE_ERROR),
    ],
)
async def test_an_rtas_call_that_a_qemu_did_not_take_is_busy_and_the_guest_comes_again(
    state: str, status: RtasStatus
) -> None:
    """Linux would go on without the time of day after a hardware error, while busy is asked again."""
    with kvm_rig(qemu=LostQemu(state)) as rig:
        rig.memory.ram[BLOCK : BLOCK + 16] = struct.pack(">IIII", GET_TIME_OF_DAY, 0, 1, 0)

        assert await rig.hcall(H_RTAS, BLOCK) == HCode.H_SUCCESS

        assert rig.memory.ram[BLOCK + 12 : BLOCK + 16] == struct.pack(">I", status_word(status))


@pytest.mark.parametrize("state", ["debugged", "stopped", "unresponsive"])
async def test_nobody_loses_patience_with_a_qemu_that_is_held_up(state: str, autojump_clock: object) -> None:
    """It may have begun the access already, and a second one would be another."""
    qemu = SilentQemu()
    with kvm_rig(qemu=qemu) as rig:
        codes: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_store, rig, codes)
            await trio.sleep(EXIT_SECONDS / 2)
            rig.vm.user_space.qemu_is(state)
            nursery.start_soon(_store, rig, codes)
            await trio.sleep(100 * EXIT_SECONDS)
            assert codes == [] and len(qemu.exits) == 2

            rig.vm.user_space.qemu_is("running")
            await trio.sleep(EXIT_SECONDS / 2)
            qemu.answer.set()
        assert codes == [HCode.H_SUCCESS, HCode.H_SUCCESS]


async def _store(rig: KvmRig, codes: list[int]) -> None:
    codes.append(await rig.hcall(H_LOGICAL_CI_STORE, 4, REGISTER, 1))
