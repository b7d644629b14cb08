"""`pefbox trace` on real processes: one secure disk read from the guest to the device and back, S1, bad input, diff."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import trio

from deploy.api import RunningCluster, cluster
from deploy.trace.events import Event, EventKind
from deploy.trace.merge import Survey, Trace
from deploy.trace.reader import trace_files
from tests.cluster.moving import travelling
from tests.cluster.vm_files import PROMPT, VmFiles, answer_of, console_until, make_vm_files

PROCESSES = {"alpha/ultravisor", "alpha/kvm", "vm1/qemu", "vm1/guest"}


def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """A command that ends with `status`."""
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def pefbox(*arguments: str, status: int = 0) -> str:
    """What a command prints."""
    return run(*arguments, status=status).stdout


async def in_thread(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """As `run`, beside a cluster that this program owns."""
    return await trio.to_thread.run_sync(lambda: run(*arguments, status=status))


async def read_disk(running: RunningCluster) -> None:
    """Wait for the prompt of a secure VM, then have it read its whole disk."""
    vm = running.vm("vm1")
    await console_until(vm, PROMPT)
    assert answer_of(await vm.console_command("hash")).startswith("ok")


def by_cause(events: list[Event]) -> dict[int, list[Event]]:
    causes: defaultdict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.cause:
            causes[event.cause].append(event)
    return dict(causes)


def steps_of(events: list[Event]) -> list[str]:
    """What happened because of one cause, by process: messages as they were sent."""
    return [f"{event.process} {event.name}" for event in events if not event.is_message or event.outward]


SECURE_READ = [
    "vm1/guest H_LOGICAL_CI_STORE",
    "alpha/ultravisor H_LOGICAL_CI_STORE",
    "alpha/kvm DOORBELL_RUNG",
    "vm1/qemu begun",
    "vm1/qemu ended",
    "vm1/qemu IRQ_SET",
    "alpha/kvm raised",
    "alpha/kvm VCPU_LINE",
    "alpha/kvm accepted",
]
"""A request of a secure VM's disk, its answer to the store apart, which comes when it comes."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> VmFiles:
    return make_vm_files(tmp_path_factory.mktemp("trace"), extra=_DISK)


_DISK = """
[[vms.vm1.devices]]
kind = "virtio-blk"
disk = "root"
"""


async def test_one_cause_goes_from_a_secure_guest_to_its_disk_and_back_and_every_view_of_it_works(
    files: VmFiles, tmp_path: Path
) -> None:
    async with cluster(files.cluster_file, state_dir=files.state_dir, record=True) as running:
        await read_disk(running)
        shown = await in_thread("trace", "show", "--vm", "vm1", "--call", "UV_SHARE_PAGE", "--json")
        assert json.loads(shown.stdout.splitlines()[0])["name"] == "UV_SHARE_PAGE"
        recorded = await in_thread("trace", "record", str(tmp_path / "part"), "--seconds", "0")
        assert "of 4 processes" in recorded.stdout
        cut = tmp_path / "cut.trace"
        cut.write_bytes(running.paths.trace_file("alpha/kvm").read_bytes()[:-5])
        assert "cut off inside an entry" in (await in_thread("trace", "show", str(cut))).stderr
        bad_call = await in_thread("trace", "show", "--call", "H_NOPE", status=1)
        assert "no call or message is named" in bad_call.stderr
        bad_vm = await in_thread("trace", "stats", "--vm", "vm9", status=1)
        assert 'no VM "vm9" in this trace' in bad_vm.stderr
        assert (await running.vm("vm1").row()).secure

    trace = running.paths.trace_dir
    events = list(Trace(trace_files(trace)).events())
    causes = by_cause(events)
    reads = [cause for cause, of in causes.items() if set(SECURE_READ) <= set(steps_of(of))]
    assert reads
    steps = [step for step in steps_of(causes[reads[0]]) if step in SECURE_READ]
    assert list(dict.fromkeys(steps)) == SECURE_READ
    assert {event.process for event in events} == PROCESSES
    shares = [event for event in events if event.kind is EventKind.PAGE and event.name == "SHARE_DONE"]
    assert shares
    assert {causes[event.cause][0].name for event in shares} == {"UV_SHARE_PAGE"}
    check_commands(trace, tmp_path, reads[0])


