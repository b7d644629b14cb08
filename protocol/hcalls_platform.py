"""Hypercalls of processor registers, partition management, accelerators and nested guests: named, not handled."""

from __future__ import annotations

from protocol.declare import Kind, Reg
from protocol.hcalls_table import FLAGS, declare_unhandled, words

_VCPU = Reg("vcpu", Kind.CPU)

# Per-processor areas and debug registers.
declare_unhandled(0x24, "H_SET_SPRG0", words("value"))
declare_unhandled(0x28, "H_SET_DABR", words("value"))
declare_unhandled(0x134, "H_SET_XDABR", words("value", "extension"))
declare_unhandled(0x30, "H_SET_ASR", words("value"))
declare_unhandled(0x34, "H_ASR_ON")
declare_unhandled(0x38, "H_ASR_OFF")
declare_unhandled(0x7C, "H_PERFMON", words("set_mode", "reset_mode"), words("mode"))
declare_unhandled(0x45C, "H_WATCHDOG", (FLAGS, *words("watchdog", "timeout_ms")), words("value"))

# Partition performance, energy and migration by the management console.
declare_unhandled(0xEC, "H_GET_PPP", (), words("entitlement", "group", "weight", "pool"))
declare_unhandled(0xF0, "H_SET_PPP", words("entitlement", "weight"))
declare_unhandled(0xF4, "H_PURR", (), words("value"))
declare_unhandled(0xF8, "H_PIC", (), words("pool_idle", "n_processors"))
declare_unhandled(0x60, "H_HYPERVISOR_DATA", words("control", "buffer", "n_bytes"))
declare_unhandled(0x1D8, "H_POLL_PENDING")
declare_unhandled(0x2A0, "H_VASI_SIGNAL", words("handle", "signal", "status"))
declare_unhandled(0x2A4, "H_VASI_STATE", words("handle"), words("state"))
declare_unhandled(0x2B8, "H_GET_EM_PARMS", words("resource"), words(*(f"value{n}" for n in range(4))))
declare_unhandled(0x2F4, "H_BEST_ENERGY", words("code", "resource"), words("value"))
declare_unhandled(0x360, "H_REQUEST_VMC", words("unit_address"))
declare_unhandled(0x450, "H_GET_ENERGY_SCALE_INFO", (FLAGS, *words("first", "buffer", "n_bytes")))
declare_unhandled(0xF078, "H_GET_24X7_CATALOG_PAGE", words("buffer", "version", "page"))
declare_unhandled(0xF07C, "H_GET_24X7_DATA", words("request", "request_bytes", "result", "result_bytes"))
declare_unhandled(0xF080, "H_GET_PERF_COUNTER_INFO", words("buffer", "n_bytes"))

# Accelerators: coprocessor requests, VAS windows, NX capabilities.
declare_unhandled(0x304, "H_COP", (FLAGS, *words("resource", "in", "in_bytes", "out", "out_bytes")))
declare_unhandled(0x388, "H_ALLOCATE_VAS_WINDOW", words("capability", "type", "credits"), words("window"))
declare_unhandled(0x38C, "H_MODIFY_VAS_WINDOW", words("window", "pid", "flags", "amr"))
declare_unhandled(0x390, "H_DEALLOCATE_VAS_WINDOW", words("window"))
declare_unhandled(0x394, "H_QUERY_VAS_WINDOW", words("window", "result"))
declare_unhandled(0x398, "H_QUERY_VAS_CAPABILITIES", words("capability", "result"))
declare_unhandled(0x39C, "H_QUERY_NX_CAPABILITIES", words("capability", "result"))
declare_unhandled(0x3A0, "H_GET_NX_FAULT", words("window", "buffer"))

# A hypervisor inside a guest.
declare_unhandled(0xF800, "H_SET_PARTITION_TABLE", words("table"))
declare_unhandled(0xF804, "H_ENTER_NESTED", words("hv_state", "registers"))
declare_unhandled(0xF808, "H_TLB_INVALIDATE", words("instruction", "rs", "rb"))
declare_unhandled(0xF80C, "H_COPY_TOFROM_GUEST", words("lpid", "pid", "address", "destination", "source", "n_bytes"))
