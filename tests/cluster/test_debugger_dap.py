"""`pefbox debug --dap`: an editor's protocol with debugpy in a confined process, and what an editor leaves behind."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import trio

from deploy.api import RunningCluster, cluster
from services.guest import processor
from services.guest.processor import Processor
from services.kvm import vm as kvm_vm
from shared.typed_text import TypedText
from tests.cluster.dap_client import DapClient, connect
from tests.cluster.debugging import PEFBOX, refusal_of
from tests.cluster.test_debugger import states, stays_held, wait_for, wait_held
from tests.cluster.test_debugger_prompt import KVM, MINIMAL, works


async def open_port(running: RunningCluster, target: str, directory: Path) -> int:
    """The port that `pefbox debug --dap` prints."""
    command = [*PEFBOX, "debug", "--dap", target, "--cluster", running.name]
    done = await trio.run_process(command, cwd=directory, capture_stdout=True)
    host, _, port = done.stdout.decode().strip().partition(":")
    assert host == "127.0.0.1"
    return int(port)


async def test_an_editor_attaches_twice_stops_at_a_line_and_vanishes(tmp_path: Path) -> None:
    async with cluster(MINIMAL, state_dir=tmp_path / "s", debug=True, debuggable=("vm1/guest",)) as running:
        await running.vm("vm1").console_command("pages")
        port = await open_port(running, KVM, tmp_path)
        entries = json.loads((tmp_path / ".vscode" / "launch.json").read_text())["configurations"]
        assert [entry["name"] for entry in entries] == [f"pefbox {KVM}"]
        assert entries[0]["connect"] == {"host": "127.0.0.1", "port": port}
        await check_stops_at_a_line(running, port)
        await check_holds_for_long(running, port)
        await check_a_vanished_editor_leaves_nothing_stopped(running, port)
        await check_a_vanished_editor_leaves_nothing_evaluated(running, port)
        await check_one_at_a_time(running, port)
        await check_debugpy_is_listened_for_once(running, port, tmp_path)
        await check_time_of_a_guest_stands_still(running, await open_port(running, "vm1/guest", tmp_path))
        assert '"internal error"' not in running.process(KVM).log()


async def stop_in_type_in(running: RunningCluster, client: DapClient) -> None:
    """A breakpoint where kvm is given console input, which is met."""
    path = str(kvm_vm.__file__)
    line = kvm_vm.Vm.type_in.__code__.co_firstlineno + 2
    answer = await client.ask("setBreakpoints", source={"path": path}, breakpoints=[{"line": line}])
    assert answer["breakpoints"][0]["verified"]
    async with trio.open_nursery() as nursery:

        async def type_in() -> None:
            # The answer waits for the editor.
            await running.process(KVM).query("console.write", {"vm": "vm1", **TypedText(b"").offer().arguments()}, 20.0)

        nursery.start_soon(type_in)
        stopped = await client.event("stopped")
        assert stopped["reason"] == "breakpoint"
        await wait_held(running, KVM)
        trace = await client.ask("stackTrace", threadId=stopped["threadId"])
        assert "type_in" in trace["stackFrames"][0]["name"]
        frame = trace["stackFrames"][0]["id"]
        evaluated = await client.ask("evaluate", expression="self.entry.name", frameId=frame, context="repl")
        assert evaluated["result"] == "'vm1'"
        await client.ask("setBreakpoints", source={"path": path}, breakpoints=[])
        await client.ask("continue", threadId=stopped["threadId"])
        await wait_for(running, KVM, "running", "a debugger is attached")


async def check_stops_at_a_line(running: RunningCluster, port: int) -> None:
    client = await connect(port)
    await client.attach()
    threads = (await client.ask("threads"))["threads"]
    assert "MainThread" in [thread["name"] for thread in threads]
    await stop_in_type_in(running, client)
    await client.ask("disconnect", terminateDebuggee=False)
    await client.stream.aclose()
    await works(running)


async def check_holds_for_long(running: RunningCluster, port: int) -> None:
    client = await connect(port)
    await client.attach()
    await client.ask("pause", threadId=1)
    stopped = await client.event("stopped")
    await stays_held(running, KVM)
    assert (await client.ask("stackTrace", threadId=stopped["threadId"]))["stackFrames"]
    await client.ask("disconnect", terminateDebuggee=False)
    await client.stream.aclose()
    await works(running)


async def check_a_vanished_editor_leaves_nothing_stopped(running: RunningCluster, port: int) -> None:
    client = await connect(port)
    await client.attach()
    await client.ask("pause", threadId=1)
    await client.event("stopped")
    await wait_held(running, KVM)
    await client.stream.send_all(b"Content-Length: 1000\r\n\r\n{")
    await client.stream.aclose()
    await works(running)


async def check_a_vanished_editor_leaves_nothing_evaluated(running: RunningCluster, port: int) -> None:
    for endless in ("while True: pass", "[None for _ in iter(int, 1)]", "__import__('time').sleep(1000)"):
        client = await connect(port)
        await client.attach()
        await client.ask("pause", threadId=1)
        thread = (await client.event("stopped"))["threadId"]
        frame = (await client.ask("stackTrace", threadId=thread))["stackFrames"][0]["id"]
        await client.send("evaluate", expression=endless, frameId=frame, context="repl")
        await trio.sleep(0.5)
        assert (await states(running))[KVM][0] == "debugged"
        await client.stream.aclose()
        await works(running)


async def check_one_at_a_time(running: RunningCluster, port: int) -> None:
    client = await connect(port)
    await client.attach()
    second = await connect(port)
    with trio.fail_after(5):
        assert await second.stream.receive_some(1) == b""
    await second.stream.aclose()
    assert refusal_of(running, "debug", {"target": KVM}) == f"{KVM} has a debugger already"
    await client.stream.aclose()
    await works(running)


async def check_debugpy_is_listened_for_once(running: RunningCluster, port: int, directory: Path) -> None:
    assert await open_port(running, KVM, directory) == port
    other = 1 if port != 1 else 2
    refused = refusal_of(running, "debug-port", {"target": KVM, "port": other})
    assert refused == f"{KVM} listens on 127.0.0.1:{port} already, and debugpy does so once a process"
    assert "listens for editors already" in refusal_of(running, "debug", {"target": KVM})


async def check_time_of_a_guest_stands_still(running: RunningCluster, port: int) -> None:
    client = await connect(port)
    await client.attach()
    line = Processor._patience_ms.__code__.co_firstlineno + 1
    await client.ask("setBreakpoints", source={"path": processor.__file__}, breakpoints=[{"line": line}])
    thread = (await client.event("stopped"))["threadId"]
    await wait_held(running, "vm1/guest")
    times = [await guest_time_ns(client, thread) for _ in range(2)]
    assert times[0] == times[1]
    await client.ask("disconnect", terminateDebuggee=False)
    await client.stream.aclose()
    await works(running)


async def guest_time_ns(client: DapClient, thread: int) -> int:
    frames = (await client.ask("stackTrace", threadId=thread))["stackFrames"]
    frame = next(frame["id"] for frame in frames if "_loop" in frame["name"])
    answer = await client.ask("evaluate", expression="self._clock.now_ns()", frameId=frame, context="repl")
    return int(answer["result"])


async def test_a_process_that_ends_under_an_editor_takes_nothing_with_it(tmp_path: Path) -> None:
    async with cluster(MINIMAL, state_dir=tmp_path / "s", debug=True) as running:
        await running.vm("vm1").console_command("pages")
        qemu = await connect(await open_port(running, "vm1/qemu", tmp_path))
        kvm = await connect(await open_port(running, KVM, tmp_path))
        await qemu.attach()
        await kvm.attach()
        await qemu.send("disconnect", terminateDebuggee=True)
        await running.process("vm1/qemu").wait_state("gone")
        await running.process(KVM).kill()
        await running.process(KVM).wait_state("failed")
        for client in (qemu, kvm):
            with trio.fail_after(5):
                while await client.stream.receive_some(65536):
                    pass
            await client.stream.aclose()
        await wait_for(running, "alpha/ultravisor", "running", "")


def test_a_cluster_that_does_not_run_gets_one_line_and_no_launch_entry(tmp_path: Path) -> None:
    command = [*PEFBOX, "debug", "--dap", KVM, "--cluster", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / ".vscode").exists()