def check_commands(trace: Path, tmp_path: Path, cause: int) -> None:
    """Statistics, exports and filters of a trace that was recorded."""
    stats = json.loads(pefbox("trace", "stats", str(trace), "--json"))
    esm = next(call for call in stats["calls"] if call["name"] == "UV_ESM")
    assert (esm["caller"], esm["callee"], esm["count"]) == ("vm1/guest", "alpha/ultravisor", 1)
    rtas = next(call for call in stats["calls"] if call["name"] == "H_RTAS" and call["callee"] == "alpha/ultravisor")
    assert rtas["p99_us"] >= rtas["p50_us"] > 0
    assert sum(rtas["results"].values()) == rtas["count"]
    assert "UV_SHARE_PAGE" in pefbox("trace", "stats", str(trace))
    diagram = pefbox("trace", "export", str(trace), "--format", "mermaid", "--cause", hex(cause))
    assert re.search(r"alpha_kvm-\)vm1_qemu: DOORBELL_RUNG", diagram)
    output = tmp_path / "perfetto.json"
    pefbox("trace", "export", str(trace), "-o", str(output), "--cause", str(cause))
    rows = json.loads(output.read_text())["traceEvents"]
    assert {row["ph"] for row in rows} == {"M", "X", "s", "f", "i"}
    assert {row["args"]["name"] for row in rows if row["name"] == "process_name"} == PROCESSES
    of_one = pefbox("trace", "show", str(trace), "--cause", hex(cause), "--process", "vm1/qemu").splitlines()
    assert of_one and all(line.endswith(f"cause {cause:#x}") for line in of_one)


@pytest.fixture
def repeatable(tmp_path: Path) -> VmFiles:
    return make_vm_files(tmp_path, vm='time = "instructions"', extra=_DISK)


async def test_two_runs_by_instructions_are_alike_until_one_is_told_something_else(
    repeatable: VmFiles, tmp_path: Path
) -> None:
    for run_name, line in (("a", "null 3"), ("b", "null 4")):
        async with cluster(repeatable.cluster_file, state_dir=repeatable.state_dir, record=True) as running:
            await console_until(running.vm("vm1"), PROMPT)
            for part, typed in (("booted", "pages"), ("more", line)):
                await running.vm("vm1").console_command(typed)
                await in_thread("trace", "record", str(tmp_path / run_name / part), "--seconds", "0")

    def compared(part: str, status: int) -> Any:  # noqa: ANN401
        return json.loads(pefbox("trace", "diff", *(str(tmp_path / it / part) for it in "ab"), "--json", status=status))

    alike, differs = compared("booted", 0), compared("more", 1)
    assert alike["same"], alike["first"]
    assert len(alike["pairs"]) == 8
    first = differs["first"]
    assert (first["sender"], first["receiver"]) == ("vm1/guest", "alpha/ultravisor")
    assert first["n_same"] > 100
    assert first["a"].startswith("H_GET_TERM_CHAR")


async def test_a_live_tail_shows_decoded_calls_and_leaves_recording_as_it_was(minimal_cluster: RunningCluster) -> None:
    vm = minimal_cluster.vm("vm1")
    await console_until(vm, "\n> ")
    command = [sys.executable, "-m", "deploy.cli", "trace", "show", "-f", "--vm", "vm1", "--call", "H_PUT_TERM_CHAR"]
    tail = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    assert tail.stdout is not None
    with trio.fail_after(30):
        while not await are_recording(minimal_cluster, all):
            await trio.lowlevel.checkpoint()
        await vm.console_command("pages")
        shown = await tail.stdout.receive_some()
        tail.send_signal(signal.SIGINT)
        assert await tail.wait() == 130

    first = shown.decode().splitlines()[0]
    assert re.search(r"vm1/guest > alpha/(kvm|ultravisor) +H_PUT_TERM_CHAR\(termno=0x\w+, n_bytes=\d+, ", first), first
    with trio.fail_after(5):
        while await are_recording(minimal_cluster, any):
            await trio.lowlevel.checkpoint()


async def test_recording_ends_with_a_command_that_is_killed_and_takes_in_what_starts_meanwhile(
    minimal_cluster: RunningCluster, tmp_path: Path
) -> None:
    killed, recorder = [await begin_recording(tmp_path / name) for name in ("killed", "whole")]
    with trio.fail_after(60):
        assert (await minimal_cluster.status()).recording
        assert await are_recording(minimal_cluster, all)
        await minimal_cluster.restart("vm1")
        await minimal_cluster.vm("vm1").wait_state("running")
        assert await are_recording(minimal_cluster, all)
        killed.kill()
        await killed.wait()
        assert await are_recording(minimal_cluster, all)
        recorder.send_signal(signal.SIGINT)
        assert await recorder.wait() == 0
        while await are_recording(minimal_cluster, any):
            await trio.lowlevel.checkpoint()
    assert not (await minimal_cluster.status()).recording

    events = list(Trace(trace_files(tmp_path / "whole")).events())
    beginnings = [event.process for event in events if event.kind is EventKind.BEGAN]
    assert beginnings.count("vm1/guest") == 2
    assert beginnings.count("alpha/kvm") == 1


