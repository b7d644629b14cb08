"""The declared calls that no process answers, each with its reason.

Whoever issues one gets H_FUNCTION, U_FUNCTION or, for RTAS, PARAMETER_ERROR. A call that becomes handled leaves this
list in the same change: a service tests that its handlers and this list together are exactly the declared calls.
"""

from __future__ import annotations

from enum import Enum

from protocol.hcalls import HCALLS
from protocol.rtas import RTAS, SERVED_BY
from protocol.ucalls import UCALLS


class Reason(Enum):
    """Why a call is not answered."""

    HPT = "hashed page tables: guests are radix, and a VM with a hashed table cannot turn secure"
    PARTITION_TABLE = "partition-scoped maps are made by kvm and the ultravisor; guests keep no process table here"
    CACHE = "caches of logical addresses are not modelled"
    ENTITLEMENT = "memory and processor entitlement, placement and energy belong to a management console"
    XIVE = "XIVE is not offered; interrupts are XICS"
    SCM = "no storage class memory (SCM, NVDIMM) is modelled"
    CRQ = "no command queue device (vscsi, vfc, vTPM) is modelled"
    LAN = "no virtual LAN device is modelled; networks are virtio"
    VTERM = "the server side of a terminal is not offered to guests"
    ADAPTER = "no InfiniBand or Ethernet host adapter is modelled"
    ACCELERATOR = "no accelerator (COP, VAS, NX) is modelled"
    DEBUG_REGISTER = "debug and performance registers are not modelled"
    NESTED = "a hypervisor inside a guest is not offered"
    WATCHDOG = "no watchdog is modelled"
    SYSTEM_RESET = "a system reset comes from the monitor only"
    PARTITION_MIGRATION = "partition migration is driven by the host, never by the guest"
    TPM_PROXY = "no TPM proxy device; the machine key unwraps the lockbox"
    BOOT_NEGOTIATION = "needed by SLOF and Linux at boot; the model kernel reads the finished device tree"
    HOST_FIRMWARE = "no host firmware, SCOM or SBE exists under this ultravisor"
    ONE_CPU = "a VM has one processor"
    HOTPLUG = "indicators, sensors, power domains and dynamic reconfiguration are not modelled"
    EEH = "no PCI slot can be frozen or reset by error handling"
    VIO_BYPASS = "no device of the virtual I/O bus does DMA"


