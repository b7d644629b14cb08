"""`pefbox compare` without its runs: the plan, the counts, the claims, the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from deploy.cli_compare import check_kinds, compare, parse_names
from deploy.cluster_file import parse_cluster
from deploy.compare.claims import CLAIMS, Borne, judge
from deploy.compare.costs import Costs, estimate_ns, read_costs, work_of
from deploy.compare.measure import Outcome, Round
from deploy.compare.plan import BASELINE, REQUESTS, Purpose, Trial, Workload, plan
from deploy.compare.report import Report, as_html, as_table, bars_of, claim_lines, write_report
from deploy.compare.results import Comparison, DesignResult, KindResult, Verdict, Works, compile_results
from deploy.compare.vm_files import cluster_text
from deploy.tables import console
from protocol.errors import UserError
from protocol.startup import NO_OFFER, AccessPlatform
from shared.dma_designs import DESIGNS, DmaDesign, Part

ALL = tuple(DmaDesign)
BOTH = (False, True)
WORK = (Workload.READ,)
SLOW = frozenset({DmaDesign.IOMMU_ALWAYS, DmaDesign.RUNTIME_SWITCH, DmaDesign.GUEST_POKE, DmaDesign.OPTIONAL_PLATFORM,
                  DmaDesign.RESTRICTED_MEMORY})  # fmt: skip
FEATURES_OK = "the device refuses the features (FEATURES_OK)"


def played(trial: Trial, faster: bool = True) -> Outcome:
    """What a trial comes to when the discussion is right; without `faster` the bypass property recovers nothing."""
    outcome = Outcome(title=trial.title, works=True, secure=trial.secure, boot_calls={"H_PUT_TCE": 3})
    outcome.reach_pages, outcome.plain_pages = 1024, 130
    refuses = DESIGNS[trial.design].offer.access_platform is AccessPlatform.REQUIRED
    if trial.purpose in (Purpose.OLD_GUEST, Purpose.OLD_FIRMWARE) and refuses:
        return Outcome(title=trial.title, failure=FEATURES_OK)
    if trial.secure and trial.design is DmaDesign.NOTHING:
        faults = ["avail.idx <jumps>"]
        return Outcome(title=trial.title, failure="no answer", device_faults=faults, boot_calls={"H_CPPR": 1})
    if trial.secure and trial.design is DmaDesign.DMA_LIMIT:
        return Outcome(title=trial.title, failure="the VM ended: page-integrity")
    by_window = trial.driver is DmaDesign.IOMMU_ALWAYS or (trial.secure and trial.design in SLOW)
    if trial.driver is DmaDesign.BYPASS_PROPERTY:
        by_window = not faster
    calls = {"MMIO_STORE": 8} | ({"H_PUT_TCE": 640, "H_STUFF_TCE": 10} if by_window else {})
    lookups = 70 if by_window or trial.design is DmaDesign.DDW_IDENTITY else 0
    ns = 10_000_000 * (5 if by_window else 1)
    one = Round(10, 10 << 20, ns, 900, 1900, 10 << 20 if trial.secure else 0, calls, lookups)
    outcome.rounds = {str(workload): [one] for workload in trial.workloads if workload in REQUESTS}
    if trial.purpose is Purpose.TIME:
        bypass = msgspec.structs.replace(one, ns=10_000_000)
        outcome.bypass_rounds = {workload: [bypass] for workload in outcome.rounds}
    return outcome


def comparison(designs: tuple[DmaDesign, ...] = ALL, faster: bool = True) -> Comparison:
    trials = plan(designs, BOTH, (*WORK, Workload.BOOT))
    return compile_results([(trial, played(trial, faster)) for trial in trials], (*WORK, Workload.BOOT), Costs())


# -- the plan --------------------------------------------------------------------------------------------------------


def test_every_design_is_counted_and_timed_in_both_kinds_of_vm_and_the_bypass_comes_first() -> None:
    trials = plan(ALL, BOTH, WORK)
    assert trials[0].design is BASELINE
    for design in ALL:
        kinds = {(trial.purpose, trial.secure) for trial in trials if trial.design is design}
        assert {(purpose, secure) for purpose in (Purpose.COUNT, Purpose.TIME) for secure in BOTH} <= kinds
        assert {(Purpose.OLD_GUEST, False), (Purpose.OLD_FIRMWARE, False)} <= kinds


def test_only_a_secure_vm_is_run_when_only_that_is_asked_for() -> None:
    assert {trial.secure for trial in plan((DmaDesign.QUIRK,), (True,), WORK)} == {True}
    assert (check_kinds(False, False), check_kinds(True, False), check_kinds(True, True)) == (BOTH, (False,), BOTH)


@pytest.mark.parametrize("design", DmaDesign)
@pytest.mark.parametrize("driver", [None, DmaDesign.NOTHING])
def test_a_trial_has_the_devices_of_its_design_whatever_drives_them(
    design: DmaDesign, driver: DmaDesign | None
) -> None:
    trial = Trial(design, Purpose.COUNT, True, driver or design)
    text = cluster_text(trial, Path("/disk"), {"dma_mask": 32})

    (vm,) = parse_cluster(text, "t.toml", Path("/"), "t").vms

    facts = DESIGNS[design]
    assert (vm.devices[0].offer, vm.dma) == (facts.offer, facts.machine)
    assert (vm.guest.dma, vm.guest.options, vm.time) == (trial.driver, {"dma_mask": 32}, "instructions")


# -- counts and costs ------------------------------------------------------------------------------------------------


def test_counts_are_of_one_request_and_a_secure_vm_has_two_world_switches_a_call() -> None:
    calls = {"H_PUT_TCE": 64, "H_STUFF_TCE": 16, "MMIO_STORE": 16, "UV_SHARE_PAGE": 4, "H_RTAS": 4}
    normal = work_of(calls, 1024, 32, requests=4, secure=False)
    secure = work_of(calls, 1024, 32, requests=4, secure=True)
    assert (normal.hypercalls, normal.ultracalls, normal.tce_calls) == (25, 1, 20)
    assert (normal.user_exits, normal.bounced_bytes, normal.device_lookups) == (1, 256, 8)
    assert (normal.world_switches, secure.world_switches) == (0, 50)


@given(st.dictionaries(st.sampled_from(["H_PUT_TCE", "MMIO_STORE", "UV_SHARE_PAGE"]), st.integers(0, 1000)))
def test_a_secure_vm_never_costs_less_for_the_same_calls(calls: dict[str, int]) -> None:
    estimates = [estimate_ns(work_of(calls, 0, 0, requests=1, secure=secure), Costs()) for secure in BOTH]
    assert estimates[0] <= estimates[1]


def test_a_cost_that_is_set_is_the_one_that_counts() -> None:
    free = read_costs(("hypercall_ns=0", "user_exit_ns=0", "world_switch_ns=0", "ultracall_ns=0"))
    work = work_of({"H_PUT_TCE": 5}, 2048, 0, requests=1, secure=True)
    assert estimate_ns(work, free) == 2 * Costs().copy_ns_per_kib


@pytest.mark.parametrize(
    "setting", ["speed=1", "hypercall_ns=fast", "hypercall_ns=-1", "hypercall_ns=nan", "hypercall_ns"]
)
def test_a_cost_that_is_none_is_one_line(setting: str) -> None:
    with pytest.raises(UserError, match="--cost"):
        read_costs((setting,))


# -- the claims ------------------------------------------------------------------------------------------------------


def test_every_claim_is_borne_out_when_the_counts_are_what_the_discussion_says() -> None:
    assert {claim.claim: claim.verdict for claim in judge(comparison())} == {claim: Borne.OUT for claim, _ in CLAIMS}


def test_a_claim_is_not_borne_out_when_the_counts_say_otherwise() -> None:
    verdicts = {claim.claim: claim.verdict for claim in judge(comparison(faster=False))}
    assert verdicts.pop("the bypass property (3) recovers what 2 costs") is Borne.NOT
    assert set(verdicts.values()) == {Borne.OUT}


def _at_least_one_call(kind: KindResult) -> None:
    for measured in kind.workloads.values():
        assert measured.work is not None
        measured.work = msgspec.structs.replace(measured.work, hypercalls=measured.work.hypercalls + 1)


def _no_lookups(kind: KindResult) -> None:
    for measured in kind.workloads.values():
        assert measured.work is not None
        measured.work = msgspec.structs.replace(measured.work, device_lookups=0)


def _as_cheap_as(kind: KindResult, other: KindResult) -> None:
    kind.workloads = other.workloads


FALSE: list[tuple[str, Callable[[dict[str, DesignResult]], None]]] = [
    ("without any design", lambda rows: rows["nothing"].secure.device_faults.clear()),
    ("without any design", lambda rows: rows["nothing"].secure.boot_calls.clear()),
    ("the quirk (1) needs", lambda rows: _at_least_one_call(rows["quirk"].secure)),
    ("the quirk (1) is contained", lambda rows: setattr(rows["quirk"], "old_guest", Verdict(Works.NO, "refused"))),
    ("the quirk (1) is contained", lambda rows: rows["quirk"].changes.append("qemu")),
    ("iommu-always (2) is slower", lambda rows: _as_cheap_as(rows["iommu-always"].normal, rows["nothing"].normal)),
    ("iommu-always (2) is slower", lambda rows: _as_cheap_as(rows["iommu-always"].secure, rows["quirk"].secure)),
    ("iommu-always (2) shuts", lambda rows: setattr(rows["iommu-always"], "old_firmware", Verdict(Works.YES))),
    ("the bypass property (3)", lambda rows: _at_least_one_call(rows["bypass-property"].secure)),
    ("with the bypass property", lambda rows: setattr(rows["bypass-property"], "unpatched", rows["nothing"].normal)),
    ("a DMA limit (5)", lambda rows: setattr(rows["dma-limit"].secure, "verdict", Verdict(Works.NO, "no answer"))),
    ("a DMA limit (5)", lambda rows: setattr(rows["dma-pool"].secure, "verdict", Verdict(Works.NO, "no answer"))),
    ("a 64-bit window", lambda rows: _no_lookups(rows["ddw-identity"].normal)),
]


@pytest.mark.parametrize(("claim", "make_false"), FALSE)
def test_each_claim_is_one_that_a_run_may_not_bear_out(
    claim: str, make_false: Callable[[dict[str, DesignResult]], None]
) -> None:
    results = comparison()
    make_false({row.design: row for row in results.designs})
    assert [said.verdict for said in judge(results) if said.claim.startswith(claim)] == [Borne.NOT]


def test_every_claim_has_a_run_that_does_not_bear_it_out() -> None:
    assert [claim for claim, _ in CLAIMS if not claim.startswith(tuple(start for start, _ in FALSE))] == []


def test_what_a_design_changes_agrees_with_what_it_sets() -> None:
    for design, facts in DESIGNS.items():
        assert (Part.QEMU in facts.changes) is (facts.offer != NO_OFFER or facts.machine.tell_secure), design
        assert (Part.KVM in facts.changes) is facts.machine.tell_secure, design


def test_no_claim_is_judged_by_what_is_counted_in_real_time() -> None:
    results = comparison()
    before = judge(results)
    for row in results.designs:
        for kind in (row.normal, row.secure):
            for measured in list(kind.workloads.values()):
                assert measured.work is not None
                noise = msgspec.structs.replace(measured.work, hypercalls=float(len(row.design)))
                kind.workloads["net"] = msgspec.structs.replace(measured, work=noise)
    assert judge(results) == before


def test_a_claim_about_all_designs_stays_open_when_one_was_not_run() -> None:
    results = comparison(tuple(design for design in DmaDesign if design is not DmaDesign.DMA_POOL))
    verdicts = {claim.claim: claim.verdict for claim in judge(results)}
    assert verdicts["the quirk (1) needs the fewest calls of all that work"] is Borne.OPEN


def test_a_claim_about_what_was_not_run_stays_open() -> None:
    verdicts = {claim.claim: claim.verdict for claim in judge(comparison((DmaDesign.QUIRK,)))}
    assert verdicts["the bypass property (3) recovers what 2 costs"] is Borne.OPEN
    assert Borne.NOT not in verdicts.values()


# -- the report ------------------------------------------------------------------------------------------------------


def report(designs: tuple[DmaDesign, ...] = ALL) -> Report:
    results = comparison(designs)
    return Report(results, judge(results))


def test_the_page_needs_nothing_else_and_says_what_others_said_as_text() -> None:
    page = as_html(report(), "a machine & more")
    root = ElementTree.fromstring(page.replace("<!DOCTYPE html>", ""))
    assert "avail.idx &lt;jumps&gt;" in page
    assert "a machine &amp; more" in page
    assert not [word for word in ("http:", "https:", "src=", "@import", "<script") if word in page]
    headings = [heading.text for heading in root.iter("h2")]
    assert headings[:3] == ["What works, and what had to change", "What a hostile device reaches", "read"]
    assert len(list(root.iter("rect"))) == len(bars_of(report().comparison, "read"))


def test_json_is_what_was_measured(tmp_path: Path) -> None:
    written = write_report(report(), tmp_path / "new" / "directory")
    loaded = msgspec.json.decode((tmp_path / "new" / "directory" / "report.json").read_bytes(), type=Report)
    assert loaded == report()
    assert [file.name for file in written] == ["report.html", "report.json"]


def test_a_design_that_fails_in_a_secure_vm_has_no_figures_of_one() -> None:
    rows = {row.design: row for row in report().comparison.designs}
    assert rows["nothing"].secure.verdict.works is Works.NO
    assert not rows["nothing"].secure.workloads
    timing = rows["iommu-always"].normal.workloads["read"].timing
    assert timing is not None
    assert timing.of_bypass == pytest.approx((0.2, 0.2, 0.2))


def test_the_table_has_a_row_a_design_and_a_line_a_claim() -> None:
    with console().capture() as capture:
        console().print(as_table(report()))
    assert as_table(report()).row_count == len(DmaDesign)
    assert len(claim_lines(report())) == len(CLAIMS)
    assert capture.get() is not None


def test_a_vm_that_is_timed_runs_beside_one_past_the_iommu() -> None:
    trial = Trial(DmaDesign.IOMMU_ALWAYS, Purpose.TIME, True, DmaDesign.IOMMU_ALWAYS)
    vm, bypass = parse_cluster(cluster_text(trial, Path("/d/disk"), {}), "t.toml", Path("/"), "t").vms
    assert (vm.time, vm.guest.command_line, bypass.guest.command_line) == ("wall", "svm=on", "svm=off")
    assert bypass.devices[0].offer == NO_OFFER
    assert bypass.disks[0].path == "/d/bypass.img"


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the report cannot be written"):
        write_report(report((DmaDesign.QUIRK,)), tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--designs", "quark"], 'no design "quark"; there is: quirk,'),
        (["--workload", "reed"], 'no workload "reed"; there is: read,'),
        (["--cost", "speed=1"], 'no cost "speed"'),
    ],
)
def test_a_name_that_does_not_exist_is_said_before_anything_runs(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(compare, [*arguments, "--out", str(tmp_path / "r")])
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)
    assert not (tmp_path / "r").exists()


def test_names_may_have_spaces_around_them() -> None:
    assert parse_names(" quirk , nothing,", DmaDesign, "design") == ("quirk", "nothing")
