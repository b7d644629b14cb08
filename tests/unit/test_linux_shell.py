"""The shell of a guest's Linux as a terminal shows it: echoed lines, outputs, prompts, and messages of the kernel."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import cast

import pytest

from deploy.api import Vm
from deploy.linux_shell import PROMPT, LinuxShell
from protocol.errors import UserError

KERNEL_MESSAGE = "[   20.880865] random: head: uninitialized urandom read (8192 bytes read)\r\n"
_LINE = re.compile(r"echo out''put (\d+); (.*); echo do''ne \d+\r")


class PlayedVm:
    """A terminal whose shell answers each command with `answers`, and the kernel then says `message`."""

    name = "vm1"

    def __init__(self, answers: dict[str, str], message: str = "") -> None:
        self.shown = f"/ {PROMPT}{message}"
        self._answers, self._message = answers, message

    async def console_read(self, since: int = 0, _wait_seconds: float = 0.0) -> tuple[bytes, int]:
        """All that there is: a busy machine reads seldom."""
        data = self.shown.encode()[since:]
        return data, since + len(data)

    async def console_write(self, data: bytes) -> None:
        """Echo the line and run it."""
        line = data.decode()
        match = _LINE.fullmatch(line)
        assert match is not None
        number, command = match.groups()
        output = self._answers[command]
        self.shown += f"{line}\noutput {number}\r\n{output}done {number}\r\n/ {PROMPT}{self._message}"


@pytest.mark.parametrize("message", ["", KERNEL_MESSAGE])
async def test_an_output_ends_at_its_mark_whatever_the_kernel_says_after_the_prompt(
    autojump_clock: object, message: str
) -> None:
    answers = {"hostname": "guest\r\n", "true": "", "seq 2": "1\r\n2\r\n"}
    shell = LinuxShell(cast("Vm", PlayedVm(answers, message)))

    await shell.until_prompt()

    assert [await shell.run(command) for command in answers] == ["guest", "", "1\n2"]


class StuckVm(PlayedVm):
    """One whose commands begin and never end."""

    async def console_write(self, data: bytes) -> None:
        """As PlayedVm."""
        self.shown += f"{data.decode()}\noutput 1\r\n{PROMPT}still here\r\n"

    async def row(self) -> SimpleNamespace:
        """Its row of `status`."""
        return SimpleNamespace(state="running")


async def test_a_command_that_never_ends_is_named(autojump_clock: object) -> None:
    shell = LinuxShell(cast("Vm", StuckVm({})))
    await shell.until_prompt()

    with pytest.raises(UserError, match="vm1: the end of 'sleep' did not come within 120 s"):
        await shell.run("sleep")


class MovingVm(PlayedVm):
    """One that stands still while it moves, in the middle of a command."""

    def __init__(self, states: list[str]) -> None:
        super().__init__({"hostname": "guest\r\n"})
        self._states = states
        self._typed = b""

    async def console_write(self, data: bytes) -> None:
        """It is answered later."""
        self._typed = data

    async def row(self) -> SimpleNamespace:
        """Its row of `status`; the command goes on after the last state."""
        state = self._states.pop(0)
        if not self._states:
            await super().console_write(self._typed)
        return SimpleNamespace(state=state)


async def test_a_command_goes_on_where_its_vm_has_moved(autojump_clock: object) -> None:
    shell = LinuxShell(cast("Vm", MovingVm(["running", "paused", "paused", "running"])))
    await shell.until_prompt()

    assert await shell.run("hostname") == "guest"


@pytest.mark.parametrize("state", ["off", "failed"])
async def test_a_vm_that_ended_is_named(autojump_clock: object, state: str) -> None:
    shell = LinuxShell(cast("Vm", MovingVm(["running", state, "running"])))
    await shell.until_prompt()

    with pytest.raises(UserError, match=f"vm1 is {state} before the end of 'hostname'"):
        await shell.run("hostname")
