"""Hypercalls of virtual and physical adapters that this machine has none of: named, not handled.

Command queues (vscsi, vfc, vTPM), the virtual LAN, server terminals, InfiniBand and Ethernet host adapters.
"""

from __future__ import annotations

from protocol.hcalls_table import UNIT, declare_unhandled, words

# Command response queues.
declare_unhandled(0xFC, "H_REG_CRQ", (UNIT, *words("queue", "n_bytes")))
declare_unhandled(0x100, "H_FREE_CRQ", (UNIT,))
declare_unhandled(0x104, "H_VIO_SIGNAL", (UNIT, *words("mode")))
declare_unhandled(0x108, "H_SEND_CRQ", (UNIT, *words("message_high", "message_low")))
declare_unhandled(0x110, "H_COPY_RDMA", words("n_bytes", "src_liobn", "src_ioba", "dst_liobn", "dst_ioba"))
declare_unhandled(0x2B0, "H_ENABLE_CRQ", (UNIT,))
declare_unhandled(0x2DC, "H_REG_SUB_CRQ", (UNIT, *words("queue", "n_bytes")), words("queue_number", "irq"))
declare_unhandled(0x2E0, "H_FREE_SUB_CRQ", (UNIT, *words("queue_number")))
declare_unhandled(0x2E4, "H_SEND_SUB_CRQ", (UNIT, *words("queue_number", "word0", "word1", "word2", "word3")))
declare_unhandled(0x2E8, "H_SEND_SUB_CRQ_INDIRECT", (UNIT, *words("queue_number", "ioba", "n_entries")))
declare_unhandled(0x2A8, "H_VIOCTL", (UNIT, *words("function", "value1", "value2", "value3")), words("out0", "out1"))

# Virtual LAN.
declare_unhandled(0x114, "H_REGISTER_LOGICAL_LAN", (UNIT, *words("buffer_list", "receive_queue", "filter_list", "mac")))
declare_unhandled(0x118, "H_FREE_LOGICAL_LAN", (UNIT,))
declare_unhandled(0x11C, "H_ADD_LOGICAL_LAN_BUFFER", (UNIT, *words("descriptor")))
declare_unhandled(
    0x120,
    "H_SEND_LOGICAL_LAN",
    (UNIT, *words(*(f"descriptor{n}" for n in range(6)), "continue_token")),
    words("continue_token"),
)
declare_unhandled(0x130, "H_MULTICAST_CTRL", (UNIT, *words("command", "address")))
declare_unhandled(0x14C, "H_CHANGE_LOGICAL_LAN_MAC", (UNIT, *words("mac")))
declare_unhandled(0x1D4, "H_FREE_LOGICAL_LAN_BUFFER", (UNIT, *words("n_bytes")))
declare_unhandled(0x244, "H_ILLAN_ATTRIBUTES", (UNIT, *words("reset_mask", "set_mask")), words("attributes"))

# Server side of the virtual terminal.
declare_unhandled(0x150, "H_VTERM_PARTNER_INFO", (UNIT, *words("partition", "partner", "buffer")))
declare_unhandled(0x154, "H_REGISTER_VTERM", (UNIT, *words("partition", "partner")))
declare_unhandled(0x158, "H_FREE_VTERM", (UNIT,))

# InfiniBand (HCA) and Ethernet (HEA) host adapters: names alone.
for _number, _name in {
    0x15C: "H_RESET_EVENTS",
    0x160: "H_ALLOC_RESOURCE",
    0x164: "H_FREE_RESOURCE",
    0x168: "H_MODIFY_QP",
    0x16C: "H_QUERY_QP",
    0x170: "H_REREGISTER_PMR",
    0x174: "H_REGISTER_SMR",
    0x178: "H_QUERY_MR",
    0x17C: "H_QUERY_MW",
    0x180: "H_QUERY_HCA",
    0x184: "H_QUERY_PORT",
    0x188: "H_MODIFY_PORT",
    0x18C: "H_DEFINE_AQP1",
    0x190: "H_GET_TRACE_BUFFER",
    0x194: "H_DEFINE_AQP0",
    0x198: "H_RESIZE_MR",
    0x19C: "H_ATTACH_MCQP",
    0x1A0: "H_DETACH_MCQP",
    0x1A4: "H_CREATE_RPT",
    0x1A8: "H_REMOVE_RPT",
    0x1AC: "H_REGISTER_RPAGES",
    0x1B0: "H_DISABLE_AND_GETC",
    0x1B4: "H_ERROR_DATA",
    0x1B8: "H_GET_HCA_INFO",
    0x1BC: "H_GET_PERF_COUNT",
    0x1C0: "H_MANAGE_TRACE",
    0x1E4: "H_QUERY_INT_STATE",
    0x250: "H_MODIFY_HEA_QP",
    0x254: "H_QUERY_HEA_QP",
    0x258: "H_QUERY_HEA",
    0x25C: "H_QUERY_HEA_PORT",
    0x260: "H_MODIFY_HEA_PORT",
    0x264: "H_REG_BCMC",
    0x268: "H_DEREG_BCMC",
    0x26C: "H_REGISTER_HEA_RPAGES",
    0x270: "H_DISABLE_AND_GET_HEA",
    0x274: "H_GET_HEA_INFO",
    0x278: "H_ALLOC_HEA_RESOURCE",
    0x284: "H_ADD_CONN",
    0x288: "H_DEL_CONN",
}.items():
    declare_unhandled(_number, _name)
