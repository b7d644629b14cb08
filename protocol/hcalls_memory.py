"""Hypercalls of the hashed page table, of radix tables and of memory management: named, not handled.

Guests of this machine are radix and their partition-scoped map is made by kvm or the ultravisor.
"""

from __future__ import annotations

from protocol.declare import Kind, Reg
from protocol.hcalls_table import FLAGS, declare_unhandled, words

_PTE_INDEX = Reg("pte_index")
_AVPN = Reg("avpn")
_PTE = words("pte0", "pte1")

# The hashed page table.
declare_unhandled(0x04, "H_REMOVE", (FLAGS, _PTE_INDEX, _AVPN), _PTE)
declare_unhandled(0x08, "H_ENTER", (FLAGS, _PTE_INDEX, *_PTE), (_PTE_INDEX,))
declare_unhandled(0x0C, "H_READ", (FLAGS, _PTE_INDEX), _PTE)
declare_unhandled(0x10, "H_CLEAR_MOD", (FLAGS, _PTE_INDEX), _PTE)
declare_unhandled(0x14, "H_CLEAR_REF", (FLAGS, _PTE_INDEX), _PTE)
declare_unhandled(0x18, "H_PROTECT", (FLAGS, _PTE_INDEX, _AVPN))
declare_unhandled(
    0x124, "H_BULK_REMOVE", words(*(f"entry{n}" for n in range(8))), words(*(f"out{n}" for n in range(8)))
)
declare_unhandled(
    0x328, "H_BLOCK_REMOVE", words(*(f"entry{n}" for n in range(9))), words(*(f"out{n}" for n in range(9)))
)
declare_unhandled(0x358, "H_CLEAR_HPT")
declare_unhandled(0x36C, "H_RESIZE_HPT_PREPARE", (FLAGS, Reg("shift", Kind.SHIFT)))
declare_unhandled(0x370, "H_RESIZE_HPT_COMMIT", (FLAGS, Reg("shift", Kind.SHIFT)))

# Radix tables.
declare_unhandled(0x448, "H_RPT_INVALIDATE", words("pid", "target", "type", "page_sizes", "start", "end"))

# Pages and caches.
declare_unhandled(0x2C, "H_PAGE_INIT", (FLAGS, Reg("dst", Kind.GPA), Reg("src", Kind.GPA)))
declare_unhandled(0x44, "H_LOGICAL_CACHE_LOAD", (Reg("size", Kind.SIZE), Reg("gpa", Kind.GPA)), words("value"))
declare_unhandled(0x48, "H_LOGICAL_CACHE_STORE", (Reg("size", Kind.SIZE), Reg("gpa", Kind.GPA), Reg("value")))
declare_unhandled(0x4C, "H_LOGICAL_ICBI", (Reg("gpa", Kind.GPA),))
declare_unhandled(0x50, "H_LOGICAL_DCBF", (Reg("gpa", Kind.GPA),))
declare_unhandled(0x5C, "H_REAL_TO_LOGICAL", (Reg("ra"),), (Reg("gpa", Kind.GPA),))
declare_unhandled(0x78, "H_MIGRATE_DMA", words("new_page", "list", "n_entries"))

# Memory entitlement and placement.
declare_unhandled(0x2D0, "H_SET_MPP", words("entitled_memory", "weight"))
declare_unhandled(0x2D4, "H_GET_MPP", (), words(*(f"value{n}" for n in range(7))))
declare_unhandled(0x314, "H_GET_MPP_X", (), words(*(f"value{n}" for n in range(7))))
declare_unhandled(
    0x2EC,
    "H_HOME_NODE_ASSOCIATIVITY",
    (FLAGS, Reg("vcpu", Kind.CPU)),
    words(*(f"domain{n}" for n in range(6))),
)
