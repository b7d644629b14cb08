"""A qemu process that lies, in a real cluster: the queue ends in a named error, everything else lives on, S1 holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, Vm, cluster, processes_of
from deploy.demo_evidence import Evidence, take_evidence
from protocol.codes import HCode
from protocol.roles import Role
from services.guest.model.virtqueue import QueueError
from services.kvm.user_space import DEVICE_SECONDS, EXIT_SECONDS
from tests.attack.hostile.qemu import FLOOD_SECONDS, Lie
from tests.cluster.conftest import own_directories
from tests.cluster.vm_files import answer_of, console_end, console_until, console_while, make_vm_files

__all__ = ["own_directories"]

pytestmark = pytest.mark.cold

HOSTILE = "tests.attack.hostile.{role}"
UP = "pefbox: secrets planted"
PROMPT_SECONDS = 2.0
ANSWER_LIMIT_SECONDS = 2.0
ANSWER_SECONDS = 20.0

QUEUE_ERRORS = {
    Lie.BAD_ID: QueueError.BAD_ID,
    Lie.NOT_A_HEAD: QueueError.NOT_A_HEAD,
    Lie.LENGTH: QueueError.USED_LENGTH,
    Lie.JUMP: QueueError.INDEX_JUMP,
    Lie.BACK: QueueError.INDEX_JUMP,
    Lie.SILENT: QueueError.NO_ANSWER,
    Lie.GARBAGE: QueueError.INDEX_JUMP,
    Lie.DEAF: QueueError.NO_ANSWER,
    Lie.MMIO_GONE: QueueError.NO_DEVICE,
    Lie.MMIO_MALFORMED: QueueError.NO_DEVICE,
    Lie.HELD: QueueError.NO_DEVICE,
}
_SECRET = re.compile(r"secret (\S+) ([0-9a-f]{64})")


KICK_IS_A_CALL = (Lie.MMIO_GONE, Lie.MMIO_MALFORMED, Lie.HELD)
"""With the clock `wall` a kick is a doorbell that kvm answers, so there these lies cannot be told."""
CASES = [(lie, "instructions" if lie in KICK_IS_A_CALL else "wall") for lie in QUEUE_ERRORS]
CASES += [(Lie.SILENT, "instructions"), (Lie.JUMP, "instructions")]


@pytest.mark.parametrize(("lie", "time"), CASES, ids=lambda value: getattr(value, "name", value))
async def test_a_lie_ends_the_queue_by_name_and_nothing_else(tmp_path: Path, lie: Lie, time: str) -> None:
    files = make_vm_files(tmp_path, vm=f'time = "{time}"', guest='workload = "demo"')
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=HOSTILE, record=True) as running:
        vm = running.vm("vm1")
        await console_until(vm, UP)
        await vm.qemu.query("lie", {"what": lie.name})

        with trio.fail_after(PROMPT_SECONDS + patience_seconds(lie)):
            answer = await ask(vm, "hash")

        assert answer.removesuffix("; the device does not answer") == f"error queue 0: {QUEUE_ERRORS[lie].value}"
        await check_alive(running)
        await check_secrets(running)


def patience_seconds(lie: Lie) -> float:
    """How long guest or kvm waits for a device before it is given up."""
    if lie is Lie.HELD:
        # The kick, and the store that tells the device that its driver gave up.
        return 2 * DEVICE_SECONDS
    return ANSWER_LIMIT_SECONDS if QUEUE_ERRORS[lie] is QueueError.NO_ANSWER else 0.0


async def test_l1_exits_that_are_never_answered_are_told_and_the_guest_goes_on(tmp_path: Path) -> None:
    files = make_vm_files(tmp_path, guest='workload = "demo"')
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=HOSTILE) as running:
        vm = running.vm("vm1")
        await console_until(vm, UP)
        await vm.qemu.query("lie", {"what": Lie.HELD.name})

        with trio.fail_after(PROMPT_SECONDS + EXIT_SECONDS):
            await ask(vm, "reboot")

        assert '"exit not answered"' in running.process("alpha/kvm").log()
        await check_alive(running)


async def test_a_device_of_which_every_register_is_wrong_is_given_up_and_the_vm_comes_up_without(
    tmp_path: Path,
) -> None:
    files = make_vm_files(tmp_path, guest='workload = "demo"')
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=HOSTILE) as running:
        vm = running.vm("vm1")
        await console_until(vm, UP)
        await vm.qemu.query("lie", {"what": Lie.MMIO_GARBAGE.name})
        since = await console_end(vm)
        await vm.console_write(b"reboot\r")

        text = await console_until(vm, "this is the boot stage", since=since)

        assert "pefbox: disk: the device does not finish its reset" in text
        assert answer_of(await vm.console_command("hash")).startswith("error the device does not finish its reset")
        await vm.qemu.query("lie", {"what": Lie.NONE.name})
        await vm.console_write(b"reboot\r")
        await console_until(vm, UP, since=await console_end(vm))
        await check_alive(running)


async def test_a_flood_of_interrupts_leaves_guest_kvm_and_ultravisor_at_work(tmp_path: Path) -> None:
    files = make_vm_files(tmp_path, guest='workload = "demo"')
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=HOSTILE) as running:
        vm = running.vm("vm1")
        await console_until(vm, UP)
        await vm.qemu.query("lie", {"what": Lie.FLOOD.name})

        with trio.fail_after(FLOOD_SECONDS):
            assert answer_of(await vm.console_command("pages")).startswith("ok free=")
        assert answer_of(await vm.console_command("hash")).startswith("ok ")
        assert {row.state for row in processes_of(await running.status())} == {"running"}
        await check_alive(running)


async def test_a_qemu_that_has_every_frame_of_a_secure_vm_discarded_gets_none(tmp_path: Path) -> None:
    files = make_vm_files(tmp_path, guest='workload = "demo"')
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=HOSTILE, record=True) as running:
        vm, kvm = running.vm("vm1"), running.process("alpha/kvm")
        await console_until(vm, UP)
        before = (await kvm.query("vm.status", {"vm": "vm1"}))["pages"]

        codes = (await vm.qemu.query("discard", seconds=5))["codes"]

        assert set(codes) == {int(HCode.H_PERMISSION)}
        assert (await kvm.query("vm.status", {"vm": "vm1"}))["pages"] == before
        assert kvm.log().count('"discard refused"') == 1
        assert answer_of(await vm.console_command("hash")).startswith("ok ")
        await check_alive(running)
        await check_secrets(running)


async def ask(vm: Vm, line: str) -> str:
    """The answer to `line`, as soon as it is there."""
    since = await console_end(vm)
    await vm.console_write(line.encode() + b"\r")
    text = await console_while(vm, lambda text: not text.endswith("\n> "), "answer", ANSWER_SECONDS, since)
    return answer_of(text)


async def check_alive(running: RunningCluster) -> None:
    """Guest, kvm and ultravisor answer, and the VM is still secure."""
    vm = running.vm("vm1")
    assert answer_of(await vm.console_command("pages")).startswith("ok free=")
    row = await vm.row()
    assert (row.secure, row.state) == (True, "running")
    assert {row.state for row in processes_of(await running.status())} == {"running"}
    for target in ("alpha/kvm", "alpha/ultravisor"):
        assert "Traceback" not in running.process(target).log()


async def check_secrets(running: RunningCluster) -> None:
    """S1: nothing of what the guest planted is where the host can see it, but for what it shared (the control)."""
    rows = {row.target: row for row in processes_of(await running.status())}
    host_side = {t: row.pid for t, row in rows.items() if row.role in (Role.KVM.value, Role.QEMU.value)}
    for target in host_side:
        await running.process(target).query("record", {"on": False})
    evidence: Evidence = await trio.to_thread.run_sync(take_evidence, running.paths, host_side)
    secrets = dict(_SECRET.findall(await running.vm("vm1").console_command("reveal")))
    places = evidence.where({name: bytes.fromhex(value) for name, value in secrets.items()})
    assert len(places) == 5
    assert places.pop("marker")
    assert not any(places.values()), places
