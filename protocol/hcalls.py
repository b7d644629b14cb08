"""Every hypercall that PAPR, KVM and QEMU define for a pseries guest.

R3 number, arguments from R4, result in R3, outputs from R4. Here are those that this machine is about: the IOMMU,
interrupts, the terminal, the virtual processor, the switch to a secure VM. The rest are in `protocol.hcalls_*`,
loaded at the end of this file; `protocol.unhandled` says which calls nobody answers and why.
Source: Linux `arch/powerpc/include/asm/hvcall.h`, PAPR chapter 14, QEMU `hw/ppc/spapr_hcall.c`.
"""

from __future__ import annotations

from protocol.codes import HCode
from protocol.declare import Caller, Code, Direction, Kind, Memory, Reg
from protocol.hcalls_table import GUEST as _GUEST
from protocol.hcalls_table import HCALLS as HCALLS

_UV = (Caller.ULTRAVISOR,)
_PAPR = "PAPR 14.5"
_UVMEM = "Linux book3s_hv_uvmem.c"
_QEMU = "QEMU spapr_hcall.c"

_LIOBN = Reg("liobn", Kind.LIOBN)
_IOBA = Reg("ioba", Kind.IOBA)
_GPA = Reg("gpa", Kind.GPA)

# TCE tables: the emulated IOMMU.
MAX_INDIRECT_TCES = 512
"""A list of H_PUT_TCE_INDIRECT fits one 4 KiB page."""
_BAD_IOBA = "unknown liobn, or ioba outside the window or not aligned to its page size"
H_GET_TCE = HCALLS.declare(
    0x1C,
    "H_GET_TCE",
    args=(_LIOBN, _IOBA),
    results=(Reg("tce", Kind.TCE),),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: _BAD_IOBA},
    source="PAPR 14.5.4.1.1",
)
H_PUT_TCE = HCALLS.declare(
    0x20,
    "H_PUT_TCE",
    args=(_LIOBN, _IOBA, Reg("tce", Kind.TCE)),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: f"{_BAD_IOBA}; or the page of the TCE is not aligned or outside guest RAM"},
    source="PAPR 14.5.4.1.2",
)
H_STUFF_TCE = HCALLS.declare(
    0x138,
    "H_STUFF_TCE",
    args=(_LIOBN, _IOBA, Reg("tce", Kind.TCE), Reg("n_tces", Kind.COUNT)),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: f"{_BAD_IOBA}; n_tces beyond the window; or the TCE permits access"},
    source="PAPR 14.5.4.2.3",
)
H_PUT_TCE_INDIRECT = HCALLS.declare(
    0x13C,
    "H_PUT_TCE_INDIRECT",
    args=(
        _LIOBN,
        _IOBA,
        Reg("list", Kind.GPA, Memory(Direction.IN, "n_tces", 8, MAX_INDIRECT_TCES)),
        Reg("n_tces", Kind.COUNT),
    ),
    callers=_GUEST,
    errors={
        HCode.H_PARAMETER: f"{_BAD_IOBA}; n_tces over 512 or beyond the window; list not aligned to 4 KiB or outside "
        "RAM; or a TCE as in H_PUT_TCE: those before it in the list stay stored",
    },
    source="PAPR 14.5.4.2.4",
)

# Cache-inhibited access: MMIO of a guest whose mapping faults.
H_LOGICAL_CI_LOAD = HCALLS.declare(
    0x3C,
    "H_LOGICAL_CI_LOAD",
    args=(Reg("size", Kind.SIZE), _GPA),
    results=(Reg("value"),),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "size is not 1, 2, 4 or 8, or no device at gpa"},
    source=_PAPR,
)
H_LOGICAL_CI_STORE = HCALLS.declare(
    0x40,
    "H_LOGICAL_CI_STORE",
    args=(Reg("size", Kind.SIZE), _GPA, Reg("value")),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "size is not 1, 2, 4 or 8, or no device at gpa"},
    source=_PAPR,
)

