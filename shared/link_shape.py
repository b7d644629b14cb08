"""What a link between two hosts does to what crosses it: the launcher keeps it, the qemus at its ends apply it."""

from __future__ import annotations

import msgspec

MAX_DELAY_MS = 10_000
MIN_BANDWIDTH = 1024
MAX_BANDWIDTH = 1 << 40


class LinkShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Delay one way, of which the jitter comes on top of the latency; bytes a second, 0: as fast as it goes; the part
    of what is sent that is lost, from 0 to 1; whether the link is cut."""

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    bandwidth_bytes_per_second: int = 0
    loss: float = 0.0
    down: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it leaves everything as it is."""
        return self == PLAIN

    @property
    def passes_nothing(self) -> bool:
        """Whether nothing ever crosses."""
        return self.down or self.loss >= 1.0


PLAIN = LinkShape()


class LinkChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other values for some fields of a LinkShape."""

    latency_ms: float | msgspec.UnsetType = msgspec.UNSET
    jitter_ms: float | msgspec.UnsetType = msgspec.UNSET
    bandwidth_bytes_per_second: int | msgspec.UnsetType = msgspec.UNSET
    loss: float | msgspec.UnsetType = msgspec.UNSET
    down: bool | msgspec.UnsetType = msgspec.UNSET

    def applied_to(self, shape: LinkShape) -> LinkShape:
        """`shape` with them."""
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not msgspec.UNSET}
        return msgspec.structs.replace(shape, **given)


class LinkShapes(msgspec.Struct, frozen=True, kw_only=True):
    """What a qemu is told: the shape towards each other qemu, of those that have one, and of its migration's channel.

    Of two that arrive together the one with the higher number counts.
    """

    number: int = 0
    peers: dict[str, LinkShape] = {}
    migration: LinkShape | None = None


def fault_of(shape: LinkShape) -> tuple[str, str] | None:
    """The field that is not possible, by its name in a cluster file, and what is wrong; None when all are."""
    delays = {"latency": shape.latency_ms, "jitter": shape.jitter_ms}
    for name, value in delays.items():
        # A comparison that NaN does not pass.
        if not 0 <= value <= MAX_DELAY_MS:
            return name, f"{value:g} is out of range; allowed: 0 to {MAX_DELAY_MS} milliseconds"
    bandwidth = shape.bandwidth_bytes_per_second
    if bandwidth and not MIN_BANDWIDTH <= bandwidth <= MAX_BANDWIDTH:
        allowed = f"0 for no limit, or {MIN_BANDWIDTH} to {MAX_BANDWIDTH} bytes a second"
        return "bandwidth", f"{bandwidth} is out of range; allowed: {allowed}"
    if not 0 <= shape.loss <= 1:
        return "loss", f"{shape.loss:g} is out of range; allowed: 0 to 1"
    return None
