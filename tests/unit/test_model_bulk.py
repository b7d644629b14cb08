"""A sequential read whose chunks nobody consumes for a while, as after the kernel's state was loaded."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any, cast

from services.guest.model.bulk import CHUNK_BYTES, DEPTH, BulkReader
from services.guest.model.state import KernelState, decode_state, encode_state
from services.guest.model.virtio_blk import BlkDriver, Finished

N_CHUNKS = 300


class PlayedDisk:
    """Takes every request; `cookies` are those that it has not answered."""

    translated = False

    def __init__(self) -> None:
        self.cookies: list[int] = []

    def submit(self, *request: Any) -> Generator[Any, list[int], bool]:  # noqa: ANN401
        self.cookies.append(request[-1])
        return True
        yield

    def kick(self) -> Generator[Any, list[int], None]:
        return
        yield


def read_on(reader: BulkReader, disk: PlayedDisk) -> None:
    """Until it issues nothing more, every request answered."""
    while (step := reader.work()) is not None:
        for _ in step:
            raise AssertionError("this disk needs no exit")
        while disk.cookies:
            reader.on_finished(cast(Finished, SimpleNamespace(cookie=disk.cookies.pop(), error="")))


def test_what_arrives_while_nobody_consumes_can_be_saved() -> None:
    state, disk = KernelState(), PlayedDisk()
    reader = BulkReader(cast(BlkDriver, disk), state.bulk)
    reader.start(0, N_CHUNKS * CHUNK_BYTES, 0, N_CHUNKS, CHUNK_BYTES)
    n_consumed = 0
    while n_consumed < N_CHUNKS:
        read_on(reader, disk)
        assert decode_state(encode_state(state)).bulk == state.bulk
        assert state.bulk.issued - state.bulk.consumed >= min(DEPTH, N_CHUNKS - n_consumed)
        while reader.has_chunk():
            reader.consume()
            n_consumed += 1
    assert reader.finished