# Virtual terminal: 16 bytes a call in two registers.
_TERM = Reg("termno")
H_GET_TERM_CHAR = HCALLS.declare(
    0x54,
    "H_GET_TERM_CHAR",
    args=(_TERM,),
    results=(Reg("n_bytes", Kind.SIZE), Reg("char0_7", Kind.TEXT), Reg("char8_15", Kind.TEXT)),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "no such terminal"},
    source="PAPR 16.6.2",
)
H_PUT_TERM_CHAR = HCALLS.declare(
    0x58,
    "H_PUT_TERM_CHAR",
    args=(
        _TERM,
        Reg("n_bytes", Kind.SIZE),
        Reg("char0_7", Kind.TEXT),
        Reg("char8_15", Kind.TEXT),
    ),
    callers=_GUEST,
    # Never H_BUSY: when the buffer is full its oldest text is dropped, so no reader can hold up the guest.
    errors={HCode.H_PARAMETER: "no such terminal, or more than 16 bytes"},
    source="PAPR 16.6.1",
)

# XICS interrupt presentation.
_XIRR = Reg("xirr")
H_EOI = HCALLS.declare(0x64, "H_EOI", args=(_XIRR,), callers=_GUEST, source="PAPR 14.5.4.6.3")
H_CPPR = HCALLS.declare(0x68, "H_CPPR", args=(Reg("cppr"),), callers=_GUEST, source="PAPR 14.5.4.6.4")
H_IPI = HCALLS.declare(
    0x6C,
    "H_IPI",
    args=(Reg("server", Kind.CPU), Reg("mfrr")),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "no such server"},
    source="PAPR 14.5.4.6.5",
)
H_IPOLL = HCALLS.declare(
    0x70,
    "H_IPOLL",
    args=(Reg("server", Kind.CPU),),
    results=(_XIRR, Reg("mfrr")),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "no such server"},
    source="PAPR 14.5.4.6.6",
)
H_XIRR = HCALLS.declare(0x74, "H_XIRR", args=(Reg("cppr"),), results=(_XIRR,), callers=_GUEST, source="PAPR 14.5.4.6.7")
H_XIRR_X = HCALLS.declare(
    0x2FC,
    "H_XIRR_X",
    args=(Reg("cppr"),),
    results=(_XIRR, Reg("timebase")),
    callers=_GUEST,
    source="PAPR 14.5.4.6.8",
)

