"""Clusters that start warm: forks of a process that has loaded what they need."""

from __future__ import annotations

import os
import select
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from deploy.api import cluster
from deploy.client import DetachedStart, connect, start_detached
from deploy.launch_server import LaunchServer
from deploy.launcher_process import LauncherProcess
from deploy.manifest import clean_run_dir
from protocol.errors import UserError
from protocol.template import NO_PROCESS, decode_pid, encode_pid
from tests.cluster.conftest import FAKE_SERVICE, MINIMAL
from tests.cluster.two_hosts import children_of, command_line, is_alive, until

END_SECONDS = 10.0
TARGETS = ("alpha/ultravisor", "alpha/kvm", "vm1/qemu", "vm1/guest")


@pytest.fixture
def server() -> Iterator[LaunchServer]:
    """One of this test alone."""
    with LaunchServer() as running:
        yield running


def start_of(name: str, service_module: str | None = FAKE_SERVICE) -> DetachedStart:
    return DetachedStart(MINIMAL, name, service_module=service_module)


@contextmanager
def warm(server: LaunchServer, name: str, service_module: str | None = FAKE_SERVICE) -> Iterator[LauncherProcess]:
    """The launcher of a cluster that is up, and that ends well."""
    _, launcher = start_detached(start_of(name, service_module), server)
    try:
        yield launcher
        with connect(name) as client:
            client.call("stop")
        assert status_of(launcher) == 0
    finally:
        launcher.kill()


def status_of(launcher: LauncherProcess) -> int | None:
    """How it ended; None when it does not end."""
    if launcher.poll() is None:
        with launcher.end_fd() as fd:
            select.select([fd], [], [], END_SECONDS)
    return launcher.poll()


def title(pid: int) -> str:
    return command_line(pid).rstrip(b"\0").decode()


def test_a_warm_cluster_is_as_any_other(server: LaunchServer) -> None:
    with warm(server, "warm", None) as launcher:
        assert os.getsid(launcher.pid) == launcher.pid
        assert title(launcher.pid) == "pefbox launcher"
        processes = {title(pid): pid for pid in children_of(launcher.pid)}
        assert processes.keys() == {"pefbox template", *(f"pefbox warm {target}" for target in TARGETS)}
        for pid in processes.values():
            assert os.getsid(pid) == pid
            assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t0" in Path(f"/proc/{launcher.pid}/status").read_text()


def test_the_environment_is_that_of_who_starts_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in it; and nothing of the server's."""
    monkeypatch.setenv("PEFBOX_FAKE", "silent-vm1/guest")
    with LaunchServer() as server, tempfile.TemporaryDirectory(prefix="pb-") as runtime:
        monkeypatch.delenv("PEFBOX_FAKE")
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        monkeypatch.setenv("NOT_TEXT", os.fsdecode(b"\xff\xfe"))
        for number in range(4):
            monkeypatch.setenv(f"LONG_{number}", "x" * 100_000)
        with warm(server, "elsewhere"):
            assert (Path(runtime) / "pefbox" / "elsewhere").is_dir()


def open_files(pid: int) -> set[str]:
    """What its descriptors are that only one process has: sockets and pipes."""
    links = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return {link for link in links if link.startswith(("pipe:", "socket:", "anon_inode:[pidfd]"))}


@pytest.mark.skipif(os.geteuid() != 0, reason="the files of protected processes are listed for root alone")
async def test_a_cluster_holds_nothing_of_the_server_or_of_another_cluster(server: LaunchServer) -> None:
    """And its processes hold none of the pipes to its owner."""
    with warm(server, "first") as first:
        async with cluster(MINIMAL, server=server) as second:
            launcher = second.launcher_pid
            others = open_files(server.pid) | open_files(first.pid)
            assert {link.partition(":")[0] for link in others} == {"anon_inode", "pipe", "socket"}
            for pid in (launcher, *children_of(launcher)):
                assert not open_files(pid) & others
            assert len([link for link in open_files(launcher) if link.startswith("pipe:")]) == 2
            for pid in (server.pid, *children_of(launcher)):
                assert not any(link.startswith("pipe:") for link in open_files(pid))


def test_clusters_that_start_at_once_each_get_their_own(server: LaunchServer) -> None:
    names = ["one", "two", "three"]
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        found = list(pool.map(lambda name: stack.enter_context(warm(server, name)), names))
        assert len({launcher.pid for launcher in found}) == len(names)


