"""Result codes of hypercalls, ultracalls and RTAS services.

Values: Linux `arch/powerpc/include/asm/hvcall.h` and `ultravisor-api.h`; PAPR for RTAS.
Where Linux and the ultravisor's own sources disagree (U_BUSY is 1 or -2), Linux's value is used.
"""

from __future__ import annotations

from enum import IntEnum


class HCode(IntEnum):
    """What a hypercall returns in R3."""

    H_SUCCESS = 0
    H_BUSY = 1
    H_CLOSED = 2
    H_NOT_AVAILABLE = 3
    H_CONSTRAINED = 4
    H_PARTIAL = 5
    H_IN_PROGRESS = 14
    H_PAGE_REGISTERED = 15
    H_CONTINUE = 18
    H_LONG_BUSY_ORDER_1_MSEC = 9900
    H_LONG_BUSY_ORDER_10_MSEC = 9901
    H_LONG_BUSY_ORDER_100_MSEC = 9902
    H_LONG_BUSY_ORDER_1_SEC = 9903
    H_LONG_BUSY_ORDER_10_SEC = 9904
    H_LONG_BUSY_ORDER_100_SEC = 9905
    H_HARDWARE = -1
    H_FUNCTION = -2
    H_PRIVILEGE = -3
    H_PARAMETER = -4
    H_BAD_MODE = -5
    H_PTEG_FULL = -6
    H_NOT_FOUND = -7
    H_NO_MEM = -9
    H_AUTHORITY = -10
    H_PERMISSION = -11
    H_DROPPED = -12
    H_RESOURCE = -16
    H_NOT_ENOUGH_RESOURCES = -44
    H_ABORTED = -54
    H_P2 = -55
    H_P3 = -56
    H_P4 = -57
    H_P5 = -58
    H_P6 = -59
    H_P7 = -60
    H_P8 = -61
    H_P9 = -62
    H_TOO_BIG = -64
    H_UNSUPPORTED = -67
    H_OVERLAP = -68
    H_STATE = -75
    H_IN_USE = -77


class UCode(IntEnum):
    """What an ultracall returns in R3."""

    U_SUCCESS = 0
    U_BUSY = 1
    U_NOT_AVAILABLE = 3
    U_FUNCTION = -2
    U_PARAMETER = -4
    U_RETRY = -5
    U_PERMISSION = -11
    U_P2 = -55
    U_P3 = -56
    U_P4 = -57
    U_P5 = -58
    U_BAD_MODE = -59
    U_STATE = -75


class RtasStatus(IntEnum):
    """First return word of an RTAS service."""

    SUCCESS = 0
    NO_ERRORS_FOUND = 1
    HARDWARE_ERROR = -1
    BUSY = -2
    PARAMETER_ERROR = -3
    NOT_AUTHORIZED = -9002
