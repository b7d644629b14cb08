"""docs/protocol.md says what the declarations say."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol import reference
from protocol.declare import CallTable
from protocol.hcalls import HCALLS
from protocol.links import LINK_KINDS
from protocol.messages import MESSAGES
from protocol.rtas import RTAS
from protocol.ucalls import UCALLS

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"


def test_the_committed_page_is_fresh() -> None:
    fresh = reference.render()

    # `python -m protocol.reference > docs/protocol.md` renews it.
    assert PAGE.read_text(encoding="utf-8") == fresh, "docs/protocol.md is older than the declarations"


@pytest.mark.parametrize("table", [HCALLS, UCALLS, RTAS])
def test_every_call_stands_on_the_page_once(table: CallTable) -> None:
    lines = reference.render().splitlines()
    missing = [
        call.name
        for call in table
        if sum(
            line == f"### {call.name} ({call.number:#x})" or line.startswith(f"- {call.number:#x} {call.name}(")
            for line in lines
        )
        != 1
    ]

    assert missing == []


def test_every_message_and_link_stands_on_the_page() -> None:
    page = reference.render()

    assert [m.name for m in MESSAGES.values() if f"| {m.number:#x} | {m.name} |" not in page] == []
    assert [name for name in LINK_KINDS if f"### {name}" not in page] == []


def test_a_call_is_shown_with_arguments_memory_callers_and_errors() -> None:
    page = reference.render()
    entry = page.split("### H_PUT_TCE_INDIRECT (0x13c)")[1].split("###")[0]

    assert "- arguments: `liobn` liobn, `ioba` ioba, `list` gpa, `n_tces` count" in entry
    assert "- memory at `list`: in, `n_tces` x 8 bytes, at most 512" in entry
    assert "- callers: normal VM, secure VM" in entry
    assert "- `H_PARAMETER`: " in entry
    assert "- source: PAPR 14.5.4.2.4" in entry


def test_a_message_field_shows_its_type_and_bounds() -> None:
    row = next(line for line in reference.render().splitlines() if "| MAP_FAULT |" in line)

    assert "vcpu: int 0..4095" in row
    assert "access: 0 READ, 1 WRITE, 2 EXECUTE" in row


def test_a_reflected_hypercall_goes_down_to_kvm() -> None:
    section = reference.render().split("### ultravisor-kvm")[1].split("###")[0]

    assert "- ultravisor to kvm: every hypercall" in section
    assert "- kvm to ultravisor: `UV_WRITE_PATE`" in section