async def begin_recording(directory: Path) -> trio.Process:
    """`pefbox trace record` into `directory`, as soon as it says that it does."""
    command = [sys.executable, "-m", "deploy.cli", "trace", "record", str(directory)]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = b""
    with trio.fail_after(30):
        while not said.endswith(b" processes: Ctrl-C ends it\n"):
            more = await process.stderr.receive_some()
            assert more, said
            said += more
    return process


async def test_a_process_that_does_not_answer_when_recording_begins_has_a_trace_when_it_goes_on(
    minimal_cluster: RunningCluster, tmp_path: Path
) -> None:
    kvm = minimal_cluster.process("alpha/kvm")
    with trio.fail_after(60):
        for number in range(2):
            recorder = await begin_recording(tmp_path / str(number))
            # What it noted last is not in its file yet.
            await (kvm.resume() if number else kvm.stop())
            if number:
                while not await are_recording(minimal_cluster, all):
                    await trio.lowlevel.checkpoint()
            recorder.send_signal(signal.SIGINT)
            assert await recorder.wait() == 0

    survey = Survey(trace_files(tmp_path / "1"))
    assert not survey.unreadable
    assert survey.began.keys() == PROCESSES


async def are_recording(running: RunningCluster, which: Callable[[Iterable[bool]], bool]) -> bool:
    answers = [await running.process(target).query("recording", seconds=5.0) for target in sorted(PROCESSES)]
    return which(answer["recording"] for answer in answers)


async def test_a_migration_is_one_cause_on_both_hosts(tmp_path: Path) -> None:
    async with travelling(tmp_path, record=True) as traveller:
        await traveller.vm.migrate("beta")
        trace = traveller.running.paths.trace_dir

    events = list(Trace(trace_files(trace)).events())
    steps = [event for event in events if event.kind is EventKind.MIGRATION]
    # The qemu that the VM leaves is killed when it is done: what it noted last may not be in its file.
    assert [step.name for step in steps if step.text.startswith("source")][:3] == ["setup", "active", "device"]
    assert [step.name for step in steps if step.text.startswith("destination")] == ["active", "device", "completed"]
    (cause,) = {step.cause for step in steps}
    done = {f"{event.process} {event.name}" for event in events if event.cause == cause}
    assert done >= {
        "alpha/kvm UV_EXPORT_OFFER",
        "beta/kvm UV_IMPORT_OFFER",
        "alpha/ultravisor SVM_FREEZE",
        "beta/ultravisor SVM_LOAD",
        "beta/ultravisor SVM_THAW",
    }


async def test_who_follows_a_cluster_hears_when_it_is_down(minimal_cluster: RunningCluster, tmp_path: Path) -> None:
    recorder = await begin_recording(tmp_path / "recorded")
    following = [await begin_following(minimal_cluster, *words) for words in (("calls", "vm1"), ("trace", "show"))]
    with trio.fail_after(30):
        await minimal_cluster.vm("vm1").console_command("last")
        assert await minimal_cluster.down() == 0
        for process in (recorder, *following):
            shown, said = await last_words(process)
            assert said == f'pefbox: cluster "{minimal_cluster.name}" is down\n'
            assert process is recorder or f"char0_7=0x{b'last'.hex()}" in shown

    assert Survey(trace_files(tmp_path / "recorded")).began.keys() == PROCESSES


async def begin_following(running: RunningCluster, *words: str) -> trio.Process:
    """`pefbox WORDS -f`, as soon as it shows something."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "deploy.cli", *words, "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    with trio.fail_after(30):
        while True:
            await running.vm("vm1").console_command("pages")
            with trio.move_on_after(0.5):
                assert await process.stdout.receive_some()
                return process


async def last_words(process: trio.Process) -> tuple[str, str]:
    """What it still shows, and what it says on standard error, when it ends in good order."""
    shown, said = bytearray(), bytearray()

    async def read_all(stream: trio.abc.ReceiveStream, text: bytearray) -> None:
        async for piece in stream:
            text += piece

    async with trio.open_nursery() as nursery:
        for stream, text in ((process.stdout, shown), (process.stderr, said)):
            if stream is not None:
                nursery.start_soon(read_all, stream, text)
    assert await process.wait() == 0
    return shown.decode(), said.decode()
