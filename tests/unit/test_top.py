"""`pefbox top`: rates from two looks, and frames that fit into any terminal."""

from __future__ import annotations

import os
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deploy.process_usage import Usage, usage_of
from deploy.top import Frame, Look, make_frame, render

MIB = 1 << 20
SECOND_NS = 1_000_000_000


def process(target: str, pid: int, state: str = "running") -> dict[str, Any]:
    return {"target": target, "pid": pid, "state": state}


def link(peer: str, calls: int, **counts: int) -> dict[str, Any]:
    return {"peer": peer, "calls": calls, "open_calls": 0, "serving": 0, "queued": 0, "refused": 0, **counts}


MIGRATION = {
    "vm": "vm1", "source": "alpha", "host": "beta", "phase": "active", "status": "active", "reason": "",
    "seconds": 1.0, "progress": {"round": 3},
}  # fmt: skip


def look(at_s: int, guest_calls: int, exits: int, *, cpu_s: float = 0.0, state: str = "running") -> Look:
    vm = {
        "name": "vm1", "state": "running", "secure": True, "since": time.time(), "reason": "",
        "pages": {"normal": 0, "secure": 900, "shared": 12, "paged_out": None}, "migration": MIGRATION,
        "processes": [process("vm1/qemu", 3), process("vm1/guest", 4)], "arriving": [process("vm1/qemu@beta", 5)],
    }  # fmt: skip
    host = {
        "name": "alpha",
        "account": {"total_bytes": 512 * MIB, "used_bytes": 64 * MIB},
        "processes": [process("alpha/ultravisor", 1, state), process("alpha/kvm", 2)],
        "vms": [vm],
    }
    links = {
        "vm1/guest": {"a": link("alpha/kvm", guest_calls // 2), "b": link("alpha/ultravisor", guest_calls // 2)},
        "alpha/kvm": {"c": link("vm1/qemu", exits, open_calls=2, queued=1), "d": link("alpha/ultravisor", 1000)},
        "vm1/qemu@beta": {"e": link("beta/kvm", 10 * at_s, serving=3)},
    }
    status = {"cluster": "c", "healthy": True, "recording": True, "hosts": [host]}
    return Look({"monotonic_ns": at_s * SECOND_NS, "status": status, "links": links}, {4: Usage(cpu_s, 80 * MIB)})


def two_looks(**later: Any) -> Frame:  # noqa: ANN401
    return make_frame(look(12, 500, 70, cpu_s=1.5, **later), look(10, 100, 50, cpu_s=0.5))


def lines_of(frame: Frame, width: int, height: int | None = None) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render(frame, width, height))
    return capture.get().splitlines()


def test_rates_are_what_was_done_between_two_looks() -> None:
    frame = two_looks()
    vm = frame.hosts[0].vms[0]
    kvm = frame.hosts[0].processes[1]

    assert frame.seconds == 2.0
    assert (vm.calls_per_second, vm.exits_per_second) == (200.0, 10.0)
    assert (kvm.calls_per_second, kvm.open_calls, kvm.queued) == (10.0, 2, 1)
    guest = vm.processes[1]
    assert (guest.cpu_percent, guest.resident_bytes) == (50.0, 80 * MIB)
    arriving = vm.processes[2]
    assert (arriving.target, arriving.calls_per_second, arriving.serving) == ("vm1/qemu@beta", 10.0, 3)


def test_the_first_look_has_no_rates_and_a_process_that_does_not_answer_has_nothing() -> None:
    frame = make_frame(look(10, 100, 50), None)

    assert frame.hosts[0].vms[0].calls_per_second is None
    assert frame.hosts[0].processes[0].open_calls is None
    assert " - " in lines_of(frame, 120)[3]


def test_a_process_that_began_anew_has_made_what_it_made_since() -> None:
    frame = make_frame(look(12, 20, 0), look(10, 1000, 0))

    assert frame.hosts[0].vms[0].calls_per_second == 10.0


def test_a_frame_says_in_words_what_colours_say() -> None:
    lines = lines_of(two_looks(state="unresponsive"), 120)

    assert lines[0] == "cluster c  healthy, recording"
    assert lines[2] == "host alpha  secure memory 64 MiB of 512 MiB"
    assert lines[3].split()[:2] == ["alpha/ultravisor", "unresponsive"]
    assert "vm vm1  secure  running 0 s  calls/s 200  exits/s 10.0" in lines[5]
    assert lines[6].strip() == "pages  normal 0  secure 900  shared 12  paged_out -"
    assert "alpha -> beta" in lines[7] and "round 3" in lines[7]
    assert [line.split()[0] for line in lines[8:]] == ["vm1/qemu", "vm1/guest", "vm1/qemu@beta"]


@given(st.integers(1, 200), st.integers(1, 40))
def test_a_frame_fits_into_any_terminal(width: int, height: int) -> None:
    lines = lines_of(two_looks(), width, height)

    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)


def test_what_does_not_fit_is_left_out_the_least_important_first() -> None:
    frame = two_looks()

    assert "REFUSED" in lines_of(frame, 100)[1]
    assert lines_of(frame, 50)[1].split() == ["STATE", "CALLS/S", "CPU", "%"]
    assert lines_of(frame, 24)[1].split() == ["STATE"]
    short = lines_of(frame, 100, 9)
    assert len(short) == 8
    assert not [line for line in short if "vm1/guest" in line]
    assert lines_of(frame, 100, 4)[-1] == "... 5 more lines: make the terminal higher"


def test_the_kernel_s_figures_of_a_process() -> None:
    usage = usage_of([os.getpid(), 1 << 30])

    assert list(usage) == [os.getpid()]
    assert usage[os.getpid()].resident_bytes > MIB
    assert usage[os.getpid()].cpu_seconds > 0