# Virtual processor.
H_CEDE = HCALLS.declare(0xE0, "H_CEDE", callers=_GUEST, source="PAPR 14.5.3.1", open_ended=True)
H_CONFER = HCALLS.declare(
    0xE4,
    "H_CONFER",
    args=(Reg("vcpu", Kind.CPU), Reg("dispatch")),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "no such vcpu, and not -1 (all others)"},
    source="PAPR 14.5.3.2",
    open_ended=True,
)
H_PROD = HCALLS.declare(
    0xE8,
    "H_PROD",
    args=(Reg("vcpu", Kind.CPU),),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "no such vcpu"},
    source="PAPR 14.5.3.3",
)
H_JOIN = HCALLS.declare(
    0x298,
    "H_JOIN",
    callers=_GUEST,
    errors={HCode.H_CONTINUE: "every other vcpu that is started has joined; the caller goes on"},
    source="PAPR 14.5.3.6",
    open_ended=True,
)
H_RANDOM = HCALLS.declare(
    0x300, "H_RANDOM", results=(Reg("value"),), callers=_GUEST, source="PAPR 14.5.4.11", private=True
)
H_SET_MODE = HCALLS.declare(
    0x31C,
    "H_SET_MODE",
    args=(Reg("mflags", Kind.FLAGS), Reg("resource"), Reg("value1"), Reg("value2")),
    callers=_GUEST,
    errors={
        HCode.H_P2: "unknown resource",
        HCode.H_P3: "value1 not 0",
        HCode.H_P4: "value2 not 0",
        HCode.H_UNSUPPORTED: "the mode is not offered",
    },
    source="PAPR 14.5.4.3.6",
)
H_REGISTER_VPA = HCALLS.declare(
    0xDC,
    "H_REGISTER_VPA",
    args=(Reg("flags", Kind.FLAGS), Reg("vcpu", Kind.CPU), Reg("area", Kind.GPA)),
    callers=_GUEST,
    errors={
        HCode.H_PARAMETER: "no such vcpu or function, or an area that is misaligned, too short or not in memory",
        HCode.H_RESOURCE: "a log or shadow buffer without its VPA, or a VPA that goes before them",
    },
    source="PAPR 14.11.3.2",
)
H_GET_CPU_CHARACTERISTICS = HCALLS.declare(
    0x1C8,
    "H_GET_CPU_CHARACTERISTICS",
    results=(Reg("character", Kind.FLAGS), Reg("behaviour", Kind.FLAGS)),
    callers=_GUEST,
    source="PAPR 14.5.4.12; Linux asm/hvcall.h",
)
H_SIGNAL_SYS_RESET = HCALLS.declare(
    0x380,
    "H_SIGNAL_SYS_RESET",
    args=(Reg("target", Kind.CPU),),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "no such vcpu"},
    source="PAPR 14.5.3.9",
)
H_REGISTER_PROC_TBL = HCALLS.declare(
    0x37C,
    "H_REGISTER_PROC_TBL",
    args=(Reg("flags", Kind.FLAGS), Reg("table", Kind.GPA), Reg("page_size"), Reg("table_size")),
    callers=_GUEST,
    errors={
        HCode.H_PARAMETER: "an unknown flag, or a table of another kind than radix",
        HCode.H_P2: "table not aligned to 4 KiB",
        HCode.H_P3: "page_size not 0",
        HCode.H_P4: "table_size over 24 (the table has 1 << (12 + table_size) bytes)",
    },
    source=_QEMU,
)

# Secure VM support (0xEF00 to 0xEF80 are the ultravisor's).
_SHIFT = Reg("shift", Kind.SHIFT)
_SVM_ERRORS: dict[Code, str] = {HCode.H_UNSUPPORTED: "not issued by the ultravisor for a VM that turns secure"}
H_SVM_PAGE_IN = HCALLS.declare(
    0xEF00,
    "H_SVM_PAGE_IN",
    args=(_GPA, Reg("flags", Kind.FLAGS), _SHIFT),
    callers=_UV,
    errors={
        **_SVM_ERRORS,
        HCode.H_P2: "an unknown flag is set",
        HCode.H_P3: "shift is not 16",
        HCode.H_PARAMETER: "gpa outside the memory slots, already secure, or no memory",
    },
    source=_UVMEM,
)
H_SVM_PAGE_OUT = HCALLS.declare(
    0xEF04,
    "H_SVM_PAGE_OUT",
    args=(_GPA, Reg("flags", Kind.FLAGS), _SHIFT),
    callers=_UV,
    errors={
        **_SVM_ERRORS,
        HCode.H_P2: "a flag is set",
        HCode.H_P3: "shift is not 16",
        HCode.H_PARAMETER: "gpa outside the memory slots",
    },
    source=_UVMEM,
)
H_SVM_INIT_START = HCALLS.declare(
    0xEF08,
    "H_SVM_INIT_START",
    callers=_UV,
    errors={
        HCode.H_UNSUPPORTED: "the hypervisor has no secure memory support, or the VM is not radix",
        HCode.H_AUTHORITY: "the VM was not created with confidential guest support",
        HCode.H_PARAMETER: "a memory slot was refused by the ultravisor",
        HCode.H_STATE: "the switch is already under way",
    },
    source=_UVMEM,
)
H_SVM_INIT_DONE = HCALLS.declare(
    0xEF0C,
    "H_SVM_INIT_DONE",
    callers=_UV,
    errors={HCode.H_UNSUPPORTED: "no switch is under way", HCode.H_STATE: "a page could not be moved"},
    source=_UVMEM,
)
H_SVM_TPM_COMM = HCALLS.declare(
    0xEF10,
    "H_SVM_TPM_COMM",
    args=(
        Reg("operation"),
        Reg("in_buffer", Kind.GPA, Memory(Direction.IN, "in_size")),
        Reg("in_size", Kind.SIZE),
        Reg("out_buffer", Kind.GPA, Memory(Direction.OUT, "out_size")),
        Reg("out_size", Kind.SIZE),
    ),
    results=(Reg("response_size", Kind.SIZE),),
    callers=_UV,
    errors={HCode.H_FUNCTION: "no TPM proxy device"},
    source="QEMU spapr_tpm_proxy.c",
)
H_SVM_INIT_ABORT = HCALLS.declare(
    0xEF14,
    "H_SVM_INIT_ABORT",
    callers=_UV,
    errors={
        HCode.H_PARAMETER: "done: this is what the VM gets as the result of UV_ESM",
        HCode.H_UNSUPPORTED: "no switch is under way",
        HCode.H_STATE: "the VM is already secure",
    },
    source=_UVMEM,
)

