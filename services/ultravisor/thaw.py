"""Letting a frozen guest run. It must hear of it however long it is held up: nobody else can let it go."""

from __future__ import annotations

import trio

from protocol.codes import HCode
from protocol.errors import PeerGone, PefboxError
from protocol.messages import SVM_THAW, RunBody
from protocol.refusals import HELD_UP_STATES
from services.ultravisor.partition import Partition

ANSWER_SECONDS = 3.0
_LOOK_AGAIN_SECONDS = 0.1
_VCPU = 0


async def thaw_guest(partition: Partition, cause: int) -> bool:
    """Returns once the guest has answered or is gone: whether it runs. A guest that is stopped is waited for."""
    partition.n_thaws += 1
    try:
        return await _thaw(partition, cause)
    finally:
        partition.n_thaws -= 1


async def _thaw(partition: Partition, cause: int) -> bool:
    while True:
        try:
            with partition.guest.patience.fail_after(ANSWER_SECONDS):
                status = await partition.guest.call(SVM_THAW, RunBody(_VCPU), cause)
            return status.code == HCode.H_SUCCESS
        except trio.TooSlowError:
            continue
        except PeerGone as gone:
            if gone.state not in HELD_UP_STATES:
                return False
            await trio.sleep(_LOOK_AGAIN_SECONDS)
        except PefboxError:
            return False
