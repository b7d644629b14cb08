"""RTAS services that the device model answers, by service name.

The guest's argument block is read and written by kvm; here come words and go words. Addresses among them are 32-bit
guest physical addresses, reached through `GuestRam`.

Source: PAPR chapter 7; QEMU `hw/ppc/spapr_rtas.c`, `spapr_rtc.c`, `spapr_nvram.c`.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import msgspec

from protocol.codes import RtasStatus
from protocol.errors import GuestFault
from protocol.rtas import MAX_BUFFER_BYTES, WORD_MASK, status_word
from services.qemu.nvram import fresh_nvram
from services.qemu.phb import IrqPort, PciHostBridge
from services.qemu.rtas_ddw import DdwRtas, WindowPort
from services.qemu.rtas_pci import PciRtas, RtasError
from shared.guest_ram import GuestRam
from shared.machine_type import REPEATABLE_START_SECONDS

NVRAM_BYTES = 64 * 1024
MAX_OS_TERM_BYTES = 128
NS_PER_SECOND = 1_000_000_000
REPEATABLE_START_NS = REPEATABLE_START_SECONDS * NS_PER_SECOND
"""2026-01-01: Linux seeds its random numbers with the time of day, and lays out programs by them."""
READING_NS = 10_000_000
"""Whoever waits for the clock's next second must not wait for ever."""
MAX_CLOCK_OFFSET_NS = 9 * 10**18
"""285 years, which a saved state has 64 bits for; readings add to it."""
CPU_RUNNING = 2
CPU_STOPPED = 0


class SystemParameter(IntEnum):
    """Parameters of ibm,get-system-parameter that exist here."""

    SPLPAR_CHARACTERISTICS = 20
    DIAGNOSTICS_RUN_MODE = 42
    UUID = 48


class MachinePort(WindowPort, Protocol):
    """What RTAS asks of the process around the devices."""

    def display(self, character: int) -> None:
        """One byte for the first terminal."""

    def power_off(self) -> None:
        """The guest switched itself off."""

    def exit(self, status: int) -> None:
        """The program on the VM is done, with this exit status."""

    def reboot(self) -> None:
        """The guest wants a system reset."""

    def os_term(self, text: str) -> None:
        """The guest's kernel gave up; `text` says why."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC, by the VM's clock."""

    def cpu_stopped(self, cpu: int) -> bool | None:
        """Whether the processor is stopped; None when there is none of this number."""


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What the services report of the machine.

    A `repeatable` one shows no time of the host: its clock begins at REPEATABLE_START_NS and each reading moves it.
    """

    memory_bytes: int
    n_cpus: int
    uuid: bytes
    repeatable: bool = False


class RtasState(msgspec.Struct):
    """What the guest can change: the clock's offset and non-volatile memory."""

    clock_offset_ns: int = 0
    nvram: bytes = bytes(NVRAM_BYTES)


Handler = Callable[[Sequence[int]], Awaitable[list[int]]]


@dataclass(frozen=True, slots=True)
class _Service:
    """A handler and how many argument words it takes; more are ignored, as QEMU does."""

    n_args: int
    handler: Handler


