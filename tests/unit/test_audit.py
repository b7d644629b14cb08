"""The audit log: a chain of lines that shows where it was changed."""

from __future__ import annotations

import io
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.audit_commands import audit, check_audit
from deploy.audit_commands import key as key_command
from protocol.errors import HostFault, UserError
from services.ultravisor.audit import (
    FIRST_PREDECESSOR,
    MAX_LINE_BYTES,
    AuditHead,
    AuditLog,
    open_audit_file,
    read_lines,
    verify,
)
from services.ultravisor.identity import ensure_keys

Opener = Callable[[], AuditLog]


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Opener]:
    """Opens the log of host alpha, as at each start of its ultravisor."""
    opened: list[int] = []

    def open_log() -> AuditLog:
        opened.append(open_audit_file(tmp_path, "alpha"))
        return AuditLog(opened[-1], now=lambda: 1_700_000_000.25)

    yield open_log
    for fd in opened:
        os.close(fd)


def log_file(tmp_path: Path) -> Path:
    return tmp_path / "alpha/audit.jsonl"


def lines_of(tmp_path: Path) -> list[bytes]:
    return log_file(tmp_path).read_bytes().splitlines(keepends=True)


def broken_line(lines: list[bytes], newest: AuditHead | None = None) -> int | None:
    return verify(io.BytesIO(b"".join(lines)), newest).broken_line


def test_a_line_says_who_when_what_and_what_came_before(reopen: Opener, tmp_path: Path) -> None:
    log = reopen()
    log.write("vm1", "esm-refused", {"reason": "kernel digest differs", "lpid": 3})
    log.write("vm1", "share", {"gfn": 17, "pages": [1, 2], "ok": True, "more": None})

    first, second = (json.loads(line) for line in lines_of(tmp_path))

    assert first["facts"] == {"reason": "kernel digest differs", "lpid": 3}
    assert (first["sequence"], first["vm"], first["event"]) == (1, "vm1", "esm-refused")
    assert first["time"] == "2023-11-14T22:13:20.250000+00:00"
    assert first["previous"] == FIRST_PREDECESSOR
    assert second["previous"] != FIRST_PREDECESSOR


def test_the_file_is_for_its_owner_alone(reopen: Opener, tmp_path: Path) -> None:
    reopen()

    assert log_file(tmp_path).stat().st_mode & 0o777 == 0o600


def test_an_untouched_log_is_intact_up_to_its_head(reopen: Opener, tmp_path: Path) -> None:
    log = reopen()
    for number in range(20):
        log.write("vm1", "share", {"gfn": number})

    report = verify(io.BytesIO(b"".join(lines_of(tmp_path))), log.head)

    assert report.broken_line is None
    assert report.head == log.head == AuditHead(20, log.head.hash)


def test_the_chain_goes_on_after_a_restart(reopen: Opener, tmp_path: Path) -> None:
    first = reopen()
    first.write("vm1", "esm", {})
    second = reopen()

    assert second.head == first.head
    second.write("vm1", "terminate", {})

    assert broken_line(lines_of(tmp_path), second.head) is None
    assert second.head.sequence == 2


