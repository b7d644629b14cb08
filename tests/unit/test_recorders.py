"""Who wants traces, and what the launcher makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.recorders import Recorders
from deploy.targets import is_of
from deploy.trace.reader import place_of
from deploy.trace.recording import Window, files_of


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
        (live / f"{name}.trace").write_bytes(b"before")
    window = Window(files_of(live))
    window.take_whole(["vm1/guest"])
    for name in ("vm1.qemu", "vm1.guest", "vm1.qemu.2", "beta.kvm"):
        with (live / f"{name}.trace").open("ab") as file:
            file.write(b"after")

    copies = window.copy_to(copy, files_of(live, "vm1"))

    assert {path.name: path.read_bytes() for path in copies} == {
        "vm1.guest.trace": b"beforeafter",
        "vm1.qemu.2.trace": b"after",
        "vm1.qemu.trace": b"after",
    }
    assert sorted(copy.iterdir()) == sorted(copies)
