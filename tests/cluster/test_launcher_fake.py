"""The launcher with processes that only speak the control protocol: start, watching, restart, end, clean."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from deploy.api import RunningCluster, cluster, processes_of
from deploy.client import DetachedStart, start_detached
from deploy.manifest import ManifestData, clean_run_dir, is_alive, read_manifest
from deploy.operator_protocol import LENGTH, Request, Response, frame
from deploy.run_dirs import running_clusters
from protocol.errors import UserError
from tests.cluster.conftest import FAKE_SERVICE, MINIMAL

TWO_HOSTS = """
[hosts.alpha]
secure_memory = "64M"
[hosts.beta]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "16M"
guest.boot = "kernel"
[vms.vm2]
host = "alpha"
memory = "16M"
guest.boot = "kernel"
[vms.vm3]
host = "beta"
memory = "16M"
guest.boot = "kernel"
"""


def pefbox(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "deploy.cli", *arguments], capture_output=True, text=True, timeout=30)


async def seen(running: RunningCluster, target: str) -> dict[str, Any]:
    answer: dict[str, Any] = await running.process(target).query("seen")
    return answer


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(3):
        while True:
            if await holds():
                return
            await trio.sleep(0.02)


async def until_event(running: RunningCluster, target: str, event: str) -> None:
    async def came() -> bool:
        return event in (await seen(running, target))["events"]

    await until(came)


def exists(path: str) -> bool:
    return os.path.exists(path)


def segments_exist(manifest: ManifestData) -> list[bool]:
    return [os.path.exists(f"/dev/shm/{name}") for name in manifest.segments]


def command_lines_of_children(pid: int) -> list[bytes]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]


async def test_every_process_gets_its_links_files_and_keys_and_nothing_else(fake_cluster: RunningCluster) -> None:
    ultravisor = await seen(fake_cluster, "alpha/ultravisor")
    kvm = await seen(fake_cluster, "alpha/kvm")
    qemu = await seen(fake_cluster, "vm1/qemu")
    guest = await seen(fake_cluster, "vm1/guest")

    assert ultravisor["files"] == ["audit", "ledger", "log", "ram:vm1", "secure:vm1", "stream:vm1", "trace"]
    assert kvm["files"] == ["log", "ram:vm1", "stream:vm1", "trace"]
    assert qemu["files"] == ["log", "ram:vm1", "stream:vm1", "trace"]
    assert guest["files"] == ["log", "ram:vm1", "secure:vm1", "trace"]
    assert ultravisor["keys"] == [
        "alpha:ultravisor-kvm.1", "identity-key", "machine-key", "migration-certificate", "migration-revoked",
        "migration-roots", "vm1:ultravisor-guest.1",
    ]  # fmt: skip
    assert kvm["keys"] == ["alpha:ultravisor-kvm.1", "vm1:kvm-guest.1", "vm1:kvm-qemu.1"]
    assert qemu["keys"] == ["vm1:kvm-qemu.1"]
    assert guest["keys"] == ["vm1:kvm-guest.1", "vm1:ultravisor-guest.1"]
    assert all(process["events"][:2] == ["Start", "TakeKeys"] for process in (ultravisor, kvm, qemu, guest))
    # Standard streams, control socket, its files, and the directory that `seen` lists: nothing else was inherited.
    assert [len(p["open"]) - len(p["files"]) for p in (ultravisor, kvm, qemu, guest)] == [5, 5, 5, 5]


async def test_ram_segment_and_private_socketpair_join_the_right_processes(fake_cluster: RunningCluster) -> None:
    await fake_cluster.process("alpha/kvm").query("write-ram", {"vm": "vm1", "data": b"written by kvm"})
    await fake_cluster.process("vm1/guest").query("send-private", {"vm": "vm1", "data": b"a secret"})

    assert (await fake_cluster.process("vm1/qemu").query("read-ram", {"vm": "vm1"})).startswith(b"written by kvm")
    assert await fake_cluster.process("alpha/ultravisor").query("read-private", {"vm": "vm1"}) == b"a secret"


async def test_gift_of_kvm_waits_until_the_receiver_has_its_keys(fake_cluster: RunningCluster) -> None:
    qemu = await seen(fake_cluster, "vm1/qemu")

    assert qemu["events"][:3] == ["Start", "TakeKeys", "Gift"]
    assert qemu["gifts"] == {"host-view": ["alpha/kvm", "host-view of vm1"]}


async def test_gift_of_a_role_that_may_not_give_it_reaches_nobody(fake_cluster: RunningCluster) -> None:
    await fake_cluster.process("vm1/qemu").query("give", {"tag": "normal-map", "vm": "vm1"})
    await fake_cluster.process("vm1/qemu").query("give", {"tag": "device-dirty-map", "vm": "vm1"})

    async def came() -> bool:
        return "device-dirty-map" in (await seen(fake_cluster, "alpha/kvm"))["gifts"]

    await until(came)
    assert (await seen(fake_cluster, "vm1/guest"))["gifts"] == {}
    assert "gift refused" in fake_cluster.paths.launcher_log.read_text()


async def test_killed_process_is_reported_by_name_to_its_peers(fake_cluster: RunningCluster) -> None:
    with trio.fail_after(2):
        await fake_cluster.process("vm1/qemu").kill()
        row = await fake_cluster.process("vm1/qemu").wait_state("failed")
        await until_event(fake_cluster, "alpha/kvm", "vm1/qemu failed")

    assert row.detail == "killed by SIGKILL"
    assert "vm1/qemu failed" not in (await seen(fake_cluster, "alpha/ultravisor"))["events"]
    vm = await fake_cluster.vm("vm1").wait_state("failed")
    assert vm.reason == "vm1/qemu is failed (killed by SIGKILL)"
    await fake_cluster.vm("vm1").guest.wait_state("gone")


async def test_stopped_process_is_shown_and_told_and_comes_back(fake_cluster: RunningCluster) -> None:
    kvm = fake_cluster.process("alpha/kvm")
    with trio.fail_after(2):
        await kvm.stop()
        await kvm.wait_state("stopped")
        await until_event(fake_cluster, "vm1/guest", "alpha/kvm stopped")

    await kvm.resume()
    await kvm.wait_state("running")
    await until_event(fake_cluster, "vm1/guest", "alpha/kvm running")


async def test_process_that_goes_on_is_asked_at_once(fake_cluster: RunningCluster) -> None:
    kvm = fake_cluster.process("alpha/kvm")
    for _ in range(5):
        await kvm.stop()
        await kvm.wait_state("stopped")
        async with trio.open_nursery() as nursery:
            with kept_waiting((await kvm.row()).pid):
                await kvm.resume()
                nursery.start_soon(functools.partial(kvm.query, "seen", seconds=10.0))
                await trio.sleep(0.1)


@contextmanager
def kept_waiting(pid: int | None) -> Iterator[None]:
    """The process gets its processor last: another never lets go of it."""
    assert pid is not None
    cpu = {min(os.sched_getaffinity(0))}
    os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    os.sched_setaffinity(pid, cpu)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            os.sched_setaffinity(busy.pid, cpu)
            yield
        finally:
            busy.kill()


async def test_hanging_process_is_unresponsive_within_two_seconds_and_is_not_killed(
    fake_cluster: RunningCluster,
) -> None:
    ultravisor = fake_cluster.process("alpha/ultravisor")
    started = trio.current_time()
    with pytest.raises(UserError, match="silent"):
        await ultravisor.query("hang", seconds=0.05)

    row = await ultravisor.wait_state("unresponsive")
    await until_event(fake_cluster, "alpha/kvm", "alpha/ultravisor unresponsive")

    assert trio.current_time() - started < 2.2
    assert exists(f"/proc/{row.pid}")
    before = trio.current_time()
    await fake_cluster.status()
    assert trio.current_time() - before < 1


async def test_process_that_was_slow_is_running_again(fake_cluster: RunningCluster) -> None:
    guest = fake_cluster.vm("vm1").guest
    with pytest.raises(UserError, match="silent"):
        await guest.query("slow", {"seconds": 2.5}, seconds=0.05)

    await guest.wait_state("unresponsive")
    await guest.wait_state("running")


async def test_death_of_kvm_fails_all_vms_of_its_host_only(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(TWO_HOSTS)
    async with cluster(file, service_module=FAKE_SERVICE) as running:
        await running.process("alpha/kvm").kill()

        await running.vm("vm1").wait_state("failed")
        await running.vm("vm2").wait_state("failed")
        assert (await running.vm("vm3").row()).state == "running"


async def test_death_of_the_ultravisor_fails_secure_vms_only(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(TWO_HOSTS)
    async with cluster(file, service_module=FAKE_SERVICE) as running:
        values = {"secure": True}
        await running.process("alpha/ultravisor").query("set-vm", {"vm": "vm1", "values": values})
        await running.vm("vm1").secure()
        await running.process("alpha/ultravisor").kill()

        await running.vm("vm1").wait_state("failed")
        assert (await running.vm("vm2").row()).state == "running"


async def test_restarted_vm_has_new_links_keys_and_zeroed_ram(fake_cluster: RunningCluster) -> None:
    await fake_cluster.process("alpha/kvm").query("write-ram", {"vm": "vm1", "data": b"old"})
    before = await fake_cluster.vm("vm1").row()

    await fake_cluster.vm("vm1").restart()

    after = await fake_cluster.vm("vm1").row()
    assert (before.incarnation, after.incarnation, after.lpid) == (1, 2, before.lpid)
    assert {row.pid for row in before.processes}.isdisjoint(row.pid for row in after.processes)
    kvm = await seen(fake_cluster, "alpha/kvm")
    added = "added vm1.2 ['vm1:kvm-guest.2', 'vm1:kvm-qemu.2']"
    assert kvm["events"].index("RemoveVm") < kvm["events"].index(added)
    assert (await seen(fake_cluster, "vm1/guest"))["keys"] == ["vm1:kvm-guest.2", "vm1:ultravisor-guest.2"]
    for target in ("alpha/kvm", "alpha/ultravisor", "vm1/guest", "vm1/qemu"):
        assert await fake_cluster.process(target).query("read-ram", {"vm": "vm1"}) == bytes(16)
    await fake_cluster.process("vm1/guest").query("send-private", {"vm": "vm1", "data": b"second life"})
    assert await fake_cluster.process("alpha/ultravisor").query("read-private", {"vm": "vm1"}) == b"second life"


async def test_notice_of_a_failed_vm_ends_it_by_name(fake_cluster: RunningCluster) -> None:
    notice = {"what": "vm-failed", "vm": "vm1", "detail": "page-integrity"}
    await fake_cluster.process("alpha/ultravisor").query("notice", notice)

    assert (await fake_cluster.vm("vm1").wait_state("failed")).reason == "page-integrity"
    await fake_cluster.vm("vm1").guest.wait_state("gone")
    assert (await fake_cluster.process("alpha/kvm").row()).state == "running"


async def test_failed_vm_is_not_secure_and_has_no_pages_whatever_its_keepers_say(fake_cluster: RunningCluster) -> None:
    values = {"secure": True, "pages": {"normal": 0, "secure": 256}}
    await fake_cluster.process("alpha/ultravisor").query("set-vm", {"vm": "vm1", "values": values})
    assert (await fake_cluster.vm("vm1").secure()).pages["secure"] == 256

    await fake_cluster.vm("vm1").guest.kill()

    row = await fake_cluster.vm("vm1").wait_state("failed")
    assert not row.secure
    assert set(row.pages.values()) == {None}
    await fake_cluster.vm("vm1").restart()
    assert (await fake_cluster.vm("vm1").wait_state("running")).pages["normal"] is not None


async def test_failed_vm_runs_again_after_restart(fake_cluster: RunningCluster) -> None:
    await fake_cluster.vm("vm1").guest.kill()
    await fake_cluster.vm("vm1").wait_state("failed")

    await fake_cluster.vm("vm1").restart()

    assert (await fake_cluster.vm("vm1").wait_state("running")).reason == ""


async def test_host_restarts_only_when_its_kvm_or_ultravisor_is_gone(fake_cluster: RunningCluster) -> None:
    with pytest.raises(UserError, match="both live"):
        await fake_cluster.restart("alpha")
    await fake_cluster.process("alpha/kvm").kill()
    await fake_cluster.vm("vm1").wait_state("failed")
    with pytest.raises(UserError, match="alpha/kvm is failed: pefbox restart alpha"):
        await fake_cluster.vm("vm1").restart()

    await fake_cluster.restart("alpha")

    await fake_cluster.vm("vm1").wait_state("running")
    assert (await seen(fake_cluster, "alpha/kvm"))["keys"][0] == "alpha:ultravisor-kvm.2"


async def test_host_whose_restart_broke_off_can_be_restarted_again(fake_cluster: RunningCluster) -> None:
    await fake_cluster.process("alpha/kvm").kill()
    await fake_cluster.vm("vm1").wait_state("failed")
    log = fake_cluster.paths.log_file("vm1/qemu")
    log.unlink()
    log.mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        await fake_cluster.restart("alpha")
    states = {row.target: row.state for row in processes_of(await fake_cluster.status())}
    assert set(states.values()) == {"gone"}
    log.rmdir()

    await fake_cluster.restart("alpha")

    await fake_cluster.vm("vm1").wait_state("running")


async def test_ultravisor_may_have_a_guest_killed_and_qemu_may_not(fake_cluster: RunningCluster) -> None:
    notice = {"what": "guest-must-die", "vm": "vm1", "detail": "no acknowledgement"}
    await fake_cluster.process("vm1/qemu").query("notice", notice)
    assert (await fake_cluster.vm("vm1").guest.row()).state == "running"

    await fake_cluster.process("alpha/ultravisor").query("notice", notice)

    row = await fake_cluster.vm("vm1").guest.wait_state("failed")
    assert row.detail == "killed for alpha/ultravisor: no acknowledgement"


async def test_down_removes_every_process_segment_and_socket(own_directories: Path) -> None:
    async with cluster(MINIMAL, service_module=FAKE_SERVICE) as running:
        manifest = read_manifest(running.paths.manifest)
        assert manifest is not None
        assert len(manifest.processes) == 4
        assert segments_exist(manifest) == [True]

        assert await running.down() == 0
        assert await running.down() == 0

    assert not any(is_alive(process) for process in manifest.processes)
    assert segments_exist(manifest) == [False]
    assert list((own_directories / "pefbox").iterdir()) == []


async def test_down_ends_stopped_and_hanging_processes_too(fake_cluster: RunningCluster) -> None:
    await fake_cluster.process("alpha/kvm").stop()
    with pytest.raises(UserError):
        await fake_cluster.process("vm1/guest").query("hang", seconds=0.05)

    with trio.fail_after(8):
        assert await fake_cluster.down() == 0
    assert running_clusters() == []


async def test_killed_launcher_takes_all_along_and_clean_removes_the_rest(fake_cluster: RunningCluster) -> None:
    manifest = read_manifest(fake_cluster.paths.manifest)
    assert manifest is not None

    async def all_ended() -> bool:
        return not any(is_alive(process) for process in manifest.processes)

    fake_cluster.kill_launcher()
    await fake_cluster.wait_launcher()
    await until(all_ended)
    removed = clean_run_dir(fake_cluster.paths.run_dir)

    assert removed is not None
    assert f"segment {manifest.segments[0]}" in removed
    assert not fake_cluster.paths.run_dir.exists()


async def test_clean_leaves_a_running_cluster_alone(fake_cluster: RunningCluster) -> None:
    assert clean_run_dir(fake_cluster.paths.run_dir) is None
    assert (await fake_cluster.status()).healthy


async def test_start_that_fails_names_process_and_reason_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, own_directories: Path
) -> None:
    monkeypatch.setenv("PEFBOX_FAKE", "fail-vm1/guest")

    with pytest.raises(UserError, match="vm1/guest did not start: told to fail"):
        async with cluster(MINIMAL, service_module=FAKE_SERVICE):
            pass

    assert list((own_directories / "pefbox").iterdir()) == []


async def test_service_that_cannot_be_imported_is_a_failed_start() -> None:
    with pytest.raises(UserError, match=r"did not start: exit status 1: .*No module named no_such_service"):
        async with cluster(MINIMAL, service_module="no_such_service"):
            pass


async def test_start_that_failed_names_who_failed_and_not_who_was_ended_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kvm is over while the rest is being started: of the many that are ended for it, none is to blame."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "service_of_kvm.py").write_text("import no_such_module")
    for role in ("ultravisor", "qemu", "guest"):
        (tmp_path / f"service_of_{role}.py").write_text("import time; time.sleep(60)")
    vms = "".join(f'[vms.vm{n}]\nhost = "alpha"\nmemory = "16M"\nguest.boot = "kernel"\n' for n in range(24))
    many = tmp_path / "many.toml"
    many.write_text(f'[hosts.alpha]\nsecure_memory = "64M"\n{vms}')

    with pytest.raises(UserError, match=r"alpha/kvm did not start: exit status 1: .*No module named 'no_such_module'"):
        async with cluster(many, service_module="service_of_{role}"):
            pass


@pytest.mark.parametrize("name", ["log", "lock", "log/launcher.log", "log/vm1.guest.log", "log/vm1.guest.stderr"])
async def test_state_directory_that_cannot_be_used_is_named_and_nothing_is_left(
    tmp_path: Path, own_directories: Path, name: str
) -> None:
    """A file where a directory belongs, or a directory where a file belongs."""
    state = tmp_path / "used"
    (state / name).parent.mkdir(parents=True)
    if name == "log":
        (state / name).touch()
    else:
        (state / name).mkdir()

    with pytest.raises(UserError, match=rf"^{state / name}: (File exists|Is a directory)$"):
        async with cluster(MINIMAL, service_module=FAKE_SERVICE, state_dir=state):
            pass

    assert list((own_directories / "pefbox").iterdir()) == []


async def test_full_run_directory_ends_no_cluster_and_refuses_a_restart(fake_cluster: RunningCluster) -> None:
    unwritable = fake_cluster.paths.manifest.with_suffix(".new")
    unwritable.mkdir()
    await fake_cluster.vm("vm1").guest.kill()
    await fake_cluster.vm("vm1").wait_state("failed")

    with pytest.raises(UserError, match=r"manifest\.json: cannot write"):
        await fake_cluster.vm("vm1").restart()

    row = await fake_cluster.vm("vm1").row()
    assert "cannot write" in row.reason
    await fake_cluster.vm("vm1").qemu.wait_state("gone")
    unwritable.rmdir()
    await fake_cluster.vm("vm1").restart()
    await fake_cluster.vm("vm1").wait_state("running")


async def test_two_clusters_run_side_by_side_and_a_name_runs_once() -> None:
    async with cluster(MINIMAL, name="first", service_module=FAKE_SERVICE) as one:
        async with cluster(MINIMAL, name="second", service_module=FAKE_SERVICE) as two:
            assert running_clusters() == ["first", "second"]
            assert (await two.status()).cluster == "second"
            with pytest.raises(UserError, match='a cluster "first" runs already'):
                async with cluster(MINIMAL, name="first", service_module=FAKE_SERVICE):
                    pass
            status = await trio.to_thread.run_sync(pefbox, "status")
            assert (status.returncode, status.stderr) == (
                1,
                "pefbox: several clusters run, say which with --cluster: first, second\n",
            )
        assert len(processes_of(await one.status())) == 4


async def test_launcher_that_does_not_answer_hides_no_other_cluster(fake_cluster: RunningCluster) -> None:
    async with cluster(MINIMAL, name="second", service_module=FAKE_SERVICE):
        os.kill(fake_cluster.launcher_pid, signal.SIGSTOP)
        try:
            listed = await trio.to_thread.run_sync(pefbox, "ps", "--json")
        finally:
            os.kill(fake_cluster.launcher_pid, signal.SIGCONT)

    assert {row["cluster"] for row in json.loads(listed.stdout)} == {"second"}
    problem = f'pefbox: cluster "{fake_cluster.name}": its launcher did not answer in 0.9 s\n'
    assert (listed.returncode, listed.stderr) == (1, problem)


async def test_launcher_that_hangs_is_killed_in_the_end(
    monkeypatch: pytest.MonkeyPatch, fake_cluster: RunningCluster
) -> None:
    monkeypatch.setattr("deploy.api._DOWN_SECONDS", 0.2)
    os.kill(fake_cluster.launcher_pid, signal.SIGSTOP)

    with trio.fail_after(5), pytest.raises(UserError, match="its launcher was killed: pefbox clean"):
        await fake_cluster.down()

    await fake_cluster.wait_launcher(5)
    assert clean_run_dir(fake_cluster.paths.run_dir) is not None


def test_start_that_is_broken_off_leaves_no_cluster(monkeypatch: pytest.MonkeyPatch, own_directories: Path) -> None:
    monkeypatch.setenv("PEFBOX_FAKE", "silent-vm1/guest")
    start = f"DetachedStart(Path({str(MINIMAL)!r}), 'stopped', service_module={FAKE_SERVICE!r})"
    script = f"from pathlib import Path; from deploy.client import *; start_detached({start})"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as starting:
        while "vm1/guest" not in pefbox("ps").stdout:
            assert starting.poll() is None
        starting.send_signal(signal.SIGINT)
        _, errors = starting.communicate(timeout=20)

    assert errors.endswith("KeyboardInterrupt\n")
    assert list((own_directories / "pefbox").iterdir()) == []


def test_cluster_that_is_stopped_before_it_is_up_is_one_line(
    monkeypatch: pytest.MonkeyPatch, own_directories: Path
) -> None:
    monkeypatch.setenv("PEFBOX_FAKE", "silent-vm1/guest")
    start = DetachedStart(MINIMAL, "stopped", service_module=FAKE_SERVICE)
    with ThreadPoolExecutor() as pool:
        started = pool.submit(start_detached, start)
        while "vm1/guest" not in pefbox("ps").stdout:
            assert not started.done()
        assert pefbox("down").returncode == 0

        with pytest.raises(UserError, match=r"^the cluster was told to stop before it was up$"):
            started.result()
    assert list((own_directories / "pefbox").iterdir()) == []


async def test_launcher_and_processes_start_no_resource_tracker(fake_cluster: RunningCluster) -> None:
    pids = [fake_cluster.launcher_pid, *(row.pid for row in processes_of(await fake_cluster.status()))]

    command_lines = [line for pid in pids for line in command_lines_of_children(pid)]

    assert len(command_lines) == 4
    assert all(FAKE_SERVICE.encode() in line for line in command_lines)


async def test_commands_answer_from_the_running_cluster(fake_cluster: RunningCluster) -> None:
    commands = ("status --json", "ps --json", "status", "ps", "logs alpha/kvm", "logs launcher", "page vm1 0x10000")
    for command in commands:
        result = await trio.to_thread.run_sync(pefbox, *command.split())
        assert (result.returncode, result.stderr) == (0, ""), command
        assert result.stdout, command


async def test_line_console_prints_what_the_vm_wrote(fake_cluster: RunningCluster) -> None:
    result = await trio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "deploy.cli", "console", "vm1"], capture_output=True, input=b"", timeout=20
        )
    )
    assert result.stdout == b"hello\n"


async def test_text_that_does_not_fit_the_input_buffer_is_typed_in_parts(fake_cluster: RunningCluster) -> None:
    await fake_cluster.vm("vm1").console_write(b"hash all\r")

    events = (await seen(fake_cluster, "alpha/kvm"))["events"]
    assert [event for event in events if event.startswith("typed")] == ["typed 'hash'", "typed ' all'", "typed '\\r'"]


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",
        b"\x82\xa5token\xa1\xff\xa4what\xa4stop",
        b"\x83\xa5token\xa1x\xa4what\xa1y\xa9arguments\x81\xa1z" + b"\x91" * 5000 + b"\xc0",
        b"",
    ],
    ids=["no message", "no text", "deep", "empty"],
)
async def test_s5_what_is_no_request_ends_its_connection_and_nothing_else(
    fake_cluster: RunningCluster, body: bytes
) -> None:
    async with await trio.open_unix_socket(str(fake_cluster.paths.launcher_socket)) as stream:
        await stream.send_all(LENGTH.pack(len(body)) + body)
        with trio.fail_after(5):
            # How deep a decoder goes differs between versions of Python: what is read is refused for its token.
            assert await stream.receive_some(1) in (b"", b"\0")
    assert (await fake_cluster.status()).healthy


async def test_s5_a_process_of_the_cluster_is_not_even_listened_to(fake_cluster: RunningCluster) -> None:
    """Landlock does not keep it from connecting: it must not be able to hold on to the launcher's descriptors."""
    path = str(fake_cluster.paths.launcher_socket)
    assert await fake_cluster.process("alpha/kvm").query("ask-launcher", {"path": path}, 2.0) == b""


