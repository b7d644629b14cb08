"""The shell of a guest's Linux, by its terminal: commands and their output."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import trio

from deploy.api import Vm
from protocol.errors import UserError
from protocol.vm_state import VmState

PROMPT = "# \x1b[6n"
"""busybox asks the terminal where its cursor is."""
BOOT_SECONDS = 180.0
COMMAND_SECONDS = 120.0
_ENDED = (VmState.OFF.value, VmState.FAILED.value)
_READ_SECONDS = 0.3
_PAUSE_SECONDS = 0.02


class LinuxShell:
    """A shell at its prompt: one command at a time."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._numbers = itertools.count(1)
        self._since = 0

    async def until_prompt(self, since: int = 0) -> str:
        """What the VM wrote from character `since` to its prompt; raises UserError when it ends before."""
        self._since = since
        return await self._read_until(lambda text: PROMPT in text, "its shell's prompt", BOOT_SECONDS)

    async def silence_kernel(self) -> None:
        """Keep the kernel's messages off the terminal: in the middle of an output one would spoil it."""
        await self.run("dmesg -n 1")

    async def run(self, command: str) -> str:
        """The output of one command line; raises UserError when it does not end."""
        number = next(self._numbers)
        begin, end = f"output {number}\n", f"done {number}\n"
        # Written so that the echo of the line is not taken for the marks.
        await self._vm.console_write(f"echo out''put {number}; {command}; echo do''ne {number}\r".encode())
        text = await self._read_until(
            # The kernel may write after the prompt.
            lambda text: PROMPT in text.partition(end)[2],
            f"the end of {command!r}",
            COMMAND_SECONDS,
        )
        return text.partition(begin)[2].partition(end)[0].removesuffix("\n")

    async def _read_until(self, reached: Callable[[str], bool], what: str, seconds: float) -> str:
        """What the VM writes from here on, as soon as it has `reached` what is waited for."""
        shown, text = b"", ""
        with trio.move_on_after(seconds):
            while True:
                data, self._since = await self._vm.console_read(self._since, _READ_SECONDS)
                shown += data
                text = shown.decode(errors="replace").replace("\r\n", "\n")
                if reached(text):
                    return text
                if not data and (row := await self._vm.row()).state in _ENDED:
                    raise UserError(f"{self._vm.name} is {row.state} before {what}: {text[-300:]!r}")
                # It comes a character at a time.
                await trio.sleep(_PAUSE_SECONDS)
        raise UserError(f"{self._vm.name}: {what} did not come within {seconds:g} s: {text[-300:]!r}")
