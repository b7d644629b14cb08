"""A shell of a guest's Linux on its console, for tests."""

from __future__ import annotations

from deploy.api import RunningCluster, Vm
from tests.cluster.vm_files import console_end, console_until

PROMPT = "/ # "


async def shell(vm: Vm, command: str) -> str:
    """The output of one command."""
    since = await console_end(vm)
    await vm.console_write(f"{command}; echo do''ne\r".encode())
    # With the prompt: whoever waits for the next one must not find this one.
    text = await console_until(vm, f"done\r\n{PROMPT}", since=since, seconds=30)
    output = text.partition(f"{command}; echo do''ne\r\n")[2].partition("done\r\n")[0]
    return output.strip().replace("\r\n", "\n")


async def power_off(running: RunningCluster, vm: Vm) -> None:
    """`poweroff` ends the VM cleanly."""
    await vm.console_write(b"poweroff -f\r")
    row = await vm.wait_state("off", seconds=30)
    assert not row.secure
    assert (await running.process("vm1/qemu").row()).state == "running"
