"""One bus with devices of every kind at once, driven by the model kernel: each reaches memory in its own way.

A virtio-blk that bypasses the windows, a virtio-rng that demands ACCESS_PLATFORM, an edu on the windows of the bus, and
one with windows of its own. What was mapped where is taken from the recorded hypercalls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from deploy.api import RunningCluster, Vm, cluster
from deploy.trace.reader import FrameReader
from protocol.hcalls import H_PUT_TCE
from protocol.wire import MessageKind, decode
from services.guest.model.virtqueue import QueueError
from shared.tce import PERMISSION_MASK
from tests.cluster.vm_files import PROMPT, VmFiles, answer_of, console_until, make_vm_files

BUS, OWN = 0x80000000, 0x80000008
WIDE_BASE = 0x800000000000000
BUS_EDU, OWN_EDU = 0, 1
N_BYTES = 4096

_DEVICES = """
[[vms.vm1.devices]]
kind = "virtio-blk"
disk = "root"
{disk}

[[vms.vm1.devices]]
kind = "virtio-rng"
access_platform = true
bypass_switch = false

[[vms.vm1.devices]]
kind = "edu"
name = "shared"

[[vms.vm1.devices]]
kind = "edu"
name = "own"
iommu_domain = "own"
"""
UNTRANSLATED = "access_platform = false\nbypass_switch = false"
BYPASSED = "access_platform = true\nbypass_switch = true"


@dataclass(frozen=True)
class Case:
    """A design, what the disk offers, and how disk and virtio-rng are given their buffers then.

    `disk` is None where a secure VM of this design gets no disk.
    """

    design: str
    offer: str
    disk: str | None
    rng: str


CASES = [
    Case("quirk", UNTRANSLATED, "guest addresses", f"window of liobn {BUS:#x}"),
    Case("bypass-property", BYPASSED, "guest addresses", f"window of liobn {BUS:#x}"),
    Case("ddw-identity", UNTRANSLATED, None, f"guest addresses plus {WIDE_BASE:#x}"),
]


def files_for(directory: Path, case: Case, *, secure: bool) -> VmFiles:
    guest = f'dma = "{case.design}"\ncommand_line = "svm={"on" if secure else "off"}"'
    return make_vm_files(directory, guest=guest, extra=_DEVICES.format(disk=case.offer))


async def ask(vm: Vm, line: str) -> str:
    return answer_of(await vm.console_command(line))


def stored_tces(running: RunningCluster) -> dict[tuple[int, int], int]:
    """What every H_PUT_TCE that kvm was asked for maps last: (liobn, ioba) to TCE."""
    stored = {}
    for entry in FrameReader(running.paths.trace_file("alpha/kvm")).read():
        envelope = decode(entry.frame)
        is_call = envelope.number == H_PUT_TCE.number and envelope.kind is MessageKind.CALL
        if is_call and entry.direction == "in":
            liobn, ioba, tce = msgspec.msgpack.decode(envelope.body)[-3:]
            if tce & PERMISSION_MASK:
                stored[liobn, ioba] = tce
    return stored


def addresses_in(answer: str) -> list[int]:
    return [int(word, 16) for word in re.findall(r"0x[0-9a-f]+(?=,| of)", answer)]


def faults_in(vm: Vm) -> list[str]:
    return [line for line in vm.qemu.log().splitlines() if "device fault" in line]


@pytest.mark.parametrize("secure", [False, True], ids=["normal", "secure"])
@pytest.mark.parametrize("case", CASES, ids=[case.design for case in CASES])
async def test_every_kind_of_device_works_beside_the_others_on_one_bus(
    tmp_path: Path, case: Case, secure: bool
) -> None:
    files = files_for(tmp_path, case, secure=secure)
    async with cluster(files.cluster_file, state_dir=files.state_dir, record=True) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)
        assert (await vm.row()).secure is secure
        bounced = ", bounced" if secure else ""
        disk_works = case.disk is not None or not secure

        ways = (await ask(vm, "dma")).removeprefix("ok ").split("; ")
        edus = [f"edu 0 window of liobn {BUS:#x}{bounced}", f"edu 1 window of liobn {OWN:#x}{bounced}"]
        assert ways[-3:] == [f"rng {case.rng}{bounced}", *edus]
        if case.disk is not None:
            assert ways[0] == f"disk {case.disk}{bounced}"

        if disk_works:
            assert await ask(vm, "hash") == f"ok {files.sha256()} {files.layout.size_bytes}"
        else:
            assert await ask(vm, "hash") == f"error queue 0: {QueueError.NO_ANSWER.value}"
        assert (await ask(vm, "rng 4096")).startswith("ok 4096 ")
        given = {}
        for number, liobn in ((BUS_EDU, BUS), (OWN_EDU, OWN)):
            answer = await ask(vm, f"edu {number} {N_BYTES}")
            assert answer.startswith(f"ok {N_BYTES} bytes came back, by 0x")
            assert answer.endswith(f" of liobn {liobn:#x}")
            given[liobn] = addresses_in(answer)
        if disk_works:
            assert (await ask(vm, "write")).startswith("ok ")
            assert await ask(vm, "hash") == f"ok {files.sha256()} {files.layout.size_bytes}"
            assert faults_in(vm) == []

        await running.process("alpha/kvm").query("record", {"on": False})
        stored = stored_tces(running)
        for liobn, (out, back) in given.items():
            assert stored[liobn, out & -4096] and stored[liobn, back & -4096]
            assert (BUS + OWN - liobn, out & -4096) not in stored, "a bus address of one domain alone"


@pytest.mark.parametrize("secure", [False, True], ids=["normal", "secure"])
async def test_an_address_of_another_domain_is_a_named_fault_and_harms_no_other_device(
    tmp_path: Path, secure: bool
) -> None:
    files = files_for(tmp_path, CASES[0], secure=secure)
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        wrong = {
            ("shared", BUS): await ask(vm, f"edu {BUS_EDU} {N_BYTES} {OWN_EDU}"),
            ("own", OWN): await ask(vm, f"edu {OWN_EDU} {N_BYTES} {BUS_EDU}"),
        }

        faults = faults_in(vm)
        for (name, liobn), answer in wrong.items():
            assert answer.startswith("error other bytes came back, by 0x"), answer
            out, back = addresses_in(answer)
            mine = [line for line in faults if f"vm1/{name}" in line]
            assert [f"may not read ioba {out & -4096:#x} of liobn {liobn:#x}" in line for line in mine] == [True, False]
            assert f"may not write ioba {back & -4096:#x} of liobn {liobn:#x}" in mine[1]
        assert len(faults) == 4
        for number in (BUS_EDU, OWN_EDU):
            assert (await ask(vm, f"edu {number} {N_BYTES}")).startswith(f"ok {N_BYTES} bytes came back")
        assert (await ask(vm, "rng 4096")).startswith("ok 4096 ")
        assert await ask(vm, "hash") == f"ok {files.sha256()} {files.layout.size_bytes}"
        assert len(faults_in(vm)) == 4
        assert "Traceback" not in vm.qemu.log()


async def test_a_device_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    files = make_vm_files(tmp_path, guest='command_line = "svm=off"')
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        assert await ask(vm, "edu 64") == "error no edu 0"
        assert await ask(vm, "edu 2 64") == "error no edu 2"
        assert await ask(vm, "dma") == "ok disk guest addresses"


async def test_devices_work_again_after_a_switch_that_was_refused(tmp_path: Path) -> None:
    guest = 'dma = "quirk"\ncommand_line = "svm=off"'
    extra = _DEVICES.format(disk=UNTRANSLATED)
    files = make_vm_files(tmp_path, vm='time = "wall"\nsecure = false', guest=guest, extra=extra)
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        for _ in range(2):
            assert (await ask(vm, "esm")).startswith("error U_")
            for number in (BUS_EDU, OWN_EDU):
                assert (await ask(vm, f"edu {number} {N_BYTES}")).startswith(f"ok {N_BYTES} bytes came back")
            assert (await ask(vm, "rng 4096")).startswith("ok 4096 ")
        assert faults_in(vm) == []
