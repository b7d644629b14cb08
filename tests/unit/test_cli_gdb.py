"""How GDB is started on a port: connected before what its user asks for, in the byte order of whom there is."""

from __future__ import annotations

import pytest

from deploy.cli_gdb import _command

FACTS = {"host": "127.0.0.1", "port": 4711, "order": "big"}
CONNECT = ["-ex", "target remote 127.0.0.1:4711"]
ORDER = ["-iex", "set endian big"]
ALWAYS = ["gdb-multiarch", "-iex", "set remotetimeout 30"]


def test_gdb_connects_before_its_users_commands() -> None:
    assert _command(FACTS, ("-q", "-ex", "detach")) == [*ALWAYS, *ORDER, *CONNECT, "-q", "-ex", "detach"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("vmlinux",),
        ("-q", "vmlinux"),
        ("-ex", "detach", "vmlinux"),
        ("--se=vmlinux",),
        ("-s", "vmlinux"),
        ("--batch", "a"),
    ],
)
def test_the_byte_order_of_a_program_counts(arguments: tuple[str, ...]) -> None:
    assert _command(FACTS, arguments) == [*ALWAYS, *CONNECT, *arguments]


@pytest.mark.parametrize(
    "arguments", [(), ("-q",), ("-ex", "detach"), ("-x", "commands.gdb"), ("--eval-command=detach",), ("-ex",)]
)
def test_without_a_program_that_of_the_processor_does(arguments: tuple[str, ...]) -> None:
    assert _command(FACTS, arguments) == [*ALWAYS, *ORDER, *CONNECT, *arguments]


def test_an_order_that_nobody_knows_is_not_told() -> None:
    assert _command(FACTS | {"order": None}, ()) == [*ALWAYS, *CONNECT]