H_PAGE_IN_NONSHARED = 0
H_PAGE_IN_SHARED = 1

# KVM and QEMU private calls.
H_RTAS = HCALLS.declare(
    0xF000,
    "H_RTAS",
    args=(Reg("args", Kind.GPA, Memory(Direction.INOUT, 1, 256)),),
    callers=_GUEST,
    errors={
        HCode.H_PARAMETER: "the argument block is outside memory or malformed",
        HCode.H_BUSY: "of a secure VM: every page for arguments is in use, or the hypervisor is busy with one",
    },
    source=_QEMU,
)
H_LOGICAL_MEMOP = HCALLS.declare(
    0xF001,
    "H_LOGICAL_MEMOP",
    args=(
        Reg("dst", Kind.GPA, Memory(Direction.OUT, "count")),
        Reg("src", Kind.GPA, Memory(Direction.IN, "count")),
        Reg("element_shift", Kind.SHIFT),
        Reg("count", Kind.COUNT),
        Reg("operation"),
    ),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "a range is outside memory or misaligned"},
    source=_QEMU,
)
H_CAS = HCALLS.declare(
    0xF002,
    "H_CAS",
    args=(
        Reg("vector", Kind.GPA, Memory(Direction.IN, 1, 4096)),
        Reg("buffer", Kind.GPA, Memory(Direction.OUT, "buffer_size")),
        Reg("buffer_size", Kind.SIZE),
    ),
    callers=_GUEST,
    errors={
        HCode.H_PARAMETER: "the vector is malformed, or asks for what is not offered",
        HCode.H_RESOURCE: "the buffer is too small for the device tree",
    },
    source=_QEMU,
)
H_UPDATE_DT = HCALLS.declare(
    0xF003,
    "H_UPDATE_DT",
    args=(Reg("fdt", Kind.GPA, Memory(Direction.IN, 1, 1 << 20)),),
    callers=_GUEST,
    errors={HCode.H_PARAMETER: "no device tree at this address"},
    source=_QEMU,
)
H_SET_DMA_BYPASS = HCALLS.declare(
    0xF004,
    "H_SET_DMA_BYPASS",
    args=(Reg("buid"), Reg("config_addr"), Reg("enable")),
    callers=_GUEST,
    errors={
        HCode.H_PARAMETER: "no such device, or enable is neither 0 nor 1",
        HCode.H_FUNCTION: "no device of this machine has such a switch",
        HCode.H_UNSUPPORTED: "this device cannot be taken out of the IOMMU",
        HCode.H_IN_USE: "the device runs; it is switched between its reset and DRIVER_OK",
    },
    source="this project's own: proposed on linuxppc-dev in August 2018, without a name or a number",
)

# The declarations of the other subjects enter the table when they are imported.
from protocol import hcalls_memory as _memory  # noqa: E402, F401
from protocol import hcalls_platform as _platform  # noqa: E402, F401
from protocol import hcalls_storage as _storage  # noqa: E402, F401
from protocol import hcalls_vio as _vio  # noqa: E402, F401
from protocol import hcalls_xive as _xive  # noqa: E402, F401
