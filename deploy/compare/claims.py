"""What the discussion claims of its designs, each held against the counts of a run.

Only what is counted decides, never a timing: the same run gives the same verdict again.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec

from deploy.compare.costs import Work
from deploy.compare.plan import BASELINE, Workload
from deploy.compare.results import Comparison, DesignResult, KindResult, Works
from shared.dma_designs import DmaDesign


class Borne(StrEnum):
    """What a run says of a claim."""

    OUT = "borne out"
    NOT = "not borne out"
    OPEN = "not run"


class ClaimResult(msgspec.Struct, frozen=True):
    """A claim, what the run says of it, and the figures."""

    claim: str
    verdict: Borne
    evidence: str


PAGE_INTEGRITY = "page-integrity"
"""Why a VM ends when a device wrote over the image of a private page."""

Check = Callable[[Comparison], tuple[bool, str] | None]
"""Whether the claim holds, and the figures; None when the run does not have what it takes to say."""


def judge(comparison: Comparison) -> list[ClaimResult]:
    """Every claim."""
    results = []
    for claim, check in CLAIMS:
        said = check(comparison)
        if said is None:
            results.append(ClaimResult(claim, Borne.OPEN, ""))
        else:
            results.append(ClaimResult(claim, Borne.OUT if said[0] else Borne.NOT, said[1]))
    return results


def _find(comparison: Comparison, design: DmaDesign) -> DesignResult | None:
    return next((row for row in comparison.designs if row.design == design), None)


def _works(result: KindResult) -> dict[str, Work]:
    """What was counted exactly: of a VM on a network no run repeats."""
    return {
        workload: measured.work
        for workload, measured in result.workloads.items()
        if measured.work is not None and workload != Workload.NET
    }


def _compare(ours: KindResult, theirs: KindResult) -> list[tuple[str, float, float]]:
    """(workload, our exits a request, theirs) of the workloads that both have."""
    mine, other = _works(ours), _works(theirs)
    return [(name, work.all_calls, other[name].all_calls) for name, work in mine.items() if name in other]


def _say(rows: list[tuple[str, float, float]], mine: str, other: str) -> str:
    return "; ".join(f"{name}: {ours:.2f} calls a request with {mine}, {theirs:.2f} with {other}"
                     for name, ours, theirs in rows)  # fmt: skip


def _quirk_is_fastest(comparison: Comparison) -> tuple[bool, str] | None:
    quirk = _find(comparison, DmaDesign.QUIRK)
    if quirk is None or quirk.secure.verdict.works is not Works.YES or not _works(quirk.secure):
        return None
    if {row.design for row in comparison.designs} != set(DmaDesign):
        # "Of all" is said of every design or not at all.
        return None
    rivals = [row for row in comparison.designs if row is not quirk and row.secure.verdict.works is Works.YES]
    if not rivals:
        return None
    slower, figures = True, []
    for name, work in _works(quirk.secure).items():
        others = {row.design: _works(row.secure)[name] for row in rivals if name in _works(row.secure)}
        least = min(other.all_calls + other.device_lookups for other in others.values())
        slower = slower and work.all_calls + work.device_lookups <= least
        figures.append(
            f"{name}: {work.all_calls:.2f} calls and {work.device_lookups:.2f} lookups a request, the others at least "
            f"{least:.2f} in all"
        )
    return slower, "; ".join(figures)


def _quirk_is_contained(comparison: Comparison) -> tuple[bool, str] | None:
    quirk = _find(comparison, DmaDesign.QUIRK)
    if quirk is None or Works.NOT_RUN in (quirk.secure.verdict.works, quirk.old_guest.works, quirk.old_firmware.works):
        return None
    holds = all(verdict.works is Works.YES for verdict in (quirk.secure.verdict, quirk.old_guest, quirk.old_firmware))
    return holds and quirk.changes == ["guest"], (
        f"changed: {', '.join(quirk.changes)}; secure VM: {quirk.secure.verdict.works}; old guest: "
        f"{quirk.old_guest.works}; old firmware: {quirk.old_firmware.works}"
    )


def _iommu_is_slower(comparison: Comparison) -> tuple[bool, str] | None:
    iommu, quirk = _find(comparison, DmaDesign.IOMMU_ALWAYS), _find(comparison, DmaDesign.QUIRK)
    base = _find(comparison, BASELINE)
    if iommu is None or quirk is None or base is None:
        return None
    normal, secure = _compare(iommu.normal, base.normal), _compare(iommu.secure, quirk.secure)
    if not normal or not secure:
        return None
    holds = all(ours > theirs for _, ours, theirs in normal + secure)
    return holds, f"normal, {_say(normal, 'it', 'the bypass')}; secure, {_say(secure, 'it', 'the quirk')}"


def _iommu_refuses_old(comparison: Comparison) -> tuple[bool, str] | None:
    iommu = _find(comparison, DmaDesign.IOMMU_ALWAYS)
    if iommu is None or iommu.old_guest.works is Works.NOT_RUN:
        return None
    refused = [verdict.works is Works.NO and "FEATURES_OK" in verdict.reason
               for verdict in (iommu.old_guest, iommu.old_firmware)]  # fmt: skip
    return all(refused), f"old guest: {iommu.old_guest.reason}; old firmware: {iommu.old_firmware.reason}"


def _bypass_recovers(comparison: Comparison) -> tuple[bool, str] | None:
    bypass, base = _find(comparison, DmaDesign.BYPASS_PROPERTY), _find(comparison, BASELINE)
    quirk = _find(comparison, DmaDesign.QUIRK)
    if bypass is None or base is None or quirk is None:
        return None
    rows = _compare(bypass.normal, base.normal) + _compare(bypass.secure, quirk.secure)
    if not rows:
        return None
    return all(ours == theirs for _, ours, theirs in rows), _say(rows, "it", "bypass or quirk")


def _unpatched_keep_cost(comparison: Comparison) -> tuple[bool, str] | None:
    bypass, iommu = _find(comparison, DmaDesign.BYPASS_PROPERTY), _find(comparison, DmaDesign.IOMMU_ALWAYS)
    if bypass is None or bypass.unpatched is None or iommu is None:
        return None
    rows = _compare(bypass.unpatched, iommu.normal)
    if not rows:
        return None
    return all(ours == theirs for _, ours, theirs in rows), _say(rows, "an unpatched guest", "iommu-always")


def _ddw_is_no_bypass(comparison: Comparison) -> tuple[bool, str] | None:
    ddw, base = _find(comparison, DmaDesign.DDW_IDENTITY), _find(comparison, BASELINE)
    if ddw is None or base is None:
        return None
    works, bypass = _works(ddw.normal), _works(base.normal)
    names = [name for name in works if name in bypass]
    if not names:
        return None
    holds = all(works[name].device_lookups > bypass[name].device_lookups for name in names)
    figures = "; ".join(
        f"{name}: {works[name].device_lookups:.2f} lookups a request, the bypass {bypass[name].device_lookups:.2f}"
        for name in names
    )
    return holds, figures


def _nothing_fails(comparison: Comparison) -> tuple[bool, str] | None:
    nothing = _find(comparison, DmaDesign.NOTHING)
    if nothing is None or nothing.secure.verdict.works is Works.NOT_RUN:
        return None
    secure = nothing.secure
    # What the device took for a ring was none, and the kernel came as far as its prompt all the same.
    garbled, came_up = bool(secure.device_faults), bool(secure.boot_calls)
    fails = nothing.normal.verdict.works is not Works.NO and secure.verdict.works is Works.NO
    faults = ", ".join(secure.device_faults) or "none"
    return fails and garbled and came_up, f"guest: {secure.verdict.reason}; device: {faults}"


def _limit_is_no_range(comparison: Comparison) -> tuple[bool, str] | None:
    limit, pool = _find(comparison, DmaDesign.DMA_LIMIT), _find(comparison, DmaDesign.DMA_POOL)
    if limit is None or pool is None or limit.secure.verdict.works is Works.NOT_RUN:
        return None
    overwritten = limit.secure.verdict.works is Works.NO and PAGE_INTEGRITY in limit.secure.verdict.reason
    holds = overwritten and pool.secure.verdict.works is Works.YES
    return holds, f"limit: {limit.secure.verdict.reason or 'works'}; range: {pool.secure.verdict.works}"


CLAIMS: list[tuple[str, Check]] = [
    ("without any design the device of a secure VM reads ciphertext, and nothing crashes", _nothing_fails),
    ("the quirk (1) needs the fewest calls of all that work", _quirk_is_fastest),
    ("the quirk (1) is contained in the guest: old devices, firmware and normal guests go on as they are",
     _quirk_is_contained),
    ("iommu-always (2) is slower for secure and normal VMs alike: every mapping is a hypercall", _iommu_is_slower),
    ("iommu-always (2) shuts out old guests and firmware, which drop the bit", _iommu_refuses_old),
    ("the bypass property (3) recovers what 2 costs", _bypass_recovers),
    ("with the bypass property (3) unpatched guests keep the cost of 2", _unpatched_keep_cost),
    ("a DMA limit (5) cannot express one pool, a range can", _limit_is_no_range),
    ("a 64-bit window with an identity mapping (6) is not as good as a real bypass", _ddw_is_no_bypass),
]  # fmt: skip
"""As the discussion has them, the numbers being those of its designs."""
