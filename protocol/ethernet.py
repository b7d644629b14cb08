"""Sizes of Ethernet frames on the networks between VMs.

Source: IEEE 802.3 (header: destination, source, type; no FCS and no preamble, as virtio-net carries them).
"""

from __future__ import annotations

MAC_BYTES = 6
HEADER_BYTES = 14
MIN_MTU = 68
MAX_MTU = 9000
DEFAULT_MTU = 1500
MAX_FRAME_BYTES = HEADER_BYTES + MAX_MTU
MULTICAST = 1
"""Bit of the first byte of an address: a group, broadcast included. No station sends from one."""
LOCAL = 2
"""Bit of the first byte of an address: given by an administrator, not by a manufacturer."""
