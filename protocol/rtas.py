"""Every RTAS service of the device tree: token, argument words, return words, who answers it.

A guest calls RTAS by H_RTAS with the address of an argument block in its memory: big-endian words `token, n_args,
n_rets, args..., rets...`. The first return word is the status (`RtasStatus`); `results` names those after it. An
address is a 32-bit guest physical address. Guests read the tokens from the `/rtas` node and never assume them.
Source: PAPR chapter 7, QEMU `include/hw/ppc/spapr.h` (tokens) and `hw/ppc/spapr_rtas.c`, `spapr_pci.c`.
"""

from __future__ import annotations

from protocol.codes import RtasStatus
from protocol.declare import Caller, CallTable, Code, Direction, Kind, Memory, Reg, Space
from protocol.roles import Role

TOKEN_BASE = 0x2000
MAX_WORDS = 16
"""An argument block has at most this many argument and return words together."""
WORD_MASK = 0xFFFFFFFF
MAX_BUFFER_BYTES = 4096
"""The ultravisor copies a buffer of an SVM through one page of this size, so no service takes more."""

RTAS = CallTable(Space.RTAS)

_GUEST = (Caller.VM, Caller.SVM)
_PAPR = "PAPR 7.3"
_QEMU_PCI = "PAPR 7.3.4, QEMU spapr_pci.c"


def status_word(status: RtasStatus) -> int:
    """A status as it stands in the first return word."""
    return status & WORD_MASK


def _word(*names: str) -> tuple[Reg, ...]:
    return tuple(Reg(name, Kind.WORD) for name in names)


def _buffer(name: str, direction: Direction, count: int | str) -> Reg:
    return Reg(name, Kind.GPA, Memory(direction, count, 1, MAX_BUFFER_BYTES))


_SOURCE = Reg("source", Kind.WORD)
_SERVER = Reg("server", Kind.WORD)
_CPU = Reg("cpu", Kind.CPU)
_LENGTH = Reg("n_bytes", Kind.SIZE)
_CONFIG_ADDR = Reg("config_addr", Kind.WORD)
"""`bus << 16 | devfn << 8 | register`."""
_BUID = _word("buid_high", "buid_low")
_DEVICE = (_CONFIG_ADDR, *_BUID)

_BAD_DEVICE: dict[Code, str] = {RtasStatus.PARAMETER_ERROR: "no such PCI host bridge or device"}
_BAD_SOURCE: dict[Code, str] = {RtasStatus.PARAMETER_ERROR: "no such interrupt source"}
_BAD_CONFIG: dict[Code, str] = {
    RtasStatus.PARAMETER_ERROR: "no such PCI host bridge, or size is not 1, 2 or 4, or the register is not aligned"
}


def _service(
    n: int,
    name: str,
    args: tuple[Reg, ...] = (),
    results: tuple[Reg, ...] = (),
    *,
    errors: dict[Code, str] | None = None,
    source: str = _PAPR,
    optional_args: int = 0,
    optional_results: int = 0,
) -> int:
    call = RTAS.declare(
        TOKEN_BASE + n,
        name,
        args=args,
        results=results,
        callers=_GUEST,
        errors=errors,
        source=source,
        optional_args=optional_args,
        optional_results=optional_results,
    )
    return call.number


# Console, clock, power.
DISPLAY_CHARACTER = _service(0x00, "display-character", _word("character"))
_TIME = _word("year", "month", "day", "hour", "minute", "second", "nanosecond")
GET_TIME_OF_DAY = _service(0x01, "get-time-of-day", (), _TIME)
SET_TIME_OF_DAY = _service(0x02, "set-time-of-day", _TIME, errors={RtasStatus.PARAMETER_ERROR: "no such date"})
POWER_OFF = _service(0x03, "power-off", _word("power_on_mask_high", "power_on_mask_low"))
SYSTEM_REBOOT = _service(0x04, "system-reboot")

