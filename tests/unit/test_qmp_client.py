"""The blocking client of `pefbox qmp`: arguments from words, and servers that do not behave."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.qmp_client import QmpRefusal, arguments_from_words, execute, result_text
from protocol.errors import HostFault, UserError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
SETTLED = b'{"return": {}, "id": "qmp_capabilities"}\r\n'


class Server:
    """Sends fixed bytes to one client, keeps what it received, then closes when told."""

    def __init__(self, path: str, script: bytes, *, close: bool) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._script, self._close = script, close
        self._release = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            # A client that has seen enough hangs up while this still sends.
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(self._script)
            if not self._close:
                self._release.wait(10)

    def end(self) -> None:
        self._release.set()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "qmp.sock")


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        server.end()


def test_the_answer_is_found_between_events(path: str, servers: list[Server]) -> None:
    event = b'{"event": "STOP", "timestamp": {}}\r\n'
    answer = b'{"return": {"running": true}, "id": "query-status"}\r\n'
    servers.append(Server(path, GREETING + event + SETTLED + event + answer, close=False))

    assert execute(path, "query-status") == {"running": True}


def test_an_error_answer_is_a_refusal(path: str, servers: list[Server]) -> None:
    error = b'{"error": {"class": "GenericError", "desc": "no"}, "id": "stop"}\r\n'
    servers.append(Server(path, GREETING + SETTLED + error, close=False))

    with pytest.raises(QmpRefusal, match="stop: GenericError: no"):
        execute(path, "stop")


@pytest.mark.parametrize("script", [b"", GREETING, GREETING + SETTLED])
def test_a_server_that_stays_silent_is_left_in_time(path: str, servers: list[Server], script: bytes) -> None:
    servers.append(Server(path, script, close=False))

    with pytest.raises(HostFault, match="no answer within"):
        execute(path, "stop", timeout_seconds=0.2)


@pytest.mark.parametrize(
    "script", [b"", GREETING, GREETING + SETTLED, b"hello\n", b"{}\n", b"[]\n", b"x" * (2 * 1024 * 1024)]
)
def test_a_server_that_is_none_is_a_host_fault(path: str, servers: list[Server], script: bytes) -> None:
    servers.append(Server(path, script, close=len(script) < 1024))

    with pytest.raises(HostFault):
        execute(path, "stop", timeout_seconds=5)


def test_no_socket_is_a_host_fault(path: str) -> None:
    with pytest.raises(HostFault, match="No such file"):
        execute(path, "stop")


def test_arguments_are_words_or_one_object() -> None:
    assert arguments_from_words([]) == {}
    assert arguments_from_words(["a=1", "b=true", "c=text", "d=x=y", 'e="1"', "f="]) == {
        "a": 1,
        "b": True,
        "c": "text",
        "d": "x=y",
        "e": "1",
        "f": "",
    }
    assert arguments_from_words(['{"a": {"b": [1]}}']) == {"a": {"b": [1]}}


@pytest.mark.parametrize("words", [["a"], ["=1"], ["a=1", "a=2"], ["{bad}"], ["{} ", "a=1"]])
def test_arguments_that_make_no_sense_are_a_users_mistake(words: list[str]) -> None:
    with pytest.raises(UserError):
        arguments_from_words(words)


def test_a_result_is_printed_as_indented_json() -> None:
    assert result_text({"running": True}) == '{\n  "running": true\n}'
