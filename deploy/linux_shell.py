"""The shell of a guest's Linux, by its terminal: commands and their output."""

from __future__ import annotations

import itertools

import trio

from deploy.api import Vm
from protocol.errors import UserError

PROMPT = "# \x1b[6n"
"""busybox asks the terminal where its cursor is."""
BOOT_SECONDS = 180.0
COMMAND_SECONDS = 120.0
_READ_SECONDS = 0.3


class LinuxShell:
    """A shell at its prompt: one command at a time."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._numbers = itertools.count(1)

    async def until_prompt(self, since: int = 0) -> str:
        """What the VM wrote from character `since` to its prompt; raises UserError when it ends before."""
        shown, text = b"", ""
        with trio.move_on_after(BOOT_SECONDS):
            while not text.endswith(PROMPT):
                data, since = await self._vm.console_read(since, _READ_SECONDS)
                shown += data
                text = shown.decode(errors="replace").replace("\r\n", "\n")
                if not data and (row := await self._vm.row()).state not in ("starting", "running"):
                    raise UserError(f"{self._vm.name} is {row.state} before its shell: {text[-300:]!r}")
            return text
        raise UserError(f"{self._vm.name}: no shell within {BOOT_SECONDS:g} s: {text[-300:]!r}")

    async def run(self, command: str) -> str:
        """The output of one command line; raises UserError when it does not end."""
        number = next(self._numbers)
        begin, end = f"output {number}\n", f"done {number}\n"
        since = await self._end()
        # Written so that the echo of the line is not taken for the marks.
        await self._vm.console_write(f"echo out''put {number}; {command}; echo do''ne {number}\r".encode())
        shown, text = b"", ""
        with trio.move_on_after(COMMAND_SECONDS):
            while not (end in text and text.endswith(PROMPT)):
                data, since = await self._vm.console_read(since, _READ_SECONDS)
                shown += data
                text = shown.decode(errors="replace").replace("\r\n", "\n")
            return text.partition(begin)[2].partition(end)[0].removesuffix("\n")
        raise UserError(f"{self._vm.name}: {command!r} did not end within {COMMAND_SECONDS:g} s: {text[-300:]!r}")

    async def _end(self) -> int:
        """How many characters the terminal has shown so far."""
        since = 0
        while True:
            data, since = await self._vm.console_read(since)
            if not data:
                return since
