"""S4: of a secure VM's call, only what its declaration names crosses to the hypervisor, and only that comes back.

What crossed is read from the recorded frames of the kvm process, from normal RAM, and from what a played guest gets.
"""

from __future__ import annotations

import dataclasses
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from deploy.trace.reader import FrameReader, SeenFrame
from protocol.codes import HCode, RtasStatus, UCode
from protocol.declare import Caller
from protocol.geometry import PAGE_BYTES, gpa_of
from protocol.hcalls import H_RANDOM, H_RTAS, HCALLS
from protocol.links import ULTRAVISOR_GUEST, ULTRAVISOR_KVM
from protocol.rtas import MAX_BUFFER_BYTES, RTAS, status_word
from protocol.ucalls import UCALLS, UV_ESM, UV_ESMB_GET_FILE, UV_RETURN
from protocol.wire import Envelope, MessageKind, decode
from services.testing.host import PlayedVm, RealHost, real_host
from services.testing.image import FIRST_FREE_GFN, make_image
from services.ultravisor.identity import MACHINE_KEY, ensure_keys
from tests.cluster.svm_rig import HOST, Rig, svm_rig

PLAYED_BYTES = 4 << 20
ARGS_GFN, BUFFER_GFN = FIRST_FREE_GFN, FIRST_FREE_GFN + 1
SECRET = b"only the guest and the ultravisor know these bytes! "
FILL = 0xC7


