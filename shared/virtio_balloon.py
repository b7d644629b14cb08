"""The memory balloon device: configuration space, queues, page numbers, statistics.

The driver names pages of 4 KiB by their guest physical page numbers, little-endian u32 one after the other, whatever
its own page size is and whatever addresses its rings have: no IOMMU translates them.

Source: VIRTIO 1.4, section 5.5.
"""

from __future__ import annotations

import struct
from enum import IntEnum

INFLATE_QUEUE = 0
DEFLATE_QUEUE = 1
STATS_QUEUE = 2
"""With STATS_VQ."""

PFN_SHIFT = 12
PFN_BYTES = 4


class BalloonFeature(IntEnum):
    """Bit numbers of the balloon device's features."""

    MUST_TELL_HOST = 0
    """A page is the driver's again only when the device has taken note."""
    STATS_VQ = 1
    DEFLATE_ON_OOM = 2
    FREE_PAGE_HINT = 3
    PAGE_POISON = 4
    PAGE_REPORTING = 5


class BalloonConfig(IntEnum):
    """Offsets in the device configuration space, all u32."""

    NUM_PAGES = 0
    """How many pages the host wants in the balloon."""
    ACTUAL = 4
    """How many there are, as the driver writes."""
    FREE_PAGE_HINT_CMD_ID = 8
    """With FREE_PAGE_HINT."""
    POISON_VAL = 12
    """With PAGE_POISON."""


BALLOON_CONFIG = struct.Struct("<II")
"""num_pages, actual: all that there is without FREE_PAGE_HINT and PAGE_POISON."""


class StatTag(IntEnum):
    """What a statistic counts: bytes of memory, or events since the guest's start."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJOR_FAULTS = 2
    MINOR_FAULTS = 3
    FREE_MEMORY = 4
    TOTAL_MEMORY = 5
    AVAILABLE_MEMORY = 6
    DISK_CACHES = 7
    HUGETLB_ALLOCATIONS = 8
    HUGETLB_FAILURES = 9
    OOM_KILLS = 10
    ALLOCATION_STALLS = 11
    ASYNC_SCANS = 12
    DIRECT_SCANS = 13
    ASYNC_RECLAIMS = 14
    DIRECT_RECLAIMS = 15


STAT = struct.Struct("<HQ")
"""tag, value; packed."""