# Processors.
_BAD_CPU: dict[Code, str] = {RtasStatus.PARAMETER_ERROR: "no such processor"}
QUERY_CPU_STOPPED_STATE = _service(0x05, "query-cpu-stopped-state", (_CPU,), _word("state"), errors=_BAD_CPU)
START_CPU = _service(0x06, "start-cpu", (_CPU, Reg("pc", Kind.GPA), Reg("r3", Kind.WORD)), errors=_BAD_CPU)
STOP_SELF = _service(0x07, "stop-self")

# System parameters.
_BAD_PARAMETER: dict[Code, str] = {
    RtasStatus.PARAMETER_ERROR: "no such system parameter, or the buffer is outside memory or too short",
    RtasStatus.NOT_AUTHORIZED: "the parameter cannot be set",
}
GET_SYSTEM_PARAMETER = _service(
    0x08,
    "ibm,get-system-parameter",
    (Reg("parameter", Kind.WORD), _buffer("buffer", Direction.OUT, "n_bytes"), _LENGTH),
    errors=_BAD_PARAMETER,
)
SET_SYSTEM_PARAMETER = _service(
    0x09,
    "ibm,set-system-parameter",
    # A 16-bit length stands first in the buffer; PAPR allows 1024 bytes after it.
    (Reg("parameter", Kind.WORD), _buffer("buffer", Direction.IN, 1026)),
    errors=_BAD_PARAMETER,
)

# Interrupt sources.
SET_XIVE = _service(
    0x0A,
    "ibm,set-xive",
    (_SOURCE, _SERVER, Reg("priority", Kind.WORD)),
    errors={RtasStatus.PARAMETER_ERROR: "no such interrupt source or server, or priority over 255"},
    source="PAPR 7.3.10.1",
)
GET_XIVE = _service(
    0x0B, "ibm,get-xive", (_SOURCE,), (_SERVER, Reg("priority", Kind.WORD)), errors=_BAD_SOURCE, source="PAPR 7.3.10.2"
)
INT_OFF = _service(0x0C, "ibm,int-off", (_SOURCE,), errors=_BAD_SOURCE, source="PAPR 7.3.10.3")
INT_ON = _service(0x0D, "ibm,int-on", (_SOURCE,), errors=_BAD_SOURCE, source="PAPR 7.3.10.4")

# Events.
_NO_EVENT: dict[Code, str] = {RtasStatus.NO_ERRORS_FOUND: "no event is waiting"}
CHECK_EXCEPTION = _service(
    0x0E,
    "check-exception",
    (
        *_word("vector", "additional_information", "event_mask", "critical"),
        _buffer("buffer", Direction.OUT, "n_bytes"),
        _LENGTH,
        Reg("extended_information", Kind.WORD),
    ),
    errors=_NO_EVENT,
    optional_args=1,
)
EVENT_SCAN = _service(
    0x0F,
    "event-scan",
    (*_word("event_mask", "critical"), _buffer("buffer", Direction.OUT, "n_bytes"), _LENGTH),
    errors=_NO_EVENT,
)
SET_TCE_BYPASS = _service(0x10, "ibm,set-tce-bypass", _word("unit_address", "enable"), source="QEMU spapr_vio.c")
QUIESCE = _service(0x11, "quiesce", source="QEMU spapr_vio.c")

# Non-volatile memory.
_NVRAM_RESULT = (Reg("n_bytes_done", Kind.SIZE),)
_BAD_NVRAM: dict[Code, str] = {RtasStatus.PARAMETER_ERROR: "beyond the memory, or the buffer is outside RAM"}
NVRAM_FETCH = _service(
    0x12,
    "nvram-fetch",
    (Reg("offset", Kind.WORD), _buffer("buffer", Direction.OUT, "n_bytes"), _LENGTH),
    _NVRAM_RESULT,
    errors=_BAD_NVRAM,
)
NVRAM_STORE = _service(
    0x13,
    "nvram-store",
    (Reg("offset", Kind.WORD), _buffer("buffer", Direction.IN, "n_bytes"), _LENGTH),
    _NVRAM_RESULT,
    errors=_BAD_NVRAM,
)

