"""The prompt's commands for devices beside the disk, and for what all devices are given as addresses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from services.guest.model.arguments import Refused, numbers
from services.guest.model.cpu import NoDevice, Step
from services.guest.model.pages import PageUse
from services.guest.model.parts import Parts
from services.guest.model.state import Address, Bounce, DmaPath
from services.guest.model.vfio import Lending
from services.guest.model.virtio_rng import MAX_BYTES as MAX_RNG_BYTES
from shared.edu import BUFFER_BYTES

DEVICE_HELP = (
    "rng N                    N random bytes (at most 4096) from the virtio-rng: their SHA-256",
    "balloon                  pages of 64 KiB that the host wants in the balloon, and those that are in it",
    "edu [N] BYTES [M]        copy BYTES into edu N and back, by bus addresses that are mapped for edu M (N)",
    "dma                      how buffers reach each device",
    "vfio                     lend the virtio-rng to a process, which has it write a page of the kernel",
)


class DeviceCommands:
    """Obeys them; `answer` says the outcome of one that took longer."""

    def __init__(self, parts: Parts, answer: Callable[[str], None]) -> None:
        self._parts = parts
        self._answer = answer
        self._lending = Lending(parts)
        self.commands: dict[str, Callable[[list[str]], Step[str]]] = {
            "rng": self._rng,
            "balloon": self._balloon,
            "edu": self._edu,
            "dma": self._dma,
            "vfio": self._vfio,
        }

    @property
    def waiting(self) -> bool:
        """Whether a command is not done yet."""
        state = self._parts.state
        return bool(state.rng.n_asked or state.edu_copy.n_bytes or self._lending.active)

    def work(self) -> Step[None] | None:
        """The next step of the command that is not done, if it does not have to wait."""
        state, copier = self._parts.state, self._parts.edu_copier
        if state.rng.n_asked:
            return self._end_rng() if state.rng.n_written >= 0 or not state.rng.ready else None
        if self._lending.active:
            return self._lending.work() or self._end_vfio()
        if copier.finished:
            return self._end_edu()
        step = copier.work()
        return copier.device.guarded(step) if step is not None else None

    # -- virtio-rng -------------------------------------------------------------------------------------------------

    def _rng(self, words: list[str]) -> Step[str]:
        (n_bytes,) = numbers(words, 1)
        state = self._parts.state.rng
        if not state.ready:
            raise Refused(state.error or "no virtio-rng")
        if not 1 <= n_bytes <= MAX_RNG_BYTES:
            raise Refused(f"1 to {MAX_RNG_BYTES} bytes")
        state.buffer = state.buffer or self._parts.pages.must_alloc(1, PageUse.BUFFER)
        self._parts.cpu.fill(state.buffer, n_bytes)
        try:
            yield from self._parts.rng.ask(state.buffer, n_bytes)
        except NoDevice as error:
            raise Refused(str(error)) from None
        state.n_asked = n_bytes
        return ""

    def _end_rng(self) -> Step[None]:
        state = self._parts.state.rng
        state.n_asked = 0
        data = self._parts.cpu.load(state.buffer, max(state.n_written, 0))
        self._answer(f"error {state.error}" if state.error else f"ok {len(data)} {hashlib.sha256(data).hexdigest()}")
        return
        yield

    # -- virtio-balloon ---------------------------------------------------------------------------------------------

    def _balloon(self, words: list[str]) -> Step[str]:
        numbers(words, 0)
        state = self._parts.state.balloon
        if not state.ready:
            raise Refused(state.error or "no virtio-balloon")
        return f"target {state.target} actual {state.n_pages} pages"
        yield

    # -- edu --------------------------------------------------------------------------------------------------------

    def _edu(self, words: list[str]) -> Step[str]:
        if len(words) == 1:
            words = ["0", *words]
        device, n_bytes = numbers(words[:2], 2)
        (mapper,) = numbers(words[2:], 0, (device,))
        for number in (device, mapper):
            self._check_edu(number)
        if not 1 <= n_bytes <= BUFFER_BYTES:
            raise Refused(f"1 to {BUFFER_BYTES} bytes")
        self._parts.edu_copier.start(device, mapper, n_bytes)
        return ""
        yield

    def _check_edu(self, number: int) -> None:
        edus = self._parts.state.edus
        if number >= len(edus) or not edus[number].ready:
            raise Refused(edus[number].error if number < len(edus) and edus[number].error else f"no edu {number}")

    def _end_edu(self) -> Step[None]:
        state, copier = self._parts.state.edu_copy, self._parts.edu_copier
        error = copier.device.state.error or state.error or ("" if copier.matches else "other bytes came back")
        addresses = ", ".join(f"{address:#x}" for address in state.addresses)
        liobn = self._parts.edus[state.mapper].liobn
        where = f"by {addresses} of liobn {liobn:#x}"
        self._answer(f"error {error}, {where}" if error else f"ok {state.n_bytes} bytes came back, {where}")
        state.n_bytes = 0
        return
        yield

    # -- a device lent to a process ---------------------------------------------------------------------------------

    def _vfio(self, _: list[str]) -> Step[str]:
        state = self._parts.state.rng
        if not state.ready:
            raise Refused(state.error or "no virtio-rng")
        self._lending.begin()
        return ""
        yield

    def _end_vfio(self) -> Step[None]:
        self._answer(self._lending.outcome())
        return
        yield

    # -- all devices ------------------------------------------------------------------------------------------------

    def _dma(self, _: list[str]) -> Step[str]:
        parts = self._parts
        blk = parts.state.blk
        ways = [f"disk {_way(blk.pci.path, parts.dma.liobn)}"] if blk.ready else []
        ways += [f"{driver.name} {_way(driver.path, driver.liobn)}" for driver in parts.extras if driver.state.ready]
        return "; ".join(ways) or "no device"
        yield


def _way(path: DmaPath, liobn: int) -> str:
    ways = {
        Address.PHYSICAL: "guest addresses",
        Address.WINDOW: f"window of liobn {liobn:#x}",
        Address.OFFSET: f"guest addresses plus {path.offset:#x}",
    }
    return f"{ways[path.address]}{'' if path.bounce is Bounce.NEVER else ', bounced'}"
