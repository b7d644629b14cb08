"""The prompt of `pefbox debug`: what it shows, what ends it, who is not let in."""

from __future__ import annotations

import os
import pty
import random
import socket
import struct
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, cluster
from deploy.client import LauncherClient
from deploy.operator_protocol import DEBUG
from protocol import debugging as said
from tests.cluster.debugging import PEFBOX, at_prompt, interrupt, refusal_of
from tests.cluster.test_debugger import wait_for, wait_held

MINIMAL = Path(__file__).parents[2] / "deploy" / "clusters" / "minimal.toml"
KVM = "alpha/kvm"


async def works(running: RunningCluster) -> None:
    """The VM answers, and nothing is held."""
    for process in ("alpha/kvm", "alpha/ultravisor", "vm1/qemu", "vm1/guest"):
        await wait_for(running, process, "running", "")
    assert (await running.vm("vm1").console_command("pages")).startswith("ok ")


async def test_the_prompt_shows_steps_evaluates_and_lets_go(tmp_path: Path) -> None:
    async with cluster(MINIMAL, state_dir=tmp_path / "s", debug=True, debuggable=("vm1/guest",)) as running:
        await running.vm("vm1").console_command("pages")
        await check_a_message_is_seen(running)
        await check_nothing_typed_ends_the_process(running)
        await check_an_operator_who_vanishes_leaves_nothing_held(running)
        await check_a_guest_is_stepped_in_its_processor(running)
        await check_the_terminal_of_a_person(running)


async def check_a_message_is_seen(running: RunningCluster) -> None:
    vm = running.vm("vm1")
    async with at_prompt(running, KVM) as operator:
        await operator.held()
        assert "nextmessage Go on, and stop" in await operator.command("help pefbox")
        tasks = await operator.command("tasks")
        assert "services.runtime.process.Runtime._run_link" in tasks
        assert "services/runtime/channel.py" in tasks
        assert "trio/_core" not in tasks

        await operator.type("nextmessage")
        await wait_for(running, KVM, "running", "a debugger is attached")
        await vm.console_write(b"pages\r")
        shown = await operator.held()
        assert "message " in shown
        assert "from vm1/" in shown
        assert "services/runtime/link.py" in shown
        assert " from vm1/" in await operator.command("message")
        assert "'vm1" in await operator.command("p self.id")
        first = await operator.command("next")
        assert "link.py" in first
        await operator.command("answer = 6 * 7")
        assert "42" in await operator.command("p answer")
        assert "ZeroDivisionError" in await operator.command("p 1 // 0")
        assert "serve" in await operator.command("where")
        await operator.leave()
    await works(running)


async def check_nothing_typed_ends_the_process(running: RunningCluster) -> None:
    for last in ("quit", "q", "exit", "EOF"):
        async with at_prompt(running, "vm1/qemu") as operator:
            await operator.held()
            for line in ("restart", "interact", "debug 1", "raise SystemExit", "import os", "p input()", "clear"):
                await operator.command(line)
            await operator.type(last)
            with trio.fail_after(10):
                assert await operator.process.wait() == 0
    await works(running)


async def check_an_operator_who_vanishes_leaves_nothing_held(running: RunningCluster) -> None:
    async with at_prompt(running, KVM) as operator:
        await operator.held()
        operator.process.kill()
        await works(running)
    async with at_prompt(running, KVM) as operator:
        await operator.held()
        await operator.type("while True: pass")
        await wait_held(running, KVM)
        operator.process.kill()
        await works(running)
    async with at_prompt(running, KVM) as operator:
        await operator.held()
        await operator.command("break services.kvm.vm.Vm.type_in")
        for endless in ("while True: pass", "__import__('time').sleep(1000)"):
            await operator.type(endless)
            await operator.interrupt()
            assert "KeyboardInterrupt" in await operator.held()
        await operator.type("continue")
        await wait_for(running, KVM, "running", "a debugger is attached")
        operator.process.kill()
        await works(running)


async def check_a_guest_is_stepped_in_its_processor(running: RunningCluster) -> None:
    async with at_prompt(running, "vm1/guest") as operator:
        await operator.held()
        assert "processor.py" in await operator.command("where")
        assert "'vcpu0'" in await operator.command("p __import__('threading').current_thread().name")
        time_ns = await operator.command("p self._processor._clock.now_ns() if hasattr(self, '_processor') else 0")
        assert time_ns.strip().isdigit()
        await operator.leave()
    await works(running)


