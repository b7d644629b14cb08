"""The outcomes of all trials, put together by design: one row a design, every cell of it measured."""

from __future__ import annotations

import statistics
from enum import StrEnum

import msgspec

from deploy.compare.costs import Costs, Work, estimate_ns, work_of
from deploy.compare.measure import Outcome, Round
from deploy.compare.plan import Purpose, Trial, Workload
from shared.dma_designs import DESIGNS, DmaDesign


class Works(StrEnum):
    """Whether something worked."""

    YES = "yes"
    NO = "no"
    NOT_RUN = "not run"


class Verdict(msgspec.Struct, frozen=True):
    """Whether something worked, and if not, why not."""

    works: Works = Works.NOT_RUN
    reason: str = ""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Of the rounds of one workload: the median, and the lowest and highest round."""

    mib_per_second: tuple[float, float, float]
    requests_per_second: tuple[float, float, float]
    p50_us: tuple[float, float, float]
    p99_us: tuple[float, float, float]
    of_bypass: tuple[float, float, float] | None
    """Throughput by that of a VM past the IOMMU that ran in turn with it."""


class Measured(msgspec.Struct, kw_only=True):
    """One workload of one design in one kind of VM."""

    work: Work | None = None
    estimate_us: float | None = None
    """By the cost model, of one request, on top of the transfer."""
    timing: Timing | None = None


class KindResult(msgspec.Struct, kw_only=True):
    """One design in a normal or in a secure VM."""

    verdict: Verdict = Verdict()
    device_faults: list[str] = []
    workloads: dict[str, Measured] = {}
    boot_calls: dict[str, int] = {}
    boot_ms: float | None = None
    shared_pages: int | None = None
    reach_pages: int | None = None
    plain_pages: int | None = None
    """As Outcome; None where the VM did not come so far."""


class DesignResult(msgspec.Struct, kw_only=True):
    """A row of the report."""

    design: str
    number: int
    title: str
    changes: list[str]
    normal: KindResult = msgspec.field(default_factory=KindResult)
    secure: KindResult = msgspec.field(default_factory=KindResult)
    old_guest: Verdict = Verdict()
    old_firmware: Verdict = Verdict()
    unpatched: KindResult | None = None


class Comparison(msgspec.Struct, kw_only=True):
    """Everything that one run of `pefbox compare` measured."""

    costs: Costs
    workloads: list[str]
    designs: list[DesignResult]


def compile_results(outcomes: list[tuple[Trial, Outcome]], workloads: tuple[Workload, ...], costs: Costs) -> Comparison:
    """Rows in the order of the discussion."""
    designs = sorted({trial.design for trial, _ in outcomes}, key=list(DmaDesign).index)
    return Comparison(
        costs=costs,
        workloads=[str(workload) for workload in workloads],
        designs=[_row(design, outcomes, costs) for design in designs],
    )


def _row(design: DmaDesign, outcomes: list[tuple[Trial, Outcome]], costs: Costs) -> DesignResult:
    facts = DESIGNS[design]
    row = DesignResult(
        design=design, number=facts.number, title=facts.title, changes=sorted(str(part) for part in facts.changes)
    )
    for trial, outcome in outcomes:
        if trial.design is design:
            _enter(row, trial, outcome, costs)
    return row


def _enter(row: DesignResult, trial: Trial, outcome: Outcome, costs: Costs) -> None:
    match trial.purpose:
        case Purpose.OLD_GUEST:
            row.old_guest = _verdict(outcome)
        case Purpose.OLD_FIRMWARE:
            row.old_firmware = _verdict(outcome)
        case Purpose.UNPATCHED:
            row.unpatched = KindResult()
            _enter_counts(row.unpatched, trial, outcome, costs)
        case Purpose.COUNT:
            _enter_counts(row.secure if trial.secure else row.normal, trial, outcome, costs)
        case Purpose.TIME:
            _enter_times(row.secure if trial.secure else row.normal, outcome, costs)


def _verdict(outcome: Outcome) -> Verdict:
    if outcome.works:
        return Verdict(Works.YES)
    return Verdict(Works.NO, outcome.failure)


def _enter_counts(result: KindResult, trial: Trial, outcome: Outcome, costs: Costs) -> None:
    result.verdict = _verdict(outcome)
    result.device_faults = outcome.device_faults
    result.boot_calls = outcome.boot_calls
    if outcome.reach_pages:
        result.shared_pages = outcome.shared_pages
        result.reach_pages, result.plain_pages = outcome.reach_pages, outcome.plain_pages
    for workload, (only, *_) in outcome.rounds.items():
        _enter_work(result.workloads.setdefault(workload, Measured()), only, costs, secure=trial.secure)


def _enter_work(measured: Measured, one: Round, costs: Costs, *, secure: bool) -> None:
    work = work_of(one.calls, one.bounced_bytes, one.device_lookups, requests=max(one.requests, 1), secure=secure)
    measured.work, measured.estimate_us = work, estimate_ns(work, costs) / 1000


def _enter_times(result: KindResult, outcome: Outcome, costs: Costs) -> None:
    result.boot_ms = outcome.boot_ns / 1e6
    for workload, rounds in outcome.rounds.items():
        measured = result.workloads.setdefault(workload, Measured())
        measured.timing = _timing(rounds, outcome.bypass_rounds.get(workload))
        if workload == Workload.NET:
            _enter_work(measured, rounds[0], costs, secure=outcome.secure)


def _timing(rounds: list[Round], bypass: list[Round] | None) -> Timing:
    pairs = [] if bypass is None else list(zip(rounds, bypass, strict=True))
    return Timing(
        mib_per_second=_spread([_rate(one) / (1 << 20) for one in rounds]),
        requests_per_second=_spread([one.requests / (one.ns / 1e9) for one in rounds]),
        p50_us=_spread([one.p50_ns / 1000 for one in rounds]),
        p99_us=_spread([one.p99_ns / 1000 for one in rounds]),
        of_bypass=_spread([_rate(one) / _rate(other) for one, other in pairs]) if pairs else None,
    )


def _rate(one: Round) -> float:
    """Bytes a second."""
    return one.bytes / (one.ns / 1e9)


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)
