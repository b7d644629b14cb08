"""The commands of the monitor, declared once: name, arguments, result, handler.

Decoding, the refusal of unknown arguments, `query-commands` and the documentation follow from the declarations. A
later part of the device model adds its own commands with `CommandTable.extended`.

Source: QEMU `qapi/control.json`, `qapi/misc.json`, `qapi/run-state.json`, `qapi/machine.json`.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from services.qemu.qmp.machine import CommandFailed, Monitored
from services.qemu.qmp.schema import (
    VERSION,
    BalloonInfo,
    BalloonTarget,
    Capabilities,
    CommandInfo,
    ErrorClass,
    NameInfo,
    Nothing,
    Schema,
    StatusInfo,
    VersionInfo,
)

OFFERED_CAPABILITIES: tuple[str, ...] = ()
"""No out-of-band execution: the second socket serves what must not wait."""

ArgumentsT = TypeVar("ArgumentsT", bound=Schema)
ResultT = TypeVar("ResultT")


class Phase(enum.Enum):
    """Where a session stands: commands are taken only after the capabilities are settled."""

    NEGOTIATION = "negotiation"
    COMMAND = "command"


@dataclass(slots=True)
class Context:
    """What a handler may reach: the machine, the table it stands in, and its session's phase."""

    monitored: Monitored
    commands: CommandTable
    phase: Phase = Phase.NEGOTIATION


@dataclass(frozen=True, slots=True)
class Command(Generic[ArgumentsT, ResultT]):
    """The declaration of one command."""

    name: str
    arguments: type[ArgumentsT]
    result: type[ResultT]
    run: Callable[[Context, ArgumentsT], Awaitable[ResultT]]
    phase: Phase = Phase.COMMAND


class CommandTable:
    """Commands by name."""

    def __init__(self, *commands: Command[Any, Any]) -> None:
        self._by_name = {command.name: command for command in commands}
        if len(self._by_name) != len(commands):
            raise ValueError("a command is declared twice")

    def __iter__(self) -> Iterator[Command[Any, Any]]:
        return iter(self._by_name.values())

    def find(self, name: str, phase: Phase) -> Command[Any, Any]:
        """The command of this name; raises CommandFailed when there is none or the phase is not its own."""
        command = self._by_name.get(name)
        if phase is Phase.NEGOTIATION and (command is None or command.phase is not phase):
            raise _not_found("Settle the capabilities first, with 'qmp_capabilities'")
        if command is None:
            raise _not_found(f"This monitor has no command '{name[:80]}'")
        if command.phase is not phase:
            raise _not_found("The capabilities of this session are settled already")
        return command

    def extended(self, *commands: Command[Any, Any]) -> CommandTable:
        """This table and more."""
        return CommandTable(*self, *commands)


def _not_found(description: str) -> CommandFailed:
    return CommandFailed(description, ErrorClass.COMMAND_NOT_FOUND)


async def qmp_capabilities(context: Context, arguments: Capabilities) -> Nothing:
    """End the negotiation; asking for what the greeting did not offer leaves it open."""
    for capability in arguments.enable:
        if capability not in OFFERED_CAPABILITIES:
            raise CommandFailed(f"Capability '{capability[:80]}' is not offered")
    context.phase = Phase.COMMAND
    return Nothing()


async def query_commands(context: Context, _arguments: Nothing) -> list[CommandInfo]:
    """Every command of this monitor."""
    return [CommandInfo(name=command.name) for command in context.commands]


async def query_version(_context: Context, _arguments: Nothing) -> VersionInfo:
    """What the greeting said."""
    return VERSION


async def query_name(context: Context, _arguments: Nothing) -> NameInfo:
    """The name of the virtual machine."""
    return NameInfo(name=context.monitored.name)


async def query_status(context: Context, _arguments: Nothing) -> StatusInfo:
    """What the machine does now."""
    state = await context.monitored.machine.status()
    return StatusInfo(running=state is state.RUNNING, status=state)


async def stop(context: Context, _arguments: Nothing) -> Nothing:
    """Stop the processor."""
    await context.monitored.machine.stop()
    return Nothing()


async def cont(context: Context, _arguments: Nothing) -> Nothing:
    """Let the processor run; refused in a state that only a reset leads out of."""
    state = await context.monitored.machine.status()
    if state.needs_reset:
        raise CommandFailed(f"The machine is in state '{state}' and goes on only after a reset")
    await context.monitored.machine.cont()
    return Nothing()


async def system_reset(context: Context, _arguments: Nothing) -> Nothing:
    """Reset the machine."""
    await context.monitored.machine.reset()
    return Nothing()


async def quit_machine(context: Context, _arguments: Nothing) -> Nothing:
    """End the process."""
    await context.monitored.machine.quit()
    return Nothing()


async def balloon(context: Context, arguments: BalloonTarget) -> Nothing:
    """Say how much memory the guest is to have; more than there is means all of it."""
    if arguments.value <= 0:
        raise CommandFailed("Parameter 'target' expects a size")
    await context.monitored.machine.set_balloon(arguments.value)
    return Nothing()


async def query_balloon(context: Context, _arguments: Nothing) -> BalloonInfo:
    """How much memory the guest has."""
    return BalloonInfo(actual=await context.monitored.machine.balloon())


COMMANDS = CommandTable(
    Command("qmp_capabilities", Capabilities, Nothing, qmp_capabilities, Phase.NEGOTIATION),
    Command("query-commands", Nothing, list[CommandInfo], query_commands),
    Command("query-version", Nothing, VersionInfo, query_version),
    Command("query-name", Nothing, NameInfo, query_name),
    Command("query-status", Nothing, StatusInfo, query_status),
    Command("stop", Nothing, Nothing, stop),
    Command("cont", Nothing, Nothing, cont),
    Command("system_reset", Nothing, Nothing, system_reset),
    Command("quit", Nothing, Nothing, quit_machine),
    Command("balloon", BalloonTarget, Nothing, balloon),
    Command("query-balloon", Nothing, BalloonInfo, query_balloon),
)
"""The commands of every pefbox machine."""