@settings(deadline=None)
@given(position=st.integers(0, 4), offset=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_changed_bit_is_found_at_its_line(position: int, offset: int, bit: int) -> None:
    lines, head = _chain(5)
    changed = bytearray(lines[position])
    changed[offset % (len(changed) - 1)] ^= 1 << bit
    altered = [*lines[:position], bytes(changed), *lines[position + 1 :]]

    broken = broken_line(altered, head)

    # A line whose own record of its predecessor was changed accuses the pair.
    assert broken is not None
    assert broken in (position, position + 1)


def test_a_rewritten_line_is_named() -> None:
    lines, head = _chain(5)
    lines[2] = lines[2].replace(b'"gfn":2', b'"gfn":9')

    report = verify(io.BytesIO(b"".join(lines)), head)

    assert report.broken_line == 3
    assert report.reason == "is not the line that line 4 recorded as its predecessor"


def test_a_removed_an_added_and_a_moved_line_are_named() -> None:
    lines, head = _chain(5)

    assert broken_line([*lines[:2], *lines[3:]], head) == 3
    assert broken_line([*lines[:3], lines[2], *lines[3:]], head) == 4
    assert broken_line([lines[0], lines[2], lines[1], *lines[3:]], head) == 2
    assert broken_line(lines[1:], head) == 1


def test_lines_cut_off_at_the_end_are_seen_by_who_knows_the_newest() -> None:
    lines, head = _chain(5)

    assert broken_line(lines[:3]) is None
    assert broken_line(lines[:3], head) == 4


def test_a_log_rewritten_as_a_whole_is_seen_by_who_knows_the_newest() -> None:
    _, head = _chain(5)
    forged, _ = _chain(5, event="nothing-happened")

    assert broken_line(forged) is None
    assert broken_line(forged, head) == 5


@pytest.mark.parametrize(
    "line", [b"\n", b"null\n", b"{}\n", b"\xff\n", b"[" * 5000 + b"\n", b"x" * (MAX_LINE_BYTES + 10) + b"\n", b"{"]
)
def test_what_is_no_line_is_named(line: bytes) -> None:
    lines, _ = _chain(2)

    assert broken_line([*lines, line]) == 3


def _chain(n_lines: int, event: str = "share") -> tuple[list[bytes], AuditHead]:
    fd = os.memfd_create("audit")
    try:
        log = AuditLog(fd, now=lambda: 0.0)
        os.lseek(fd, 0, os.SEEK_END)
        for number in range(n_lines):
            log.write("vm1", event, {"gfn": number})
        return os.pread(fd, 1 << 20, 0).splitlines(keepends=True), log.head
    finally:
        os.close(fd)


@pytest.mark.parametrize("secret", [b"x", bytearray(b"x"), memoryview(b"x"), object()])
def test_bytes_never_enter_however_deep(secret: object, reopen: Opener, tmp_path: Path) -> None:
    log = reopen()

    for facts in ({"page": secret}, {"pages": [secret]}, {"pages": {"first": (secret,)}}):
        with pytest.raises(TypeError, match="cannot be"):
            log.write("vm1", "share", facts)  # type: ignore[arg-type]
    assert lines_of(tmp_path) == []


_FACTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 80), 1 << 80) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), _FACTS, max_size=4), max_size=5), st.text(), st.text())
def test_whatever_a_peer_said_makes_an_intact_line(facts: list[dict[str, object]], vm: str, event: str) -> None:
    fd = os.memfd_create("audit")
    try:
        log = AuditLog(fd, now=lambda: 0.0)
        for line in facts:
            log.write(vm, event, line)  # type: ignore[arg-type]
        report = verify(io.BytesIO(os.pread(fd, 1 << 24, 0)), log.head)
    finally:
        os.close(fd)

    assert report.broken_line is None
    assert report.head.sequence == len(facts)


def test_text_that_utf8_cannot_hold_is_escaped(reopen: Opener, tmp_path: Path) -> None:
    reopen().write("vm\ud800", "esm", {"name\ud800": "\udcff"})

    (line,) = (json.loads(raw) for raw in lines_of(tmp_path))

    assert line["vm"] == "vm\\ud800"
    assert line["facts"] == {"name\\ud800": "\\udcff"}


def test_long_texts_are_shortened_and_endless_facts_left_out(reopen: Opener, tmp_path: Path) -> None:
    log = reopen()
    log.write("vm1", "esm", {"reason": "x" * 100_000})
    log.write("vm1", "esm", {"list": ["x" * 1000] * 100})

    first, second = (json.loads(line) for line in lines_of(tmp_path))

    assert first["facts"]["reason"] == "x" * 1024 + "..."
    assert list(second["facts"]) == ["facts_too_long_bytes"]
    assert second["facts"]["facts_too_long_bytes"] > MAX_LINE_BYTES


def test_a_full_disk_is_an_error_and_the_log_goes_on_when_there_is_space(reopen: Opener, tmp_path: Path) -> None:
    log = reopen()
    log.write("vm1", "esm", {})
    before = lines_of(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit in the middle of the next line: half of it is written, then the machine refuses. Python ignores SIGXFSZ.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0]) + 20, hard))
    try:
        for _ in range(3):
            with pytest.raises(HostFault, match="cannot be written"):
                log.write("vm1", "share", {})
        assert lines_of(tmp_path) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    log.write("vm1", "terminate", {})

    events = [line.event for line in read_lines(io.BytesIO(b"".join(lines_of(tmp_path))))]
    assert events == ["esm", "audit-lines-lost", "terminate"]
    assert json.loads(lines_of(tmp_path)[1])["facts"] == {"lines": 3}
    assert log.lost_lines == 0
    assert broken_line(lines_of(tmp_path), log.head) is None


def test_a_closed_descriptor_is_an_error_and_no_crash(tmp_path: Path) -> None:
    fd = open_audit_file(tmp_path, "alpha")
    log = AuditLog(fd, now=lambda: 0.0)
    os.close(fd)

    with pytest.raises(HostFault):
        log.write("vm1", "esm", {})
    assert log.lost_lines == 1