_GROUPS: dict[Reason, str] = {
    Reason.HPT: """
        H_REMOVE H_ENTER H_READ H_CLEAR_MOD H_CLEAR_REF H_PROTECT H_BULK_REMOVE H_BLOCK_REMOVE H_CLEAR_HPT
        H_RESIZE_HPT_PREPARE H_RESIZE_HPT_COMMIT
    """,
    Reason.PARTITION_TABLE: "H_RPT_INVALIDATE H_PAGE_INIT H_REAL_TO_LOGICAL H_MIGRATE_DMA",
    Reason.CACHE: "H_LOGICAL_CACHE_LOAD H_LOGICAL_CACHE_STORE H_LOGICAL_ICBI H_LOGICAL_DCBF",
    Reason.ENTITLEMENT: """
        H_SET_MPP H_GET_MPP H_GET_MPP_X H_HOME_NODE_ASSOCIATIVITY H_GET_PPP H_SET_PPP H_PURR H_PIC H_HYPERVISOR_DATA
        H_POLL_PENDING H_GET_EM_PARMS H_BEST_ENERGY H_REQUEST_VMC H_GET_ENERGY_SCALE_INFO
        H_GET_24X7_CATALOG_PAGE H_GET_24X7_DATA H_GET_PERF_COUNTER_INFO
    """,
    Reason.XIVE: """
        H_INT_GET_SOURCE_INFO H_INT_SET_SOURCE_CONFIG H_INT_GET_SOURCE_CONFIG H_INT_GET_QUEUE_INFO
        H_INT_SET_QUEUE_CONFIG H_INT_GET_QUEUE_CONFIG H_INT_SET_OS_REPORTING_LINE H_INT_GET_OS_REPORTING_LINE
        H_INT_ESB H_INT_SYNC H_INT_RESET
    """,
    Reason.SCM: """
        H_SCM_READ_METADATA H_SCM_WRITE_METADATA H_SCM_BIND_MEM H_SCM_UNBIND_MEM H_SCM_QUERY_BLOCK_MEM_BINDING
        H_SCM_QUERY_LOGICAL_MEM_BINDING H_SCM_UNBIND_ALL H_SCM_HEALTH H_SCM_PERFORMANCE_STATS H_SCM_FLUSH
    """,
    Reason.CRQ: """
        H_REG_CRQ H_FREE_CRQ H_VIO_SIGNAL H_SEND_CRQ H_COPY_RDMA H_ENABLE_CRQ H_REG_SUB_CRQ H_FREE_SUB_CRQ
        H_SEND_SUB_CRQ H_SEND_SUB_CRQ_INDIRECT H_VIOCTL
    """,
    Reason.LAN: """
        H_REGISTER_LOGICAL_LAN H_FREE_LOGICAL_LAN H_ADD_LOGICAL_LAN_BUFFER H_SEND_LOGICAL_LAN H_MULTICAST_CTRL
        H_CHANGE_LOGICAL_LAN_MAC H_FREE_LOGICAL_LAN_BUFFER H_ILLAN_ATTRIBUTES
    """,
    Reason.VTERM: "H_VTERM_PARTNER_INFO H_REGISTER_VTERM H_FREE_VTERM",
    Reason.ADAPTER: """
        H_RESET_EVENTS H_ALLOC_RESOURCE H_FREE_RESOURCE H_MODIFY_QP H_QUERY_QP H_REREGISTER_PMR H_REGISTER_SMR
        H_QUERY_MR H_QUERY_MW H_QUERY_HCA H_QUERY_PORT H_MODIFY_PORT H_DEFINE_AQP1 H_GET_TRACE_BUFFER H_DEFINE_AQP0
        H_RESIZE_MR H_ATTACH_MCQP H_DETACH_MCQP H_CREATE_RPT H_REMOVE_RPT H_REGISTER_RPAGES H_DISABLE_AND_GETC
        H_ERROR_DATA H_GET_HCA_INFO H_GET_PERF_COUNT H_MANAGE_TRACE H_QUERY_INT_STATE H_MODIFY_HEA_QP H_QUERY_HEA_QP
        H_QUERY_HEA H_QUERY_HEA_PORT H_MODIFY_HEA_PORT H_REG_BCMC H_DEREG_BCMC H_REGISTER_HEA_RPAGES
        H_DISABLE_AND_GET_HEA H_GET_HEA_INFO H_ALLOC_HEA_RESOURCE H_ADD_CONN H_DEL_CONN
    """,
    Reason.ACCELERATOR: """
        H_COP H_ALLOCATE_VAS_WINDOW H_MODIFY_VAS_WINDOW H_DEALLOCATE_VAS_WINDOW H_QUERY_VAS_WINDOW
        H_QUERY_VAS_CAPABILITIES H_QUERY_NX_CAPABILITIES H_GET_NX_FAULT
    """,
    Reason.DEBUG_REGISTER: "H_SET_SPRG0 H_SET_DABR H_SET_XDABR H_SET_ASR H_ASR_ON H_ASR_OFF H_PERFMON",
    Reason.NESTED: "H_SET_PARTITION_TABLE H_ENTER_NESTED H_TLB_INVALIDATE H_COPY_TOFROM_GUEST",
    Reason.WATCHDOG: "H_WATCHDOG",
    Reason.SYSTEM_RESET: "ibm,nmi-register ibm,nmi-interlock",
    Reason.PARTITION_MIGRATION: "H_VASI_SIGNAL H_VASI_STATE ibm,suspend-me",
    Reason.TPM_PROXY: "H_SVM_TPM_COMM",
    Reason.BOOT_NEGOTIATION: "quiesce",
    Reason.HOST_FIRMWARE: "UV_READ_SCOM UV_WRITE_SCOM UV_READ_MEM UV_WRITE_MEM UV_SEND_SBE_COMMAND",
    Reason.ONE_CPU: "start-cpu stop-self",
    Reason.HOTPLUG: """
        set-indicator set-power-level get-power-level get-sensor-state ibm,configure-connector
    """,
    Reason.EEH: """
        ibm,set-eeh-option ibm,get-config-addr-info2 ibm,read-slot-reset-state2 ibm,set-slot-reset ibm,configure-pe
        ibm,slot-error-detail
    """,
    Reason.VIO_BYPASS: "ibm,set-tce-bypass",
}

UNHANDLED: dict[str, Reason] = {name: reason for reason, names in _GROUPS.items() for name in names.split()}
"""Call name to reason. Names are unique over hypercalls, ultracalls and RTAS services."""

HANDLED_HCALLS = frozenset(call.number for call in HCALLS if call.name not in UNHANDLED)
HANDLED_UCALLS = frozenset(call.number for call in UCALLS if call.name not in UNHANDLED)
HANDLED_RTAS = frozenset(SERVED_BY)


def names_of(reason: Reason) -> list[str]:
    """The calls that `reason` keeps unanswered, in the order of the list."""
    return _GROUPS[reason].split()


def undeclared() -> set[str]:
    """Names of the list that no table declares; empty unless the list has a mistake."""
    return UNHANDLED.keys() - HCALLS.by_name.keys() - UCALLS.by_name.keys() - RTAS.by_name.keys()
