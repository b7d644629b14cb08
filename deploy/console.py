"""The two ways to talk to a console of a VM: raw, for a person, and line by line, for a script.

Output is asked with a bounded wait (`console.read`); `since` counts every character since the VM began, so
nothing is lost between two questions while the buffer holds it.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deploy.client import LauncherClient
from protocol.errors import UserError
from shared.typed_text import TypedText

LEAVE = b"\x1d"
"""Ctrl-]."""

_WAIT_SECONDS = 1.0
_QUIET_SECONDS = 1.0
_QUERY_MARGIN_SECONDS = 0.5
_INPUT_BYTES = 1024
_FULL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class ConsolePlace:
    """Which console is meant: the process that keeps it, and how a query names it there."""

    name: str
    target: str
    arguments: dict[str, str]


def terminal_of(vm: str) -> ConsolePlace:
    """The VM's first terminal, which the kvm of its host keeps, on whichever that is."""
    return ConsolePlace(vm, f"{vm}/kvm", {"vm": vm})


def port_of(vm: str, port: str) -> ConsolePlace:
    """A virtio-console, which the VM's qemu keeps."""
    return ConsolePlace(f"{vm} {port}", f"{vm}/qemu", {"port": port})


class Terminal:
    """A console of a VM; `next` is how far it was read."""

    def __init__(self, client: LauncherClient, place: ConsolePlace) -> None:
        self._client, self._place = client, place
        self.next = 0

    def read(self, wait_seconds: float) -> bytes:
        """New output; empty when there is none within `wait_seconds`."""
        arguments = {**self._place.arguments, "since": self.next, "wait_s": wait_seconds}
        seconds = wait_seconds + _QUERY_MARGIN_SECONDS
        answer = self._ask("console.read", arguments, seconds)
        self.next = int(answer["next"])
        return bytes(answer["data"])

    def write(self, data: bytes) -> None:
        """Type `data`; waits while the VM's input buffer is full."""
        typed = TypedText(data)
        while not typed.is_taken:
            answer = self._ask("console.write", {**self._place.arguments, **typed.offer().arguments()})
            typed.took(int(answer["taken"]))
            if not typed.is_taken:
                time.sleep(_FULL_SECONDS)

    def _ask(self, what: str, arguments: dict[str, Any], seconds: float = _QUERY_MARGIN_SECONDS) -> Any:  # noqa: ANN401
        try:
            return self._client.query(self._place.target, what, arguments, seconds)
        except UserError:
            # The VM may just have moved; then its new host knows.
            return self._client.query(self._place.target, what, arguments, seconds)


def raw_console(reading: LauncherClient, writing: LauncherClient, place: ConsolePlace) -> None:
    """Connect the operator's terminal until Ctrl-]; its settings are restored on every way out."""
    stdin = sys.stdin.fileno()
    settings = termios.tcgetattr(stdin)
    sys.stderr.write(f"console of {place.name}; Ctrl-] leaves\r\n")
    ended = threading.Event()
    broken: list[UserError] = []

    def show() -> None:
        try:
            _copy_output(Terminal(reading, place), ended.is_set)
        except UserError as error:
            broken.append(error)
        finally:
            ended.set()

    try:
        tty.setraw(stdin)
        reader = threading.Thread(target=show, daemon=True)
        reader.start()
        _copy_keys(stdin, Terminal(writing, place), ended.is_set)
    finally:
        ended.set()
        termios.tcsetattr(stdin, termios.TCSADRAIN, settings)
    reader.join(_WAIT_SECONDS + 2 * _QUERY_MARGIN_SECONDS)
    sys.stderr.write("\n")
    if broken:
        raise broken[0]


def _copy_output(terminal: Terminal, ended: Callable[[], bool]) -> None:
    while not ended():
        data = terminal.read(_WAIT_SECONDS)
        if data:
            os.write(sys.stdout.fileno(), data)


def _copy_keys(stdin: int, terminal: Terminal, ended: Callable[[], bool]) -> None:
    while not ended():
        readable, _, _ = select.select([stdin], [], [], 0.2)
        if not readable:
            continue
        keys = os.read(stdin, _INPUT_BYTES)
        before, leave, _ = keys.partition(LEAVE)
        if before:
            terminal.write(before)
        if leave or not keys:
            return


def line_console(reading: LauncherClient, writing: LauncherClient, place: ConsolePlace) -> None:
    """Send each line of standard input and print what the VM writes, until both are silent for a while."""
    output, keys = Terminal(reading, place), Terminal(writing, place)
    _print_until_quiet(output)
    for line in sys.stdin.buffer:
        keys.write(line)
        _print_until_quiet(output)


def _print_until_quiet(terminal: Terminal) -> None:
    while data := terminal.read(_QUIET_SECONDS):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