def test_half_a_line_of_a_crash_is_removed_and_noted(reopen: Opener, tmp_path: Path) -> None:
    reopen().write("vm1", "esm", {})
    with log_file(tmp_path).open("ab") as file:
        file.write(b'{"sequence":2,"ti')

    log = reopen()

    second = json.loads(lines_of(tmp_path)[1])
    assert (second["event"], second["facts"]) == ("audit-torn-line-removed", {"bytes": 17})
    assert broken_line(lines_of(tmp_path), log.head) is None


def test_a_log_whose_newest_line_is_damaged_is_not_continued(reopen: Opener, tmp_path: Path) -> None:
    reopen().write("vm1", "esm", {})
    with log_file(tmp_path).open("ab") as file:
        file.write(b"not a line\n")

    with pytest.raises(HostFault, match="newest line of the audit log is damaged"):
        reopen()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="cannot open the audit log"):
        open_audit_file(tmp_path / "file", "alpha")


# -- pefbox audit, pefbox key ---------------------------------------------------------------------------------


def test_the_command_shows_the_lines_of_a_vm_from_all_hosts(tmp_path: Path) -> None:
    for host, now in (("alpha", 20.0), ("beta", 10.0)):
        fd = open_audit_file(tmp_path, host)
        log = AuditLog(fd, now=lambda now=now: now)  # type: ignore[misc]
        log.write("vm1", f"seen-by-{host}", {"lpid": 1})
        log.write("vm2", "other", {})
        os.close(fd)

    text = CliRunner().invoke(audit, ["vm1", "--state", str(tmp_path)])
    every = CliRunner().invoke(audit, ["--state", str(tmp_path), "--json"])

    assert text.exit_code == 0
    assert [line.split()[1:4] for line in text.stdout.splitlines()] == [
        ["beta", "vm1", "seen-by-beta"],
        ["alpha", "vm1", "seen-by-alpha"],
    ]
    assert "lpid=1" in text.stdout
    assert [json.loads(line)["host"] for line in every.stdout.splitlines()] == ["beta", "beta", "alpha", "alpha"]


def test_of_a_vm_about_which_nothing_was_noted_the_command_says_so(reopen: Opener, tmp_path: Path) -> None:
    log = reopen()
    before = CliRunner().invoke(audit, ["vm9", "--state", str(tmp_path)])
    log.write("vm2", "esm", {})
    log.write("vm1", "esm", {})
    after = CliRunner().invoke(audit, ["vm9", "--state", str(tmp_path)])

    assert before.stderr == "nothing was noted about vm9; the logs are about no VM yet\n"
    assert after.stderr == "nothing was noted about vm9; the logs are about vm1, vm2\n"
    assert (after.stdout, after.exit_code) == ("", 0)


def test_the_command_tells_of_a_changed_log_and_still_shows_it(reopen: Opener, tmp_path: Path) -> None:
    log = reopen()
    log.write("vm1", "share", {"gfn": 1})
    log.write("vm1", "share", {"gfn": 2})
    log_file(tmp_path).write_bytes(log_file(tmp_path).read_bytes().replace(b'"gfn":1', b'"gfn":7'))

    result = CliRunner().invoke(audit, ["vm1", "--state", str(tmp_path)])

    assert result.exit_code == 1
    assert "audit.jsonl: line 1 is not the line that line 2 recorded" in result.stderr
    assert "gfn=7" in result.stdout
    assert check_audit(tmp_path, "alpha", log.head) is not None


def test_a_forged_line_cannot_steer_the_terminal(tmp_path: Path) -> None:
    line = {
        "sequence": 1,
        "time": "\x1b[2J",
        "vm": "v\r",
        "event": "\x07",
        "facts": {"\x1b]0;x": "\x9b"},
        "previous": "",
    }
    (tmp_path / "alpha").mkdir()
    log_file(tmp_path).write_text(json.dumps(line) + "\n")

    result = CliRunner().invoke(audit, ["--state", str(tmp_path)])

    assert all(character.isprintable() for character in result.stdout.rstrip("\n"))


def test_a_state_directory_without_logs_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    result = CliRunner().invoke(audit, ["vm1", "--state", str(tmp_path)])

    assert isinstance(result.exception, UserError)
    assert "no audit log" in str(result.exception)


def test_the_key_command_prints_the_public_key(tmp_path: Path) -> None:
    ensure_keys(tmp_path, "alpha")

    text = CliRunner().invoke(key_command, ["alpha", "--state", str(tmp_path)])
    as_json = CliRunner().invoke(key_command, ["alpha", "--state", str(tmp_path), "--json"])
    unknown = CliRunner().invoke(key_command, ["beta", "--state", str(tmp_path)])

    assert text.stdout.startswith("-----BEGIN PUBLIC KEY-----\n")
    assert json.loads(as_json.stdout)["pem"] == text.stdout
    assert isinstance(unknown.exception, UserError)