class RtasServices:
    """All services of one VM."""

    def __init__(
        self, ram: GuestRam, phb: PciHostBridge, irq: IrqPort, machine: MachinePort, facts: MachineFacts
    ) -> None:
        self.clock_offset_ns = 0
        self.nvram = fresh_nvram(NVRAM_BYTES)
        self._ram = ram
        self._machine = machine
        self._facts = facts
        pci = PciRtas(phb, irq)
        self.ddw = DdwRtas(phb, pci, machine, facts.memory_bytes)
        self._services = self._platform_services() | _pci_services(pci)
        if phb.ddw:
            self._services |= _ddw_services(self.ddw)

    @property
    def names(self) -> frozenset[str]:
        """The services that are answered."""
        return frozenset(self._services)

    async def call(self, name: str, args: Sequence[int], n_rets: int) -> list[int]:
        """Exactly `n_rets` return words, the status first.

        An unknown service, too few arguments and an address outside RAM are PARAMETER_ERROR.
        """
        service = self._services.get(name)
        if service is None or len(args) < service.n_args:
            return _words(RtasStatus.PARAMETER_ERROR, [], n_rets)
        try:
            rets = await service.handler(args[: service.n_args])
        except RtasError as error:
            return _words(error.status, [], n_rets)
        except GuestFault:
            return _words(RtasStatus.PARAMETER_ERROR, [], n_rets)
        return _words(RtasStatus.SUCCESS, rets, n_rets)

    def save(self) -> RtasState:
        """A copy of the state."""
        return RtasState(self.clock_offset_ns, bytes(self.nvram))

    def load(self, state: RtasState) -> None:
        """Go on from `state`."""
        if len(state.nvram) != NVRAM_BYTES:
            raise ValueError(f"saved non-volatile memory has not {NVRAM_BYTES} bytes")
        self.clock_offset_ns = state.clock_offset_ns
        self.nvram[:] = state.nvram

    def _platform_services(self) -> dict[str, _Service]:
        return {
            "display-character": _Service(1, self._display_character),
            "get-time-of-day": _Service(0, self._get_time_of_day),
            "set-time-of-day": _Service(7, self._set_time_of_day),
            "power-off": _Service(2, self._power_off),
            "system-reboot": _Service(0, self._system_reboot),
            "query-cpu-stopped-state": _Service(1, self._query_cpu_stopped_state),
            "ibm,get-system-parameter": _Service(3, self._get_system_parameter),
            "ibm,set-system-parameter": _Service(2, self._set_system_parameter),
            "event-scan": _Service(4, self._event_scan),
            "check-exception": _Service(6, self._event_scan),
            "nvram-fetch": _Service(3, self._nvram_fetch),
            "nvram-store": _Service(3, self._nvram_store),
            "ibm,os-term": _Service(1, self._os_term),
            "pefbox,exit": _Service(1, self._exit),
        }

    async def _display_character(self, args: Sequence[int]) -> list[int]:
        self._machine.display(args[0] & 0xFF)
        return []

    async def _get_time_of_day(self, _args: Sequence[int]) -> list[int]:
        seconds, ns = divmod(self._wall_ns() + self.clock_offset_ns, NS_PER_SECOND)
        if self._facts.repeatable:
            self.clock_offset_ns += READING_NS
        try:
            now = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
        except (ValueError, OverflowError, OSError):
            raise RtasError(RtasStatus.HARDWARE_ERROR) from None
        return [now.year, now.month, now.day, now.hour, now.minute, now.second, ns]

    async def _set_time_of_day(self, args: Sequence[int]) -> list[int]:
        *fields, ns = args
        try:
            moment = datetime.datetime(*fields, tzinfo=datetime.UTC)  # type: ignore[misc,arg-type]
        except (ValueError, OverflowError):
            raise RtasError(RtasStatus.PARAMETER_ERROR) from None
        if ns >= NS_PER_SECOND:
            raise RtasError(RtasStatus.PARAMETER_ERROR)
        offset_ns = int(moment.timestamp()) * NS_PER_SECOND + ns - self._wall_ns()
        if abs(offset_ns) > MAX_CLOCK_OFFSET_NS:
            raise RtasError(RtasStatus.PARAMETER_ERROR)
        self.clock_offset_ns = offset_ns
        return []

    def _wall_ns(self) -> int:
        return REPEATABLE_START_NS if self._facts.repeatable else self._machine.wall_ns()

    async def _power_off(self, _args: Sequence[int]) -> list[int]:
        self._machine.power_off()
        return []

    async def _exit(self, args: Sequence[int]) -> list[int]:
        self._machine.exit(args[0])
        return []

    async def _system_reboot(self, _args: Sequence[int]) -> list[int]:
        self._machine.reboot()
        return []

    async def _os_term(self, args: Sequence[int]) -> list[int]:
        n_bytes = min(MAX_OS_TERM_BYTES, max(self._ram.size_bytes - args[0], 0))
        if n_bytes == 0:
            raise RtasError(RtasStatus.PARAMETER_ERROR)
        raw = (await self._ram.read(args[0], n_bytes)).split(b"\0")[0]
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in raw)
        self._machine.os_term(text)
        return []

    async def _query_cpu_stopped_state(self, args: Sequence[int]) -> list[int]:
        stopped = self._machine.cpu_stopped(args[0])
        if stopped is None:
            raise RtasError(RtasStatus.PARAMETER_ERROR)
        return [CPU_STOPPED if stopped else CPU_RUNNING]

    async def _get_system_parameter(self, args: Sequence[int]) -> list[int]:
        parameter, buffer, n_bytes = args
        value = self._parameter(parameter)
        # The length stands before the value; what does not fit is cut (PAPR 7.3.16).
        answer = len(value).to_bytes(2, "big") + value
        if n_bytes < 2:
            raise RtasError(RtasStatus.PARAMETER_ERROR)
        await self._ram.write(buffer, answer[:n_bytes])
        return []

    async def _set_system_parameter(self, args: Sequence[int]) -> list[int]:
        self._parameter(args[0])
        raise RtasError(RtasStatus.NOT_AUTHORIZED)

    def _parameter(self, parameter: int) -> bytes:
        facts = self._facts
        if parameter == SystemParameter.SPLPAR_CHARACTERISTICS:
            text = (
                f"MaxEntCap={facts.n_cpus},DesMem={facts.memory_bytes >> 20},"
                f"DesProcs={facts.n_cpus},MaxPlatProcs={facts.n_cpus}"
            )
            return text.encode("ascii") + b"\0"
        if parameter == SystemParameter.DIAGNOSTICS_RUN_MODE:
            return b"\0"
        if parameter == SystemParameter.UUID:
            return facts.uuid
        raise RtasError(RtasStatus.PARAMETER_ERROR)

    async def _event_scan(self, _args: Sequence[int]) -> list[int]:
        raise RtasError(RtasStatus.NO_ERRORS_FOUND)

    async def _nvram_fetch(self, args: Sequence[int]) -> list[int]:
        offset, buffer, n_bytes = args
        _check_nvram(offset, n_bytes)
        await self._ram.write(buffer, bytes(self.nvram[offset : offset + n_bytes]))
        return [n_bytes]

    async def _nvram_store(self, args: Sequence[int]) -> list[int]:
        offset, buffer, n_bytes = args
        _check_nvram(offset, n_bytes)
        self.nvram[offset : offset + n_bytes] = await self._ram.read(buffer, n_bytes)
        return [n_bytes]