# PCI configuration space. The two without `ibm,` reach the first host bridge only.
_SIZE = Reg("size", Kind.SIZE)
_VALUE = Reg("value", Kind.WORD)
READ_PCI_CONFIG = _service(
    0x14, "read-pci-config", (_CONFIG_ADDR, _SIZE), (_VALUE,), errors=_BAD_CONFIG, source=_QEMU_PCI
)
WRITE_PCI_CONFIG = _service(
    0x15, "write-pci-config", (_CONFIG_ADDR, _SIZE, _VALUE), errors=_BAD_CONFIG, source=_QEMU_PCI
)
IBM_READ_PCI_CONFIG = _service(
    0x16, "ibm,read-pci-config", (*_DEVICE, _SIZE), (_VALUE,), errors=_BAD_CONFIG, source=_QEMU_PCI
)
IBM_WRITE_PCI_CONFIG = _service(
    0x17, "ibm,write-pci-config", (*_DEVICE, _SIZE, _VALUE), errors=_BAD_CONFIG, source=_QEMU_PCI
)
QUERY_INTERRUPT_SOURCE_NUMBER = _service(
    0x18,
    "ibm,query-interrupt-source-number",
    (*_DEVICE, Reg("ioa_interrupt", Kind.WORD)),
    (_SOURCE, Reg("edge_triggered", Kind.WORD)),
    errors={RtasStatus.HARDWARE_ERROR: "the device has no such interrupt", **_BAD_DEVICE},
    source=_QEMU_PCI,
)
CHANGE_MSI = _service(
    0x19,
    "ibm,change-msi",
    (*_DEVICE, *_word("function", "n_interrupts", "sequence")),
    _word("n_interrupts_granted", "next_sequence", "interrupt_type"),
    errors={
        RtasStatus.HARDWARE_ERROR: "no interrupt sources are left",
        RtasStatus.PARAMETER_ERROR: "no such device or function, or the device has no such capability",
    },
    source=_QEMU_PCI,
    optional_results=1,
)

# Indicators, sensors, power domains, dynamic reconfiguration.
SET_INDICATOR = _service(0x1A, "set-indicator", _word("indicator", "index", "value"))
SET_POWER_LEVEL = _service(0x1B, "set-power-level", _word("domain", "level"), _word("actual_level"))
GET_POWER_LEVEL = _service(0x1C, "get-power-level", _word("domain"), _word("level"))
GET_SENSOR_STATE = _service(0x1D, "get-sensor-state", _word("sensor", "index"), _word("state"))
CONFIGURE_CONNECTOR = _service(
    0x1E,
    "ibm,configure-connector",
    (_buffer("work_area", Direction.INOUT, MAX_BUFFER_BYTES), Reg("memory_extent", Kind.GPA)),
)
OS_TERM = _service(0x1F, "ibm,os-term", (_buffer("text", Direction.IN, 128),), source="PAPR 7.3.9")

# Enhanced error handling.
SET_EEH_OPTION = _service(0x20, "ibm,set-eeh-option", (*_DEVICE, *_word("option")), errors=_BAD_DEVICE)
GET_CONFIG_ADDR_INFO2 = _service(
    0x21, "ibm,get-config-addr-info2", (*_DEVICE, *_word("option")), _word("info"), errors=_BAD_DEVICE
)
READ_SLOT_RESET_STATE2 = _service(
    0x22,
    "ibm,read-slot-reset-state2",
    _DEVICE,
    _word("state", "eeh_supported", "unavailable_ms", "recovering_ms"),
    errors=_BAD_DEVICE,
    optional_results=1,
)
SET_SLOT_RESET = _service(0x23, "ibm,set-slot-reset", (*_DEVICE, *_word("option")), errors=_BAD_DEVICE)
CONFIGURE_PE = _service(0x24, "ibm,configure-pe", _DEVICE, errors=_BAD_DEVICE)
SLOT_ERROR_DETAIL = _service(
    0x25,
    "ibm,slot-error-detail",
    (
        *_DEVICE,
        _buffer("device_log", Direction.OUT, "device_log_bytes"),
        Reg("device_log_bytes", Kind.SIZE),
        _buffer("platform_log", Direction.OUT, "platform_log_bytes"),
        Reg("platform_log_bytes", Kind.SIZE),
        Reg("option", Kind.WORD),
    ),
    errors=_BAD_DEVICE,
)

