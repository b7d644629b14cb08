"""Who wants traces, and what the launcher makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.recorders import Recorders
from deploy.targets import is_of
from deploy.trace.reader import place_of
from deploy.trace.recording import Window, files_of
from protocol import trace as t

BEGAN = t.encode_entry(t.Began(t.FORMAT, t.VERSION, 0, 0, "c", "h", "p", "r", 1, 2))


def test_a_process_records_as_long_as_anybody_wants_it() -> None:
    recorders, one, other = Recorders(always=False), object(), object()
    assert not recorders.any

    recorders.add(one, "vm1")
    recorders.add(one, "alpha/kvm")
    recorders.add(other, None)
    assert recorders.wants("beta/kvm")
    assert recorders.discard(other)
    assert [recorders.wants(target) for target in ("vm1/qemu", "alpha/kvm", "beta/kvm")] == [True, True, False]
    assert recorders.discard(one)
    assert not recorders.discard(one)
    assert not recorders.any


def test_what_is_always_recorded_is_so_whoever_ends() -> None:
    recorders = Recorders(always=True)
    recorders.add(1, "vm1")
    recorders.discard(1)

    assert recorders.any
    assert recorders.wants("alpha/kvm")


def test_orders_are_numbered_for_one_may_overtake_another() -> None:
    recorders = Recorders(always=False)

    assert [recorders.next_order(on=on)["number"] for on in (True, False)] == [1, 2]


@pytest.mark.parametrize(
    ("process", "name", "is_meant"),
    [
        ("vm1/qemu", "vm1/qemu", True),
        ("vm1/qemu.2", "vm1/qemu", True),
        ("vm1/qemu.2", "vm1", True),
        ("vm1/qemu.2", "vm1/qemu.2", True),
        ("vm1/qemu", "vm1/qemu.2", False),
        ("vm1/qemu", "vm", False),
        ("vm1/qemu", "qemu", False),
    ],
)
def test_a_name_means_a_process_its_owner_or_where_it_is(process: str, name: str, is_meant: bool) -> None:
    assert is_of(process, name) is is_meant
    file = Path(f"{process.replace('/', '.')}.trace")
    assert place_of(file) == process


def test_a_window_is_what_was_added_and_all_of_what_is_new_or_was_recorded_before(tmp_path: Path) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    live.mkdir()
    copy.mkdir()
    for name in ("vm1.qemu", "vm1.guest", "alpha.kvm"):
        (live / f"{name}.trace").write_bytes(BEGAN)
    window = Window(files_of(live))
    window.take_whole(["vm1/guest"])
    for name in ("vm1.qemu", "vm1.guest", "vm1.qemu.2", "beta.kvm"):
        with (live / f"{name}.trace").open("ab") as file:
            file.write(BEGAN)

    copies = window.copy_to(copy, files_of(live, "vm1"))

    assert {path.name: path.read_bytes() for path in copies} == {
        "vm1.guest.trace": BEGAN * 2,
        "vm1.qemu.2.trace": BEGAN,
        "vm1.qemu.trace": BEGAN,
    }
    assert sorted(copy.iterdir()) == sorted(copies)


@pytest.mark.parametrize("n_written", [0, 3])
def test_a_file_is_copied_whole_when_what_was_noted_before_is_written_after(tmp_path: Path, n_written: int) -> None:
    """A process was stopped when the recording before ended, and its disk took a part of an entry."""
    live, copy = tmp_path / "live", tmp_path / "copy"
    live.mkdir()
    copy.mkdir()
    left = t.encode_entry(t.InterruptMoved(1, 7, 0x1000, t.InterruptStep.RAISED, 0))
    path = live / "vm1.guest.trace"
    path.write_bytes(BEGAN + left[:n_written])
    window = Window([path])
    with path.open("ab") as file:
        file.write(left[n_written:] + BEGAN)

    (copied,) = window.copy_to(copy, [path])

    assert copied.read_bytes() == BEGAN + left + BEGAN