@pytest.fixture(autouse=True)
def own_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Run and state directories of this test alone."""
    with tempfile.TemporaryDirectory(prefix="pb-") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        yield


# -- what a whole life of a secure VM sends --------------------------------------------------------------------------


def frames(rig: Rig, target: str, kind: str) -> list[tuple[str, Envelope]]:
    """Direction and envelope of every recorded frame of a process on its links of one kind."""
    reader = FrameReader(rig.cluster.paths.trace_file(target))
    found: list[SeenFrame] = [entry for entry in reader.read() if entry.link.partition(":")[2].startswith(kind)]
    return [(entry.direction, decode(entry.frame)) for entry in found]


def registers(envelope: Envelope) -> list[int]:
    return msgspec.msgpack.decode(envelope.body, type=list[int])


async def live(rig: Rig) -> int:
    """Shares, pages, console, RTAS and a reboot of a secure VM; the GFN of a page of secrets."""
    gfn = await rig.free_gfn()
    assert await rig.ask(f"fill {gfn} {FILL:#x}") == "ok"
    assert await rig.ask(f"share {gfn - 1}") == "ok"
    assert await rig.ask(f"unshare {gfn - 1}") == "ok"
    assert await rig.move("out", gfn) == {"H_SUCCESS": 1}
    assert (await rig.ask(f"sum {gfn}")).startswith("ok")
    assert (await rig.ask("null 200")).startswith("ok")
    return gfn


async def test_every_frame_to_kvm_has_the_declared_registers_and_no_byte_of_a_secure_page(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, record=True) as rig:
        await live(rig)
        bounce = {gfn for gfn in range(1024) if (await rig.page_state(gfn))[0] == "SHARED_IMPLICIT"}
        ram = rig.ram()[:]
        await rig.cluster.down()
        crossed = frames(rig, f"{HOST}/kvm", ULTRAVISOR_KVM.name)
        answered = frames(rig, f"{HOST}/ultravisor", ULTRAVISOR_GUEST.name)

    calls = [e for way, e in crossed if way == "in" and e.kind is MessageKind.CALL and e.number in HCALLS.by_number]
    assert {HCALLS.by_number[e.number].name for e in calls} > {"H_RTAS", "H_PUT_TERM_CHAR", "H_CPPR", "H_SVM_PAGE_IN"}
    for envelope in calls:
        call, body = HCALLS.by_number[envelope.number], registers(envelope)
        assert len(body) == 2 + call.n_args, call.name
        if call is H_RTAS:
            assert body[2] // PAGE_BYTES in bounce
    returns = [e for way, e in crossed if way == "out" and e.number == UV_RETURN.number]
    returned = {registers(envelope)[1] for envelope in returns}
    unanswered = [HCALLS.by_number[e.number] for e in calls if e.correlation not in returned]
    assert returned <= {envelope.correlation for envelope in calls}
    assert all(call.open_ended for call in unanswered)
    for way, envelope in answered:
        declared = HCALLS.by_number.get(envelope.number)
        if way == "out" and envelope.kind is MessageKind.REPLY and declared is not None:
            assert len(registers(envelope)) in (1, 1 + len(declared.results)), declared.name
    secret = bytes([FILL]) * 32
    assert secret not in ram
    assert not any(secret in bytes(envelope.body) for _, envelope in crossed)


# -- what a guest tries to push through -------------------------------------------------------------------------------


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RealHost]:
    with tempfile.TemporaryDirectory(prefix="pb-") as directory:
        async with real_host(Path(directory), ensure_keys(tmp_path, HOST)) as running:
            yield running
            for process in (running.ultravisor, running.kvm):
                assert '"internal error"' not in running.log_text(process)


@pytest.fixture
async def vm(host: RealHost, tmp_path: Path) -> PlayedVm:
    """A secure VM whose pages for argument blocks and buffers are full of secrets."""
    image = make_image(ensure_keys(tmp_path, HOST)[MACHINE_KEY], b"kernel", PLAYED_BYTES, {})
    made = await host.add_vm("vm1", memory_bytes=PLAYED_BYTES)
    assert await made.qemu.power_on(image) == HCode.H_SUCCESS
    assert await made.guest.esm(image) == UCode.U_SUCCESS
    for gfn in (ARGS_GFN, BUFFER_GFN):
        made.guest.store(gfn, (SECRET * PAGE_BYTES)[:PAGE_BYTES])
    return made


async def rtas(vm: PlayedVm, service: int, args: list[int], n_rets: int) -> int:
    """H_RTAS of the guest with a block in its secure page."""
    vm.guest.store(ARGS_GFN, struct.pack(f">III{len(args)}I", service, len(args), n_rets, *args))
    return (await vm.guest.call(H_RTAS, gpa_of(ARGS_GFN)))[0]


async def test_a_declared_service_goes_through_a_bounce_page_and_leaves_nothing_else(vm: PlayedVm) -> None:
    service = RTAS.by_name["get-time-of-day"]

    assert await rtas(vm, service.number, [], 8) == HCode.H_SUCCESS

    (status,) = struct.unpack_from(">I", vm.guest.load(ARGS_GFN), 12)
    assert status == status_word(RtasStatus.PARAMETER_ERROR)
    block = struct.pack(">III", service.number, 0, 8)
    raw = vm.raw()
    assert raw.count(block) == 1
    assert raw[raw.index(block) + 44 :][:212] == bytes(212)
    assert SECRET[:16] not in raw


async def test_an_input_buffer_crosses_to_its_declared_length(vm: PlayedVm) -> None:
    vm.guest.store(BUFFER_GFN, b"to be stored", offset=100)
    service = RTAS.by_name["nvram-store"].number

    assert await rtas(vm, service, [0, gpa_of(BUFFER_GFN) + 100, 12], 2) == HCode.H_SUCCESS

    raw = vm.raw()
    at = raw.index(b"to be stored")
    assert raw[at + 12 : at + MAX_BUFFER_BYTES] == bytes(MAX_BUFFER_BYTES - 12)
    assert SECRET[:16] not in raw


NOT_DECLARED: dict[str, tuple[int, list[int], int]] = {
    "no such service": (0x7777, [], 1),
    "too long": (RTAS.by_name["nvram-store"].number, [0, gpa_of(BUFFER_GFN), MAX_BUFFER_BYTES + 1], 2),
    "input leaves memory": (RTAS.by_name["nvram-store"].number, [0, PLAYED_BYTES - 4, 8], 2),
    "output leaves memory": (RTAS.by_name["nvram-fetch"].number, [0, PLAYED_BYTES - 4, 8], 2),
    "output outside memory": (RTAS.by_name["nvram-fetch"].number, [0, 0xFFFFFFFF, 8], 2),
    "output in a bounce page": (RTAS.by_name["nvram-fetch"].number, [0, gpa_of(63), 8], 2),
    "too many arguments": (RTAS.by_name["nvram-fetch"].number, [0, 0, 1, 1], 2),
}


async def test_what_is_not_declared_does_not_pass(vm: PlayedVm) -> None:
    before = vm.raw()

    for what, (service, args, n_rets) in NOT_DECLARED.items():
        assert await rtas(vm, service, args, n_rets) == HCode.H_PARAMETER, what

    assert vm.raw() == before


WORD = 0x5EC12E75EC12E7


async def test_s1_what_does_not_cross_is_in_no_trace_either(host: RealHost, vm: PlayedVm) -> None:
    """A trace is a file: for all that is promised, kvm and qemu can read it."""
    processes = (host.ultravisor, host.kvm)
    for process in processes:
        assert await process.query("record", on=True) == {"recording": True, "full": False}

    for call in (*HCALLS, *UCALLS):
        if Caller.SVM in call.callers and not call.open_ended and call not in (H_RTAS, UV_ESM):
            await vm.guest.call(call, *[0] * call.n_args, *[WORD] * 3)
    _, random = await vm.guest.call(H_RANDOM)
    await vm.guest.call(UV_ESMB_GET_FILE, *[WORD] * 9)
    await vm.guest.call(dataclasses.replace(H_RANDOM, number=WORD), WORD)
    assert await rtas(vm, RTAS.by_name["nvram-store"].number, [0, gpa_of(BUFFER_GFN), 12], 2) == HCode.H_SUCCESS

    traces = {}
    for process in processes:
        await process.query("recording")
        traces[process.role.value] = (host.directory / process.role.value / "trace").read_bytes()
    for word in (WORD, random):
        for order in ("big", "little"):
            found = [role for role, data in traces.items() if word.to_bytes(8, order) in data]
            assert found == []
    assert not [role for role, data in traces.items() if SECRET[:16] in data]
    assert H_RANDOM.number.to_bytes(2, "big") in traces["ultravisor"]


async def test_registers_behind_the_declared_ones_are_never_sent(host: RealHost, vm: PlayedVm) -> None:
    for call in HCALLS:
        if Caller.SVM in call.callers and not call.open_ended and call is not H_RTAS:
            result = await vm.guest.call(call, *[0] * call.n_args, *[0x5EC2E7] * 3)
            assert len(result) in (1, 1 + len(call.results)), call.name
            assert 0x5EC2E7 not in result
    assert (await host.ultravisor.query("vm.status", vm="vm1"))["secure"]
