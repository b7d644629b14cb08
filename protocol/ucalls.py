"""Every ultracall. R3 number, arguments from R4, result in R3, outputs from R4.

Source: open-power/ultravisor `include/uapi_uvcall.h`; Linux `Documentation/powerpc/ultravisor.rst`.
"""

from __future__ import annotations

from protocol.codes import UCode
from protocol.declare import Caller, CallTable, Code, Kind, Reg, Space

UCALLS = CallTable(Space.UCALL)

_HV = (Caller.HYPERVISOR,)
_SVM = (Caller.SVM,)
_FW = (Caller.FIRMWARE,)
_RST = "Linux ultravisor.rst"
_UAPI = "ultravisor uapi_uvcall.h"

PIDR = Reg("pidr", Kind.PID)
"""The processor's PIDR: which process runs."""
_LPID = Reg("lpid", Kind.LPID)
_GPA = Reg("gpa", Kind.GPA)
_FLAGS = Reg("flags", Kind.FLAGS)
_ORDER = Reg("order", Kind.SHIFT)
_NO_FIRMWARE: dict[Code, str] = {UCode.U_FUNCTION: "always: this machine has no host firmware, SCOM or SBE"}

UV_WRITE_PATE = UCALLS.declare(
    0xF104,
    "UV_WRITE_PATE",
    args=(_LPID, Reg("dw0"), Reg("dw1")),
    callers=_HV,
    errors={
        UCode.U_PARAMETER: "no such lpid",
        UCode.U_PERMISSION: "the partition is secure and dw0 is not its own page table",
    },
    source=_RST,
)
UV_RESTRICTED_SPR_WRITE = UCALLS.declare(
    0xF108,
    "UV_RESTRICTED_SPR_WRITE",
    args=(Reg("spr", Kind.SPR), Reg("value")),
    callers=_HV,
    errors={UCode.U_PARAMETER: "not a register of this list"},
    source=_UAPI,
)
UV_RESTRICTED_SPR_READ = UCALLS.declare(
    0xF10C,
    "UV_RESTRICTED_SPR_READ",
    args=(Reg("spr", Kind.SPR),),
    results=(Reg("unused"), Reg("value")),
    callers=_HV,
    errors={UCode.U_PARAMETER: "not a register of this list"},
    source=_UAPI,
)
UV_ESM = UCALLS.declare(
    0xF110,
    "UV_ESM",
    args=(Reg("kbase", Kind.GPA), Reg("fdt", Kind.GPA)),
    callers=(Caller.VM, Caller.SVM),
    errors={
        UCode.U_P2: "kbase is 0 or outside the memory slots",
        UCode.U_P3: "fdt is 0 or outside RAM",
        UCode.U_RETRY: "a switch of this VM is already under way",
        UCode.U_PARAMETER: "refused; the reason is in the audit log of the host",
        UCode.U_PERMISSION: "not a VM of this host",
    },
    source=_RST,
)
UV_READ_SCOM = UCALLS.declare(
    0xF114,
    "UV_READ_SCOM",
    args=(Reg("partition"), Reg("address")),
    results=(Reg("value"),),
    callers=_FW,
    errors=_NO_FIRMWARE,
    source=_UAPI,
)
UV_WRITE_SCOM = UCALLS.declare(
    0xF118,
    "UV_WRITE_SCOM",
    args=(Reg("partition"), Reg("address"), Reg("value")),
    callers=_FW,
    errors=_NO_FIRMWARE,
    source=_UAPI,
)
UV_RETURN = UCALLS.declare(
    0xF11C,
    "UV_RETURN",
    # R0 and R31 stand first and second on the wire: the result of the hypercall and the one-use cookie.
    args=(
        Reg("r0"),
        Reg("cookie"),
        *(Reg(f"r{n}") for n in range(4, 13)),
    ),
    callers=_HV,
    errors={UCode.U_PARAMETER: "no open reflected call has this cookie"},
    source=_RST,
)
UV_REGISTER_MEM_SLOT = UCALLS.declare(
    0xF120,
    "UV_REGISTER_MEM_SLOT",
    args=(_LPID, _GPA, Reg("size_bytes", Kind.SIZE), _FLAGS, Reg("slot", Kind.COUNT)),
    callers=_HV,
    errors={
        UCode.U_PARAMETER: "no switch of this lpid is under way, or secure memory is exhausted",
        UCode.U_P2: "gpa not aligned to 64 KiB",
        UCode.U_P3: "size is 0, not aligned or wraps",
        UCode.U_P4: "a flag is set",
        UCode.U_P5: "slot number too large, taken, or its range overlaps another slot",
    },
    source=_RST,
)
UV_UNREGISTER_MEM_SLOT = UCALLS.declare(
    0xF124,
    "UV_UNREGISTER_MEM_SLOT",
    args=(_LPID, Reg("slot", Kind.COUNT)),
    callers=_HV,
    errors={
        UCode.U_PARAMETER: "no such lpid",
        UCode.U_P2: "no such slot",
        UCode.U_STATE: "the VM is secure and runs on the slot",
    },
    source=_RST,
)
UV_PAGE_IN = UCALLS.declare(
    0xF128,
    "UV_PAGE_IN",
    args=(_LPID, Reg("src_ra", Kind.RA), _GPA, _FLAGS, _ORDER),
    callers=_HV,
    errors={
        UCode.U_PARAMETER: "no such secure VM",
        UCode.U_P2: "src_ra is 0, secure, or of another partition; or the page is already secure",
        UCode.U_P3: "gpa outside the memory slots, or the image fails its check",
        UCode.U_P4: "a flag is set",
        UCode.U_P5: "order is not 16",
        UCode.U_RETRY: "the page is in transition",
        UCode.U_STATE: "the switch of this VM was aborted",
    },
    source=_RST,
)
UV_PAGE_OUT = UCALLS.declare(
    0xF12C,
    "UV_PAGE_OUT",
    args=(_LPID, Reg("dst_ra", Kind.RA), _GPA, _FLAGS, _ORDER),
    callers=_HV,
    errors={
        UCode.U_PARAMETER: "no such secure VM, or the page is already out",
        UCode.U_P2: "dst_ra is 0, secure, or of another partition",
        UCode.U_P3: "gpa outside the memory slots",
        UCode.U_P4: "a flag is set",
        UCode.U_P5: "order is not 16",
        UCode.U_RETRY: "the page is in transition, or the guest did not acknowledge its invalidation",
    },
    source=_RST,
)
UV_SHARE_PAGE = UCALLS.declare(
    0xF130,
    "UV_SHARE_PAGE",
    args=(Reg("gfn", Kind.GFN), Reg("n_pages", Kind.COUNT)),
    callers=_SVM,
    errors={
        UCode.U_P2: "the range is not wholly inside the memory slots",
        UCode.U_P3: "no page, or too many",
        UCode.U_RETRY: "a page of the range is in transition, or the guest did not acknowledge its invalidation",
        UCode.U_PARAMETER: "the hypervisor refused; no page changed",
    },
    source=_RST,
)
UV_UNSHARE_PAGE = UCALLS.declare(
    0xF134,
    "UV_UNSHARE_PAGE",
    args=(Reg("gfn", Kind.GFN), Reg("n_pages", Kind.COUNT)),
    callers=_SVM,
    errors={
        UCode.U_P2: "the range is not wholly inside the memory slots, or a page was not shared by the guest",
        UCode.U_P3: "no page, or too many",
        UCode.U_RETRY: "a page of the range is in transition, or the guest did not acknowledge its invalidation",
    },
    source=_RST,
)
UV_PAGE_INVAL = UCALLS.declare(
    0xF138,
    "UV_PAGE_INVAL",
    args=(_LPID, _GPA, _ORDER),
    callers=_HV,
    errors={
        UCode.U_PARAMETER: "no such secure VM",
        UCode.U_P2: "gpa outside the memory slots, or the page is not shared",
        UCode.U_P3: "order is not 16",
        UCode.U_RETRY: "the page is in transition",
        UCode.U_STATE: "the switch of this VM was aborted",
    },
    source=_RST,
)
UV_SVM_TERMINATE = UCALLS.declare(
    0xF13C,
    "UV_SVM_TERMINATE",
    args=(_LPID,),
    callers=_HV,
    errors={UCode.U_PARAMETER: "no such lpid"},
    source=_RST,
)
UV_UNSHARE_ALL_PAGES = UCALLS.declare(
    0xF140,
    "UV_UNSHARE_ALL_PAGES",
    callers=_SVM,
    errors={UCode.U_RETRY: "a page is in transition, or the guest did not acknowledge its invalidation"},
    source=_RST,
)
_BUFFER_ARGS = (Reg("buffer", Kind.RA), Reg("handle"), Reg("offset"), Reg("size", Kind.SIZE))
UV_READ_MEM = UCALLS.declare(0xF144, "UV_READ_MEM", args=_BUFFER_ARGS, callers=_FW, errors=_NO_FIRMWARE, source=_UAPI)
UV_WRITE_MEM = UCALLS.declare(0xF148, "UV_WRITE_MEM", args=_BUFFER_ARGS, callers=_FW, errors=_NO_FIRMWARE, source=_UAPI)
UV_ESMB_GET_FILE = UCALLS.declare(
    0xF14C,
    "UV_ESMB_GET_FILE",
    hardware=(PIDR,),
    args=(Reg("offset", Kind.SIZE), *(Reg(f"name{n}", Kind.TEXT) for n in range(8))),
    # R3 is the number of bytes when not negative; the bytes follow in R4:R11.
    results=tuple(Reg(f"data{n}", Kind.TEXT) for n in range(8)),
    callers=_SVM,
    errors={
        UCode.U_PARAMETER: "no such file in the ESM blob, an offset that was already read, or another process",
    },
    source=_UAPI,
)
UV_SEND_SBE_COMMAND = UCALLS.declare(
    0xF150,
    "UV_SEND_SBE_COMMAND",
    args=(Reg("chip"), Reg("operation"), Reg("in_ra", Kind.RA), Reg("out_ra", Kind.RA)),
    callers=_FW,
    errors=_NO_FIRMWARE,
    source=_UAPI,
)

ESM_FILE_CHUNK_BYTES = 64
"""UV_ESMB_GET_FILE hands out at most this many bytes a call."""
