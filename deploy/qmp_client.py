"""One command to a machine's own monitor and its answer: what `pefbox qmp VM CMD [ARGS]` does.

Plain blocking sockets: it talks to one server for one moment. The protocol is QMP (QEMU `docs/interop/qmp-spec.rst`);
the server ends every message with a line end, so a line is a message here.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from protocol.errors import HostFault, UserError

MAX_LINE_BYTES = 1024 * 1024
_READ_BYTES = 65536


class QmpRefusal(UserError):
    """The monitor answered with an error; `error_class` and `description` are its own."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        self.command, self.error_class, self.description = command, error_class, description
        super().__init__(f"{command}: {error_class}: {description}")


def execute(path: str, command: str, arguments: dict[str, Any] | None = None, timeout_seconds: float = 10.0) -> Any:  # noqa: ANN401
    """Run one command on the monitor that listens at `path`; returns what it returned, as plain objects.

    `timeout_seconds` bounds the whole exchange. Raises QmpRefusal for an error answer, HostFault when the monitor
    cannot be reached, does not answer in time or does not speak QMP.
    """
    deadline = time.monotonic() + timeout_seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(path)
            messages = _messages(connection, deadline)
            if "QMP" not in next(messages):
                raise HostFault(f"monitor {path}: no QMP greeting")
            _ask(connection, messages, "qmp_capabilities", None)
            return _ask(connection, messages, command, arguments)
        except TimeoutError:
            raise HostFault(f"monitor {path}: no answer within {timeout_seconds:g} s") from None
        except (OSError, EOFError) as error:
            raise HostFault(f"monitor {path}: {error}") from None


def arguments_from_words(words: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command from a command line: one JSON object, or words `key=value`.

    A value that is JSON is taken as such (`size=4`, `on=true`), else as a string. Raises UserError.
    """
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        return _object(words[0])
    arguments: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise UserError(f"argument '{word}': expected key=value, or one JSON object")
        if key in arguments:
            raise UserError(f"argument '{key}' is given twice")
        arguments[key] = _value(text)
    return arguments


def result_text(result: object) -> str:
    """The result of a command as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(result), indent=2).decode()


def _object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise UserError(f"arguments: not a JSON object: {error}") from None


def _value(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return text


def _ask(
    connection: socket.socket, messages: Iterator[dict[str, Any]], command: str, arguments: dict[str, Any] | None
) -> object:
    request: dict[str, Any] = {"execute": command, "id": command}
    if arguments:
        request["arguments"] = arguments
    connection.sendall(msgspec.json.encode(request) + b"\n")
    for message in messages:
        if "return" in message and message.get("id") == command:
            return message["return"]
        error = message.get("error")
        if isinstance(error, dict):
            raise QmpRefusal(command, str(error.get("class")), str(error.get("desc")))
    raise EOFError("closed")


def _messages(connection: socket.socket, deadline: float) -> Iterator[dict[str, Any]]:
    """The messages of the server, events included, until it closes; raises EOFError then."""
    buffer = b""
    while True:
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            try:
                yield msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.MsgspecError as error:
                raise HostFault(f"the monitor sent no QMP message: {error}") from None
        if len(buffer) > MAX_LINE_BYTES:
            raise HostFault("the monitor sent a line without end")
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        connection.settimeout(remaining)
        piece = connection.recv(_READ_BYTES)
        if not piece:
            raise EOFError("closed by the monitor before it answered")
        buffer += piece