async def check_the_terminal_of_a_person(running: RunningCluster) -> None:
    """On a terminal of 12 columns: Ctrl-C at the prompt and while the process runs, Ctrl-D at the end."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 5, 12, 0, 0))
    command = [*PEFBOX, "debug", KVM, "--cluster", running.name]
    process = await trio.lowlevel.open_process(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)

    def shown_until(mark: str) -> str:
        text = ""
        while mark not in text.replace("\r", "").replace("\n", ""):
            text += os.read(ours, 4096).decode(errors="replace")
        return text

    try:
        with trio.fail_after(20):
            await trio.to_thread.run_sync(shown_until, "(alpha/kvm)", abandon_on_cancel=True)
            await interrupt(process)
            await trio.to_thread.run_sync(shown_until, "(alpha/kvm)", abandon_on_cancel=True)
            os.write(ours, b"continue\r")
            await wait_for(running, KVM, "running", "a debugger is attached")
            await interrupt(process)
            await trio.to_thread.run_sync(shown_until, "(alpha/kvm)", abandon_on_cancel=True)
            await wait_held(running, KVM)
            os.write(ours, b"\x04")
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)
    await works(running)


BUSY_PLACES = {
    "alpha/kvm": "services.runtime.link.Link._take_message",
    "alpha/ultravisor": "services.runtime.process._ControlLoop._take",
    "vm1/qemu": "services.runtime.link.Link._take_message",
    "vm1/guest": "services.guest.processor.Processor._loop",
}
N_ROUNDS = 4


@pytest.mark.slow
async def test_whenever_an_operator_presses_ctrl_c_and_goes_the_process_goes_on(tmp_path: Path) -> None:
    choice = random.Random(1)
    async with cluster(MINIMAL, state_dir=tmp_path / "s", debug=True, debuggable=("vm1/guest",)) as running:
        await running.vm("vm1").console_command("pages")
        for _ in range(N_ROUNDS):
            for target, place in BUSY_PLACES.items():
                await trio.to_thread.run_sync(type_at_random, running, target, place, choice)
            await works(running)


def type_at_random(running: RunningCluster, target: str, place: str, choice: random.Random) -> None:
    """A session with a breakpoint that is met often, in which nobody waits for a prompt; it must end."""
    with LauncherClient(running.paths.run_dir) as client:
        client.call(DEBUG, {"target": target})
        stream = client.take_over()
        stream.settimeout(10)
        frames: list[said.ToProcess] = [said.Line(f"break {place}")]
        for _ in range(choice.randrange(60)):
            line = choice.choice(("continue", "next", "step", "nextmessage", "p 1", "sum(range(9999))"))
            frames.append(choice.choice((said.Interrupt(), said.Line(line))))
        for frame in frames:
            stream.sendall(said.frame(frame))
            time.sleep(choice.choice((0, 0, choice.random() * 0.01)))
        stream.shutdown(socket.SHUT_WR)
        while stream.recv(65536):
            continue
        stream.close()


async def test_who_is_not_let_in_is_told_why_and_how_he_would_be(tmp_path: Path) -> None:
    async with cluster(MINIMAL, state_dir=tmp_path / "s", debuggable=("alpha/kvm", "vm1/guest")) as running:
        await running.vm("vm1").console_command("pages")
        for target, words in (
            ("alpha/ultravisor", "was not started debuggable: start the cluster with `pefbox up --debug`, or with"),
            ("vm1/qemu", "`--debuggable vm1/qemu`"),
            ("vm9/guest", "no process 'vm9/guest'; there are: alpha/ultravisor"),
        ):
            assert words in refusal_of(running, "debug", {"target": target})
            assert words in refusal_of(running, "debug-port", {"target": target})
        async with at_prompt(running, KVM) as operator:
            await operator.held()
            assert refusal_of(running, "debug", {"target": KVM}) == "alpha/kvm has a debugger already"
            assert refusal_of(running, "debug-port", {"target": KVM}) == "alpha/kvm has a debugger already"
            assert "alpha/kvm is debugged" in refusal_of(running, "query", {"target": KVM, "query": "statistics"})
            await operator.leave()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            taken = listener.getsockname()[1]
            refused = refusal_of(running, "debug-port", {"target": KVM, "port": taken})
            assert refused == f"port {taken} is in use: name another one, or none for any that is free"
        await running.process("vm1/guest").stop()
        await running.process("vm1/guest").wait_state("stopped")
        assert "vm1/guest is stopped" in refusal_of(running, "debug", {"target": "vm1/guest"})
        await running.process("vm1/guest").resume()
        await running.process("vm1/guest").wait_state("running")
        await works(running)
        await running.process("vm1/guest").kill()
        await running.process("vm1/guest").wait_state("failed")
        assert "vm1/guest is failed (killed by SIGKILL)" in refusal_of(running, "debug", {"target": "vm1/guest"})


async def test_the_end_of_a_held_process_and_of_the_cluster_end_the_session(tmp_path: Path) -> None:
    async with cluster(MINIMAL, state_dir=tmp_path / "s", debug=True) as running:
        async with at_prompt(running, "vm1/qemu") as operator:
            await operator.held()
            await running.process("vm1/qemu").kill()
            with trio.fail_after(10):
                await operator.process.wait()
        await running.process("vm1/qemu").wait_state("failed")
        async with at_prompt(running, "alpha/ultravisor") as operator:
            await operator.held()
            assert await running.down() == 0
            with trio.fail_after(10):
                await operator.process.wait()
