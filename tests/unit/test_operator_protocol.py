"""What goes between a command and the launcher."""

from __future__ import annotations

import pytest

from deploy.operator_protocol import Request, frame
from protocol.errors import UserError


@pytest.mark.parametrize(("value", "why"), [(1 << 64, "number is too large"), ("vm\udcff", "no UTF-8")])
def test_what_fits_into_no_message_is_refused_in_one_line(value: object, why: str) -> None:
    with pytest.raises(UserError, match=f"^migrate: .*{why}"):
        frame(Request("token", "migrate", {"vm": value}))