# Dynamic DMA windows. With extension 2 of `ibm,ddw-extensions` the block size takes two words; it is not offered.
_DDW = "PAPR 7.3.11, QEMU spapr_rtas_ddw.c"
QUERY_PE_DMA_WINDOW = _service(
    0x26,
    "ibm,query-pe-dma-window",
    _DEVICE,
    _word("windows_left", "largest_block_tces", "page_size_mask", "migration_mask"),
    errors=_BAD_DEVICE,
    source=_DDW,
)
CREATE_PE_DMA_WINDOW = _service(
    0x27,
    "ibm,create-pe-dma-window",
    (*_DEVICE, Reg("page_shift", Kind.SHIFT), Reg("window_shift", Kind.SHIFT)),
    (Reg("liobn", Kind.LIOBN), *_word("base_high", "base_low")),
    errors={
        RtasStatus.HARDWARE_ERROR: "no window is left",
        RtasStatus.PARAMETER_ERROR: "no such device, or a shift that is not offered",
    },
    source=_DDW,
)
REMOVE_PE_DMA_WINDOW = _service(
    0x28,
    "ibm,remove-pe-dma-window",
    (Reg("liobn", Kind.LIOBN),),
    errors={RtasStatus.PARAMETER_ERROR: "no such window"},
    source=_DDW,
)
RESET_PE_DMA_WINDOW = _service(0x29, "ibm,reset-pe-dma-window", _DEVICE, errors=_BAD_DEVICE, source=_DDW)

# Suspension and firmware-assisted machine checks.
SUSPEND_ME = _service(0x2A, "ibm,suspend-me")
NMI_REGISTER = _service(0x2B, "ibm,nmi-register", (Reg("system_reset_pc", Kind.GPA), Reg("machine_check_pc", Kind.GPA)))
NMI_INTERLOCK = _service(0x2C, "ibm,nmi-interlock")

# Of our own: no firmware has it. Offered to programs that start without firmware (docs/bare-metal.md).
EXIT = _service(0x100, "pefbox,exit", _word("exit_status"), source="docs/bare-metal.md")

SERVED_BY: dict[int, Role] = {
    **dict.fromkeys((SET_XIVE, GET_XIVE, INT_OFF, INT_ON), Role.KVM),
    **dict.fromkeys(
        (
            DISPLAY_CHARACTER,
            GET_TIME_OF_DAY,
            SET_TIME_OF_DAY,
            POWER_OFF,
            SYSTEM_REBOOT,
            QUERY_CPU_STOPPED_STATE,
            GET_SYSTEM_PARAMETER,
            SET_SYSTEM_PARAMETER,
            CHECK_EXCEPTION,
            EVENT_SCAN,
            NVRAM_FETCH,
            NVRAM_STORE,
            READ_PCI_CONFIG,
            WRITE_PCI_CONFIG,
            IBM_READ_PCI_CONFIG,
            IBM_WRITE_PCI_CONFIG,
            QUERY_INTERRUPT_SOURCE_NUMBER,
            CHANGE_MSI,
            OS_TERM,
            QUERY_PE_DMA_WINDOW,
            CREATE_PE_DMA_WINDOW,
            REMOVE_PE_DMA_WINDOW,
            RESET_PE_DMA_WINDOW,
            EXIT,
        ),
        Role.QEMU,
    ),
}
"""Which process answers a token. Every other one is in `protocol.unhandled` and gets PARAMETER_ERROR from qemu."""