def _pci_services(pci: PciRtas) -> dict[str, _Service]:
    services: dict[str, tuple[int, Callable[..., list[int]]]] = {
        "read-pci-config": (2, pci.read_first),
        "write-pci-config": (3, pci.write_first),
        "ibm,read-pci-config": (4, pci.read),
        "ibm,write-pci-config": (5, pci.write),
        "ibm,query-interrupt-source-number": (4, pci.query_source),
    }
    table = {name: _Service(n_args, _at_once(call)) for name, (n_args, call) in services.items()}
    table["ibm,change-msi"] = _Service(6, pci.change_msi)
    return table


def _ddw_services(ddw: DdwRtas) -> dict[str, _Service]:
    return {
        "ibm,query-pe-dma-window": _Service(3, ddw.query),
        "ibm,create-pe-dma-window": _Service(5, ddw.create),
        "ibm,remove-pe-dma-window": _Service(1, ddw.remove),
        "ibm,reset-pe-dma-window": _Service(3, ddw.reset),
    }


def _at_once(call: Callable[..., list[int]]) -> Handler:
    async def handler(args: Sequence[int]) -> list[int]:
        return call(*args)

    return handler


def _check_nvram(offset: int, n_bytes: int) -> None:
    if not 0 < n_bytes <= MAX_BUFFER_BYTES or offset + n_bytes > NVRAM_BYTES:
        raise RtasError(RtasStatus.PARAMETER_ERROR)


def _words(status: RtasStatus, rets: list[int], n_rets: int) -> list[int]:
    words = [status_word(status), *(word & WORD_MASK for word in rets)][:n_rets]
    return words + [0] * (n_rets - len(words))
