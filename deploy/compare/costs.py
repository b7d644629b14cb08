"""What counts would take on real hardware, from stated costs of a hypercall, a world switch and a copy.

The defaults are assumptions, in the order of magnitude of what is published for POWER9, and not measured by anybody
here; `--cost NAME=VALUE` sets others. The model adds costs up and knows no overlap, no cache, no contention.
"""

from __future__ import annotations

import msgspec

from protocol.errors import UserError
from protocol.ucalls import UCALLS


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Nanoseconds each."""

    hypercall_ns: float = 500.0
    """Into the hypervisor's kernel and back, of a normal VM."""
    user_exit_ns: float = 4000.0
    """On from there to the device model in user space and back."""
    world_switch_ns: float = 1500.0
    """What the ultravisor adds on each way between a secure VM and the hypervisor."""
    ultracall_ns: float = 700.0
    copy_ns_per_kib: float = 60.0
    """A bounced byte is copied once; about 16 GB/s."""
    iommu_lookup_ns: float = 60.0
    """A translation in the emulated IOMMU, by the device model."""


USER_EXITS = frozenset({"MMIO_LOAD", "H_RTAS", "H_SET_DMA_BYPASS"})
"""What the device model in user space answers. Stores of a run are not: they go to the notify registers of running
queues, which the hypervisor's kernel takes (ioeventfd)."""
_ULTRACALLS = frozenset(call.name for call in UCALLS)


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a request costs on the average, in things that are counted."""

    hypercalls: float
    """Among them loads and stores of device registers, which a guest on this machine makes as exits."""
    user_exits: float
    ultracalls: float
    world_switches: float
    """Changes between a secure VM and the hypervisor, each way one; a normal VM has none."""
    tce_calls: float
    bounced_bytes: float
    device_lookups: float

    @property
    def all_calls(self) -> float:
        """Every way out of the VM."""
        return self.hypercalls + self.ultracalls


def tce_calls(calls: dict[str, int]) -> int:
    """The calls among `calls` that change a table of the IOMMU."""
    return sum(n for name, n in calls.items() if name.endswith(("_TCE", "_TCE_INDIRECT")))


def work_of(calls: dict[str, int], bounced_bytes: int, device_lookups: int, *, requests: int, secure: bool) -> Work:
    """The counts of a run, by request."""
    ultracalls = sum(n for name, n in calls.items() if name in _ULTRACALLS)
    hypercalls = sum(calls.values()) - ultracalls
    user_exits = sum(n for name, n in calls.items() if name in USER_EXITS)
    return Work(
        hypercalls=hypercalls / requests,
        user_exits=user_exits / requests,
        ultracalls=ultracalls / requests,
        world_switches=2 * hypercalls / requests if secure else 0.0,
        tce_calls=tce_calls(calls) / requests,
        bounced_bytes=bounced_bytes / requests,
        device_lookups=device_lookups / requests,
    )


def estimate_ns(work: Work, costs: Costs) -> float:
    """What a request costs on top of the transfer itself."""
    return (
        work.hypercalls * costs.hypercall_ns
        + work.user_exits * costs.user_exit_ns
        + work.world_switches * costs.world_switch_ns
        + work.ultracalls * costs.ultracall_ns
        + work.bounced_bytes / 1024 * costs.copy_ns_per_kib
        + work.device_lookups * costs.iommu_lookup_ns
    )


def read_costs(settings: tuple[str, ...]) -> Costs:
    """The defaults with `NAME=VALUE` settings in their place; raises UserError."""
    values: dict[str, float] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in Costs.__struct_fields__:
            raise UserError(f'--cost {setting}: no cost "{name}"; there is: {", ".join(Costs.__struct_fields__)}')
        try:
            values[name] = float(text)
        except ValueError:
            raise UserError(f"--cost {setting}: {text!r} is no number of nanoseconds") from None
        if not 0 <= values[name] < 1e12:
            raise UserError(f"--cost {setting}: a cost is 0 or more nanoseconds, below 1e12")
    return Costs(**values)
