"""Every ultracall. R3 number, arguments from R4, result in R3, outputs from R4.

Source: open-power/ultravisor `include/uapi_uvcall.h`; Linux `Documentation/powerpc/ultravisor.rst`.
"""

from __future__ import annotations

from protocol.codes import UCode
from protocol.declare import Call, Caller, CallTable, Code, Kind, Reg, Space

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
_ENDED: dict[Code, str] = {UCode.U_STATE: "the VM was ended meanwhile"}
_OF_SVM: dict[Code, str] = {UCode.U_PERMISSION: "the VM is not secure", **_ENDED}
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
        UCode.U_RETRY: "a switch of this VM is already under way, or it is secure, or just being ended",
        UCode.U_PARAMETER: "refused; the reason is in the audit log of the host",
        UCode.U_PERMISSION: "not a VM of this host",
        **_ENDED,
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
        UCode.U_STATE: "the VM has taken pages in: it is secure, or its switch is under way",
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
        **_ENDED,
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
        **_OF_SVM,
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
        **_OF_SVM,
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
        UCode.U_STATE: "the switch of this VM was aborted, or the VM was ended meanwhile",
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
    errors={UCode.U_RETRY: "a page is in transition, or the guest did not acknowledge its invalidation", **_OF_SVM},
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
        UCode.U_PERMISSION: "the VM is not secure",
    },
    source=_UAPI,
    private=True,
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


# -- migration: pefbox's own, PEF has none ------------------------------------------------------------------------

_OWN = "pefbox (docs/migration.md)"
_SNAPSHOT = "pefbox (docs/snapshot.md)"
_OFFSET = Reg("offset", Kind.SIZE)
_LENGTH = Reg("n_bytes", Kind.SIZE)
_STEP_ERRORS: dict[Code, str] = {
    UCode.U_PARAMETER: "no such VM, or a place outside its stream buffer",
    UCode.U_STATE: "the migration is not at that step",
    UCode.U_PERMISSION: "refused; the reason is in the audit log of the host",
    UCode.U_RETRY: "the guest did not acknowledge, or a page is in transition",
}


def _step(number: int, name: str, *more: Reg, results: tuple[Reg, ...] = (_LENGTH,), source: str = _OWN) -> Call:
    """A step of a migration: what it takes and gives lies at `offset` of the VM's stream buffer."""
    args = (_LPID, _OFFSET, *more)
    return UCALLS.declare(number, name, args=args, results=results, callers=_HV, errors=_STEP_ERRORS, source=source)


UV_EXPORT_OFFER = _step(0xF1C0, "UV_EXPORT_OFFER")
"""Begin: the first message of the handshake, for the other ultravisor."""
UV_EXPORT_ANSWER = _step(0xF1C4, "UV_EXPORT_ANSWER", _LENGTH)
"""Takes the second message, gives the third."""
UV_EXPORT_PAGES = _step(
    0xF1C8,
    "UV_EXPORT_PAGES",
    results=(
        _LENGTH,
        Reg("zero_pages", Kind.COUNT),
        Reg("data_pages", Kind.COUNT),
        Reg("owed_pages", Kind.COUNT),
    ),
)
"""A record of the next pages that are owed; of 0 bytes when none is."""
UV_EXPORT_ROUND = _step(
    0xF1CC,
    "UV_EXPORT_ROUND",
    Reg("dirty_offset", Kind.SIZE),
    results=(_LENGTH, Reg("owed_pages", Kind.COUNT)),
)
"""The record that ends a round. At `dirty_offset` a bit a GFN: host-readable pages that were written since the last."""
UV_EXPORT_STOP = _step(
    0xF1D0,
    "UV_EXPORT_STOP",
    Reg("dirty_offset", Kind.SIZE),
    results=(_LENGTH, Reg("owed_pages", Kind.COUNT)),
)
"""As UV_EXPORT_ROUND, with the guest frozen."""
UV_EXPORT_STATE = _step(0xF1D4, "UV_EXPORT_STATE", results=(_LENGTH, Reg("more", Kind.FLAGS)))
"""The next record of what is no page; the last one is FINAL, and has `more` 0."""
UV_EXPORT_READY = _step(0xF1D8, "UV_EXPORT_READY", _LENGTH)
"""Takes the destination's READY, gives the start token."""
UV_EXPORT_STATEMENT = _step(0xF1DC, "UV_EXPORT_STATEMENT", _LENGTH, results=(Reg("moved", Kind.FLAGS),))
"""Takes the destination's word. `moved` 1: the VM runs there, and nothing of it is left here; 0: it runs here again."""
UV_EXPORT_CANCEL = _step(0xF1E0, "UV_EXPORT_CANCEL", results=())
"""The VM stays here; U_STATE once the token was given."""
UV_IMPORT_OFFER = _step(0xF1E4, "UV_IMPORT_OFFER", _LENGTH)
"""Takes the first message of the handshake, gives the second."""
UV_IMPORT_CONFIRM = _step(0xF1E8, "UV_IMPORT_CONFIRM", _LENGTH, results=())
"""Takes the third message."""
UV_IMPORT_RECORD = _step(0xF1EC, "UV_IMPORT_RECORD", _LENGTH, results=(Reg("checked", Kind.FLAGS),))
"""Takes the next record. `checked` 1: all is here, whole and newest, and the guest has its state."""
UV_IMPORT_READY = _step(0xF1F0, "UV_IMPORT_READY")
"""The record READY for the source."""
UV_IMPORT_TOKEN = _step(0xF1F4, "UV_IMPORT_TOKEN", _LENGTH)
"""Takes the start token: the VM runs here. Gives the word for the source."""
UV_IMPORT_ABANDON = _step(0xF1F8, "UV_IMPORT_ABANDON")
"""The VM never runs here, and what came is wiped. Gives the word for the source."""

UV_SAVE_BEGIN = _step(0xF1A0, "UV_SAVE_BEGIN", source=_SNAPSHOT)
"""Begin a snapshot; its head. UV_EXPORT_STOP, PAGES and STATE follow, or UV_EXPORT_CANCEL at any time."""
UV_SAVE_COMMIT = _step(0xF1A4, "UV_SAVE_COMMIT", results=(), source=_SNAPSHOT)
"""All is stored: the VM is in the snapshot, and nothing of it is left here."""
UV_RESTORE_BEGIN = _step(0xF1A8, "UV_RESTORE_BEGIN", _LENGTH, results=(), source=_SNAPSHOT)
"""Takes the head of a snapshot. UV_IMPORT_RECORD and READY follow, or UV_IMPORT_ABANDON at any time."""
UV_RESTORE_START = _step(0xF1AC, "UV_RESTORE_START", results=(), source=_SNAPSHOT)
"""The VM runs here, and its snapshot is used up."""

MIGRATION_UCALLS = {call.number: call for call in UCALLS if call.source in (_OWN, _SNAPSHOT)}
"""What kvm passes on for qemu."""
