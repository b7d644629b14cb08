"""The files of an ESM blob, as UV_ESMB_GET_FILE hands them to the secure VM.

A call names a file in eight registers, 64 bytes big-endian, NUL padded, and an offset; it gets up to 64 bytes and
their number. Each byte is handed out once: the first caller's process owns the file and its offsets only rise.
A file stays sealed until it is asked for and its plain bytes are kept nowhere.

Source: open-power/ultravisor `core/uvcall.c` (uv_esmb_get_file); open-power/svm-tools `esmb-get-file.c`.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import msgspec

from protocol.codes import UCode
from protocol.ucalls import ESM_FILE_CHUNK_BYTES
from shared.esm_blob import Sealed
from shared.esm_crypto import unseal

N_REGISTERS = 8

_REGISTERS = Struct(f">{N_REGISTERS}Q")
_U64 = (1 << 64) - 1
_NO_DATA = (0,) * N_REGISTERS


class EsmFileState(msgspec.Struct, frozen=False):
    """One file: sealed content, which process reads it (None before the first call), the next offset in bytes."""

    iv: bytes
    mac: bytes
    ciphertext: bytes
    reader_pid: int | None = None
    next_offset: int = 0


class EsmFilesState(msgspec.Struct, frozen=False):
    """All files of one secure VM and the key that opens them. Secret: goes into no log and to no host process."""

    symkey: bytes
    files: dict[str, EsmFileState]

    def __repr__(self) -> str:
        return f"EsmFilesState({len(self.files)} files)"


class EsmFiles:
    """The read-once files of one secure VM."""

    def __init__(self, state: EsmFilesState) -> None:
        self._state = state

    @classmethod
    def of_blob(cls, symkey: bytes, files: dict[str, Sealed]) -> EsmFiles:
        """Files that nobody has read yet."""
        states = {name: EsmFileState(sealed.iv, sealed.mac, sealed.ciphertext) for name, sealed in files.items()}
        return cls(EsmFilesState(symkey, states))

    @classmethod
    def load(cls, state: EsmFilesState) -> EsmFiles:
        """Files as `save` left them, read positions included."""
        return cls(state)

    def save(self) -> EsmFilesState:
        """The declared state. Holds the key of the blob: only for another ultravisor, encrypted."""
        return self._state

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files, which are no secret."""
        return tuple(self._state.files)

    def peek(self, name: str) -> bytes | None:
        """A file for the ultravisor itself, which counts as read by nobody; None when there is none."""
        file = self._state.files.get(name)
        return None if file is None else unseal(self._state.symkey, Sealed(file.iv, file.mac, file.ciphertext), "file")

    def get(self, offset: int, name_registers: Sequence[int], pid: int) -> tuple[int, tuple[int, ...]]:
        """Serve UV_ESMB_GET_FILE: R3 and R4..R11.

        `offset` in bytes and the name are the caller's registers, `pid` its PIDR. R3 is the number of bytes, 0 from
        the end of the file on, or U_PARAMETER: no such file, another process, or an offset already handed out.
        A call that fails changes nothing.
        """
        file = self._state.files.get(unpack_name(name_registers))
        if file is None or offset < file.next_offset or file.reader_pid not in (None, pid):
            return UCode.U_PARAMETER, _NO_DATA
        # The tag was checked at ESM, so this cannot refuse.
        plain = unseal(self._state.symkey, Sealed(file.iv, file.mac, file.ciphertext), "file")
        chunk = plain[offset : offset + ESM_FILE_CHUNK_BYTES]
        file.reader_pid = pid
        file.next_offset = min(offset, len(plain)) + len(chunk)
        return len(chunk), _REGISTERS.unpack(chunk.ljust(ESM_FILE_CHUNK_BYTES, b"\0"))


def pack_name(name: str) -> tuple[int, ...]:
    """The eight registers that name a file; raises ValueError for more than 64 bytes or a name not in ASCII."""
    raw = name.encode("ascii")
    if len(raw) > _REGISTERS.size:
        raise ValueError(f"{name!r} is longer than {_REGISTERS.size} bytes")
    return _REGISTERS.unpack(raw.ljust(_REGISTERS.size, b"\0"))


def unpack_name(registers: Sequence[int]) -> str:
    """The name in eight registers, up to the first NUL; "" (no file's name) for what is no name."""
    if len(registers) != N_REGISTERS:
        return ""
    raw = _REGISTERS.pack(*(value & _U64 for value in registers)).partition(b"\0")[0]
    return raw.decode("ascii") if raw.isascii() else ""
