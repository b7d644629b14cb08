"""Hypercalls of storage class memory (persistent memory, NVDIMM): named, not handled."""

from __future__ import annotations

from protocol.declare import Kind, Reg
from protocol.hcalls_table import FLAGS, declare_unhandled, words

_DRC = Reg("drc_index")
"""Dynamic reconfiguration connector of the memory device."""
_BLOCKS = words("block", "n_blocks")
_TOKEN = Reg("continue_token", Kind.TOKEN)

declare_unhandled(0x3E4, "H_SCM_READ_METADATA", (_DRC, *words("offset", "n_bytes")), words("data"))
declare_unhandled(0x3E8, "H_SCM_WRITE_METADATA", (_DRC, *words("offset", "data", "n_bytes")))
declare_unhandled(
    0x3EC, "H_SCM_BIND_MEM", (_DRC, *_BLOCKS, Reg("gpa", Kind.GPA), _TOKEN), (_TOKEN, *words("gpa", "n_bound"))
)
declare_unhandled(
    0x3F0, "H_SCM_UNBIND_MEM", (_DRC, Reg("gpa", Kind.GPA), Reg("n_blocks"), _TOKEN), (_TOKEN, Reg("n_unbound"))
)
declare_unhandled(0x3F4, "H_SCM_QUERY_BLOCK_MEM_BINDING", (_DRC, Reg("block")), words("gpa"))
declare_unhandled(0x3F8, "H_SCM_QUERY_LOGICAL_MEM_BINDING", (Reg("gpa", Kind.GPA),), (_DRC, Reg("block")))
declare_unhandled(0x3FC, "H_SCM_UNBIND_ALL", (*words("scope"), _DRC, _TOKEN), (_TOKEN, Reg("n_unbound")))
declare_unhandled(0x400, "H_SCM_HEALTH", (_DRC,), words("bitmap", "valid"))
declare_unhandled(0x418, "H_SCM_PERFORMANCE_STATS", (FLAGS, *words("buffer", "n_bytes")), words("n_bytes"))
declare_unhandled(0x44C, "H_SCM_FLUSH", (_DRC, _TOKEN), (_TOKEN,))
