"""The `pefbox` command without a cluster: help, mistakes, exit statuses, and what it prints of records and logs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import msgpack  # type: ignore[import-untyped]
import pytest

from deploy.calls_view import CallDecoder, RecordedFrame, RecordReader
from deploy.cli import COMMANDS, pefbox
from deploy.cli_balloon import target_of
from deploy.cli_support import printable
from deploy.cli_vm import hex_lines
from deploy.logs_view import LogReader, as_text, in_order, log_files
from deploy.tables import balloon_facts, link_line
from protocol import wire
from protocol.errors import UserError
from protocol.hcalls import HCALLS
from protocol.ucalls import UV_RETURN
from protocol.wire import MessageKind

H_PUT_TCE = HCALLS.by_name["H_PUT_TCE"]


def run(*arguments: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(runtime), "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_can_be_imported_and_explains_itself(name: str) -> None:
    command = pefbox.get_command(click.Context(pefbox), name)

    assert command is not None
    assert command.help


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["status"], 1, "pefbox: no cluster runs; start one with: pefbox up CLUSTER.toml\n"),
        (["status", "--cluster", "x"], 1, 'pefbox: no cluster "x" runs\n'),
        (["up", "/nowhere.toml"], 1, "pefbox: /nowhere.toml: No such file or directory\n"),
        (["down"], 0, ""),
        (["clean"], 0, ""),
        (["stauts"], 2, 'Error: no command "stauts", did you mean "status"?\n'),
        (["logs"], 2, "Error: Missing argument 'TARGET'.\n"),
        (["link", "alpha"], 2, "Error: Missing argument 'HOST'.\n"),
        (["link", "alpha", "beta", "--latency", "x"], 2, "'--latency': 'x' is not a valid float.\n"),
        (["link", "alpha", "beta", "--bandwidth", "x"], 1, "such as 64M/s; 0: no limit\n"),
    ],
)
def test_mistake_is_one_line_with_its_exit_status(
    arguments: list[str], status: int, message: str, tmp_path: Path
) -> None:
    result = run(*arguments, runtime=tmp_path)

    assert result.returncode == status
    assert result.stderr.endswith(message)
    assert "Traceback" not in result.stderr


def test_a_link_is_one_line_of_what_it_does() -> None:
    plain = {"between": ["alpha", "beta"], "latency_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0, "down": False}
    shaped = {"latency_ms": 50.0, "jitter_ms": 2.5, "loss": 0.01, "down": True}

    assert link_line({**plain, "bandwidth_bytes_per_second": 0}) == "link alpha - beta  up"
    assert link_line({**plain, **shaped, "bandwidth_bytes_per_second": 8 << 20}) == (
        "link alpha - beta  down  latency 50 ms  jitter 2.5 ms  bandwidth 8 MiB/s  loss 0.01"
    )


def test_doctor_prints_json_and_no_colour_into_a_pipe(tmp_path: Path) -> None:
    as_json, as_text = run("doctor", "--json", runtime=tmp_path), run("doctor", runtime=tmp_path)

    assert {finding["name"] for finding in json.loads(as_json.stdout)} >= {"Python", "/dev/shm", "Landlock"}
    assert "\x1b" not in as_text.stdout


def frame(link: str, direction: str, kind: MessageKind, number: int, correlation: int, body: object) -> RecordedFrame:
    return RecordedFrame(1000 * correlation, link, direction, wire.encode(kind, number, correlation, 5, body), None)


def test_call_of_a_guest_is_shown_with_names_and_how_long_it_took() -> None:
    decoder = CallDecoder("vm1", 7)
    call = frame("vm1:kvm-guest.1", "in", MessageKind.CALL, H_PUT_TCE.number, 9, [0, 0x80000000, 0x1000, 0x2003])
    reply = RecordedFrame(12_000, call.link, "out", wire.encode(MessageKind.REPLY, H_PUT_TCE.number, 9, 5, [0]), None)

    rows = [decoder.describe(entry) for entry in (call, reply)]

    assert rows[0]["text"] == f"{H_PUT_TCE.describe([0x80000000, 0x1000, 0x2003])} of vcpu 0"
    assert (rows[1]["text"], rows[1]["took_us"]) == ("H_PUT_TCE -> H_SUCCESS", 3.0)


def test_host_link_shows_the_calls_of_one_lpid_and_uv_return_ends_them() -> None:
    decoder = CallDecoder("vm1", 7)
    link = "alpha:ultravisor-kvm.1"
    mine = frame(link, "out", MessageKind.CALL, H_PUT_TCE.number, 77, [7, 0, 1, 2, 3])
    other = frame(link, "out", MessageKind.CALL, H_PUT_TCE.number, 78, [8, 0, 1, 2, 3])
    back = frame(link, "in", MessageKind.CALL, UV_RETURN.number, 90, [0, 77, 0])

    assert (decoder.concerns(mine), decoder.concerns(other), decoder.concerns(back)) == (True, False, False)
    assert decoder.describe(mine)["text"].endswith(" of lpid 7 vcpu 0")
    assert decoder.concerns(back)
    assert decoder.describe(back)["took_us"] == 13.0
    assert not decoder.concerns(back)


def test_frame_that_is_no_message_is_shown_as_malformed() -> None:
    row = CallDecoder("vm1", 1).describe(RecordedFrame(1, "vm1:kvm-guest.1", "in", b"\x00", None))

    assert row["kind"] == "malformed"


def test_record_that_still_grows_gives_each_entry_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "record"
    reader = RecordReader(path)
    entry = msgpack.packb([5, "vm1:kvm-guest.1", "in", b"frame", None])
    assert list(reader.read()) == []

    path.write_bytes(entry[:7])
    assert list(reader.read()) == []
    with path.open("ab") as file:
        file.write(entry[7:] + entry)

    assert [(found.t_ns, found.frame) for found in reader.read()] == [(5, b"frame")] * 2
    assert list(reader.read()) == []


def test_logs_of_several_processes_come_in_order_of_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    (log / "vm1.guest.log").write_text('{"timestamp":"2026-01-01T00:00:02Z","event":"b"}\n{"timest')
    (log / "vm1.qemu.log").write_text('{"timestamp":"2026-01-01T00:00:01Z","event":"a","n":1}\n')

    entries = in_order([LogReader(path) for path in log_files(tmp_path, "vm1")])

    assert [entry["event"] for entry in entries] == ["a", "b"]
    assert as_text(entries[0]).endswith("a n=1")
    assert log_files(tmp_path, "vm1/qemu") == [log / "vm1.qemu.log"]
    with pytest.raises(UserError, match="there are: vm1/guest, vm1/qemu"):
        log_files(tmp_path, "vm2")


def test_a_balloon_s_size_is_one_that_the_vm_can_have() -> None:
    assert target_of("64M", "vm1", 64 << 20) == 64 << 20
    assert target_of("1048577", "vm1", 64 << 20) == 1048577
    for size, problem in {
        "": '"" is no size',
        "-1": '"-1" is no size',
        "1.5M": "no size; allowed: bytes, or a text such as 128M",
        "0": "0 is not possible; vm1 can have up to 64 MiB",
        "65M": "65M is not possible; vm1 can have up to 64 MiB",
    }.items():
        with pytest.raises(UserError, match=re.escape(problem)):
            target_of(size, "vm1", 64 << 20)


def test_a_balloon_that_does_nothing_says_why() -> None:
    facts = {"actual_bytes": 64 << 20, "target_bytes": 33 << 19, "discarded_bytes": 0, "reason": "it is stopped"}

    assert balloon_facts(facts) == "actual 64 MiB  target 16.5 MiB  discarded 0 MiB  it is stopped"


def test_text_of_a_guest_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31m\x9bb\tc\n") == "a?[31m?b\tc\n"


def test_bytes_are_shown_in_rows_of_sixteen() -> None:
    assert hex_lines(b"A" * 17) == [
        "0000  41 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41  AAAAAAAAAAAAAAAA",
        "0010  41                                               A",
    ]
