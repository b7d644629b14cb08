"""UV_ESMB_GET_FILE: the secure VM reads each byte of a file once, in order."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.codes import UCode
from services.ultravisor.esm_files import EsmFiles, EsmFilesState, pack_name, unpack_name
from shared.esm_blob import MAX_FILE_BYTES
from shared.esm_crypto import new_symkey, seal

CONTENT = bytes(range(150))
NAME = pack_name("crypttab")


def files_with(content: bytes = CONTENT) -> EsmFiles:
    symkey = new_symkey()
    return EsmFiles.of_blob(symkey, {"crypttab": seal(symkey, content), "other": seal(symkey, b"")})


def data_of(words: tuple[int, ...]) -> bytes:
    return b"".join(word.to_bytes(8, "big") for word in words)


def test_a_file_is_read_in_pieces_of_64_bytes_until_none_is_left() -> None:
    files = files_with()
    counts: list[int] = []
    content = b""

    while not counts or counts[-1]:
        count, words = files.get(len(content), NAME, pid=1)
        counts.append(count)
        content += data_of(words)[:count]

    assert counts == [64, 64, 22, 0]
    assert content == CONTENT


def test_registers_behind_the_last_byte_are_zero() -> None:
    count, words = files_with(b"abc").get(0, NAME, pid=1)

    assert (count, data_of(words)) == (3, b"abc" + bytes(61))


def test_an_offset_that_was_read_is_refused_for_ever() -> None:
    files = files_with()
    files.get(0, NAME, pid=1)

    assert files.get(0, NAME, pid=1)[0] == UCode.U_PARAMETER
    assert files.get(63, NAME, pid=1)[0] == UCode.U_PARAMETER
    assert files.get(64, NAME, pid=1)[0] == 64


def test_a_reader_may_skip_but_then_not_go_back() -> None:
    files = files_with()

    count, words = files.get(100, NAME, pid=1)

    assert data_of(words)[:count] == CONTENT[100:]
    assert files.get(64, NAME, pid=1)[0] == UCode.U_PARAMETER


@pytest.mark.parametrize("offset", [150, 151, 1 << 63, (1 << 64) - 1])
def test_an_offset_past_the_end_gives_nothing_and_ends_the_file(offset: int) -> None:
    files = files_with()

    assert files.get(offset, NAME, pid=1) == (0, (0,) * 8)
    assert files.get(149, NAME, pid=1)[0] == UCode.U_PARAMETER
    assert files.get(150, NAME, pid=1)[0] == 0


def test_another_process_is_refused_once_one_began() -> None:
    files = files_with()
    files.get(0, NAME, pid=7)

    assert files.get(64, NAME, pid=8)[0] == UCode.U_PARAMETER
    assert files.get(64, NAME, pid=7)[0] == 64


def test_files_are_read_independently() -> None:
    files = files_with()
    files.get(0, NAME, pid=1)

    assert files.get(0, pack_name("other"), pid=2) == (0, (0,) * 8)


@pytest.mark.parametrize("name", ["", "crypttab2", "CRYPTTAB", "../crypttab"])
def test_a_name_that_is_no_file_is_refused_and_leaves_no_trace(name: str) -> None:
    files = files_with()
    before = msgspec.msgpack.encode(files.save())

    assert files.get(0, pack_name(name), pid=1) == (UCode.U_PARAMETER, (0,) * 8)
    assert msgspec.msgpack.encode(files.save()) == before


@settings(deadline=None)
@given(st.lists(st.integers(-(1 << 70), 1 << 70), max_size=12), st.integers(-(1 << 70), 1 << 70))
def test_any_registers_are_answered(registers: list[int], offset: int) -> None:
    assert files_with().get(offset, registers, pid=1) == (UCode.U_PARAMETER, (0,) * 8)


@settings(deadline=None)
@given(st.integers(-(1 << 70), 1 << 70))
def test_any_offset_is_answered(offset: int) -> None:
    code, _ = files_with().get(offset, NAME, pid=1)

    assert code == (min(max(len(CONTENT) - offset, 0), 64) if offset >= 0 else UCode.U_PARAMETER)


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=64))
def test_a_name_survives_its_registers(name: str) -> None:
    assert unpack_name(pack_name(name)) == name


def test_a_name_is_packed_with_its_first_byte_highest() -> None:
    assert pack_name("file-1") == (int.from_bytes(b"file-1\0\0", "big"), *[0] * 7)


def test_a_name_of_more_than_64_bytes_does_not_fit() -> None:
    with pytest.raises(ValueError, match="longer than 64"):
        pack_name("n" * 65)


def test_read_positions_survive_a_save_and_a_load() -> None:
    files = files_with()
    files.get(0, NAME, pid=3)

    saved = msgspec.msgpack.decode(msgspec.msgpack.encode(files.save()), type=EsmFilesState)
    loaded = EsmFiles.load(saved)

    assert loaded.get(0, NAME, pid=3)[0] == UCode.U_PARAMETER
    assert data_of(loaded.get(64, NAME, pid=3)[1]) == CONTENT[64:128]


class ReadOnce(RuleBasedStateMachine):
    """Whatever is asked, no byte is handed out twice and none comes from another place."""

    def __init__(self) -> None:
        super().__init__()
        self.content = bytes(n % 251 for n in range(700))
        self.files = files_with(self.content)
        self.handed_out: list[int] = []

    @rule(offset=st.integers(0, 800), pid=st.integers(0, 2))
    def read(self, offset: int, pid: int) -> None:
        count, words = self.files.get(offset, NAME, pid)
        if count > 0:
            assert data_of(words)[:count] == self.content[offset : offset + count]
            self.handed_out += range(offset, offset + count)

    @invariant()
    def every_byte_at_most_once_and_rising(self) -> None:
        assert self.handed_out == sorted(set(self.handed_out))


TestReadOnce = ReadOnce.TestCase
TestReadOnce.settings = settings(deadline=None)


def test_the_largest_file_is_read_whole() -> None:
    content = b"x" * MAX_FILE_BYTES
    files = files_with(content)

    assert sum(files.get(offset, NAME, pid=1)[0] for offset in range(0, MAX_FILE_BYTES, 64)) == MAX_FILE_BYTES
