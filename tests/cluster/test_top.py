"""`pefbox top` of a real cluster: for scripts, and on a terminal that is small and then smaller."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import trio

from deploy.api import RunningCluster

SECONDS = 15.0
TOP = [sys.executable, "-m", "deploy.cli", "top"]


def printed(*options: str) -> str:
    done = subprocess.run([*TOP, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_a_terminal(rows: int, columns: int) -> bytes:
    """What `top` draws until it has shown the VM, and after Ctrl-C."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [*TOP, "--interval", "0.1"], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + SECONDS
    try:
        while shown.count(b"vm1") < 2 and time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                shown += os.read(master, 4096)
        process.send_signal(signal.SIGINT)
        status = process.wait(SECONDS)
    finally:
        process.kill()
        process.wait()
        while select.select([master], [], [], 0)[0]:
            try:
                shown += os.read(master, 4096)
            except OSError:
                break
        os.close(master)
    assert status == 130
    return shown


async def test_top_shows_what_a_cluster_does_in_any_terminal(minimal_cluster: RunningCluster) -> None:
    await minimal_cluster.vm("vm1").wait_state("running")
    frame = json.loads(await trio.to_thread.run_sync(printed, "--once", "--json", "--interval", "0.2"))
    text = await trio.to_thread.run_sync(printed, "--once", "--interval", "0.1")
    small = await trio.to_thread.run_sync(on_a_terminal, 8, 40)

    (host,) = frame["hosts"]
    processes = [*host["processes"], *host["vms"][0]["processes"]]
    assert [row["target"] for row in processes] == ["alpha/ultravisor", "alpha/kvm", "vm1/qemu", "vm1/guest"]
    for row in processes:
        assert row["calls_per_second"] >= 0
        assert row["resident_bytes"] > 1 << 20
        assert row["open_calls"] is not None
    assert host["vms"][0]["pages"]["normal"] > 0 or host["vms"][0]["secure"]
    assert "vm vm1" in text and "running" in text
    assert "\x1b" not in text
    assert b"vm1" in small and b"Traceback" not in small
    assert small.rstrip().endswith(b"\x1b[?1049l")


async def test_l1_a_process_that_is_stopped_stands_there_as_such(minimal_cluster: RunningCluster) -> None:
    await minimal_cluster.process("alpha/kvm").stop()
    await minimal_cluster.process("alpha/kvm").wait_state("stopped")

    frame = json.loads(await trio.to_thread.run_sync(printed, "--once", "--json", "--interval", "0.1"))

    kvm = frame["hosts"][0]["processes"][1]
    assert (kvm["state"], kvm["calls_per_second"], kvm["open_calls"]) == ("stopped", None, None)
    await minimal_cluster.process("alpha/kvm").resume()
