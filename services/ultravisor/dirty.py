"""Which pages of a secure VM were written. Its processor marks them in a map that it shares with the ultravisor alone.

kvm must not reach that map: a page whose mark it cleared would be taken for an unchanged one.
"""

from __future__ import annotations

from protocol.codes import UCode
from protocol.errors import HostFault
from services.ultravisor.partition import Partition


async def collect_dirty(partition: Partition, gfns: range, cause: int = 0) -> list[int]:
    """Those of `gfns` that guest or ultravisor wrote since they were last collected, or since ESM; ascending.

    Raises HostFault when the VM is not secure or ends, or its guest does not acknowledge; nothing is lost then.
    """
    dirty = partition.dirty
    if not partition.secure or dirty is None:
        raise HostFault("the VM is not secure, or its guest gave no dirty map")
    written: list[int] = []

    async def work() -> list[int]:
        taken = dirty.take(gfns)
        settled = False
        try:
            settled = not taken or await partition.invalidator.invalidate(taken, cause)
        finally:
            if not settled:
                dirty.put_back(taken)
        written.extend(taken)
        return [UCode.U_SUCCESS if settled else UCode.U_RETRY]

    code = (await partition.operation(work()))[0]
    if code != UCode.U_SUCCESS:
        raise HostFault("the guest does not acknowledge, or the secure VM has ended")
    return written