def test_a_cluster_that_does_not_come_up_is_the_launchers_line(server: LaunchServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.toml: "):
        start_detached(DetachedStart(tmp_path / "missing.toml"), server)

    with warm(server, "after"):
        pass


async def test_a_launcher_that_is_killed_is_told_as_such(server: LaunchServer, own_directories: Path) -> None:
    name, launcher = start_detached(start_of("killed", None), server)
    processes = children_of(launcher.pid)

    launcher.kill()

    with ThreadPoolExecutor() as pool:
        assert {waiting.result() for waiting in [pool.submit(launcher.wait) for _ in range(3)]} == {-signal.SIGKILL}
    await until(lambda: not any(is_alive(pid) for pid in processes), "their end")
    assert clean_run_dir(own_directories / "pefbox" / name) is not None


def test_a_cluster_that_nobody_waits_for_ends(server: LaunchServer, own_directories: Path) -> None:
    reading, writing = os.pipe()
    with open(os.devnull, "wb") as errors:
        launcher = server.begin(start_of("unheard").arguments(), os.environ, writing, errors.fileno(), None)
    os.close(writing)
    os.close(reading)

    assert status_of(launcher) == 0
    assert list((own_directories / "pefbox").iterdir()) == []


@pytest.mark.parametrize("end", [LaunchServer.close, lambda server: os.kill(server.pid, signal.SIGSTOP)])
async def test_a_cluster_is_stopped_as_well_without_its_server(
    tmp_path: Path, own_directories: Path, end: Callable[[LaunchServer], None]
) -> None:
    with LaunchServer() as server:
        async with cluster(MINIMAL, state_dir=tmp_path / "state", server=server) as running:
            assert title(running.launcher_pid) == "pefbox launcher"
            end(server)
            assert await running.wait_launcher(0.1) is None
            assert await running.down() == 0
        assert list((own_directories / "pefbox").iterdir()) == []


def test_a_server_that_has_died_is_one_clear_line(server: LaunchServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(UserError, match=r"^no launcher: the launch server has ended: it was killed$"):
            start_detached(start_of("never"), server)


def test_a_server_that_cannot_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['setproctitle'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        LaunchServer() as server,
        pytest.raises(UserError, match=r"^no launcher: the launch server has ended: ModuleNotFoundError: "),
    ):
        start_detached(start_of("never"), server)


def test_a_closed_server_is_one_clear_line(server: LaunchServer) -> None:
    server.close()
    with pytest.raises(UserError, match=r"^no launcher: the launch server has ended: it was closed$"):
        start_detached(start_of("never"), server)


async def test_a_server_that_does_not_answer_is_given_up(server: LaunchServer) -> None:
    """For good: what it answers later would be taken for the answer to another order."""
    server._orders.settimeout(0.2)
    os.kill(server.pid, signal.SIGSTOP)

    for _ in range(2):
        with pytest.raises(UserError, match=r"^no launcher: the launch server has ended: it did not answer in 30 s$"):
            start_detached(start_of("never"), server)
    await until(lambda: not is_alive(server.pid), "its end")


async def test_an_order_that_is_broken_off_leaves_no_cluster_and_no_wrong_answer(
    server: LaunchServer, monkeypatch: pytest.MonkeyPatch, own_directories: Path
) -> None:
    started: list[int] = []

    def interrupted(orders: socket.socket, n_bytes: int, n_files: int) -> None:
        answer, pidfds, _, _ = receive(orders, n_bytes, n_files)
        os.close(pidfds[0])
        started.append(decode_pid(answer))
        raise KeyboardInterrupt

    receive = socket.recv_fds
    with monkeypatch.context() as patch:
        patch.setattr(socket, "recv_fds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start_detached(start_of("broken-off"), server)

    with pytest.raises(UserError, match=r"^no launcher: the launch server has ended: an order was broken off$"):
        start_detached(start_of("next"), server)
    await until(lambda: not is_alive(started[0]), "its end")
    assert list((own_directories / "pefbox").iterdir()) == []


def test_a_machine_without_processes_is_one_clear_line(server: LaunchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is played: no limit of processes binds root."""
    ours, played = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, played:
        monkeypatch.setattr(server, "_orders", ours)
        played.send(encode_pid(NO_PROCESS))
        with pytest.raises(UserError, match=r"^no launcher: the machine has no room for another process or open file$"):
            start_detached(start_of("never"), server)