async def test_an_order_whose_arguments_cannot_be_used_is_answered(fake_cluster: RunningCluster) -> None:
    for arguments in ({"target": "alpha/kvm", "query": "seen", "seconds": "x"}, {}):
        with pytest.raises(UserError, match="query: bad arguments: "):
            await fake_cluster.order("query", arguments)
    with pytest.raises(UserError, match="break: bad arguments: "):
        await fake_cluster.order("break", {"text": "any", "nth": float("inf")})
    assert (await fake_cluster.status()).healthy


async def test_an_order_without_the_token_of_the_run_directory_is_refused(fake_cluster: RunningCluster) -> None:
    stream = await trio.open_unix_socket(str(fake_cluster.paths.launcher_socket))
    async with stream:
        await stream.send_all(frame(Request("not the token", "stop")))
        (n_bytes,) = LENGTH.unpack(await stream.receive_some(LENGTH.size))
        response = msgspec.msgpack.decode(await stream.receive_some(n_bytes), type=Response)

    assert response.error is not None
    assert "the token does not fit" in response.error
    assert fake_cluster.paths.token_file.stat().st_mode & 0o077 == 0
    assert (await fake_cluster.status()).healthy


def test_cluster_in_the_foreground_goes_on_when_nobody_reads_its_output(own_directories: Path) -> None:
    command = [sys.executable, "-m", "deploy.cli", "up", str(MINIMAL), "--name", "unread"]
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True) as launcher:
        os.close(writing)
        assert launcher.stderr is not None
        assert launcher.stderr.readline() == "Ctrl-C stops the cluster.\n"
        assert json.loads(pefbox("status", "--json").stdout)["healthy"]
        launcher.send_signal(signal.SIGINT)
        assert "Traceback" not in launcher.stderr.read()
    assert list((own_directories / "pefbox").iterdir()) == []


@pytest.mark.cold
async def test_launcher_that_breaks_says_so_in_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_directories: Path
) -> None:
    """Broken by what no code of its own expects."""
    (tmp_path / "sitecustomize.py").write_text(
        "import deploy.supervise as s\n"
        "def broken(run, child):\n"
        "    raise RuntimeError('unforeseen')\n"
        "s._ready = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")

    with pytest.raises(UserError, match=r"^the launcher broke: RuntimeError: unforeseen: see .*launcher\.log$"):
        async with cluster(MINIMAL, service_module=FAKE_SERVICE):
            pass

    assert list((own_directories / "pefbox").iterdir()) == []
