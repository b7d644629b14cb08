"""Asking one process something that must be answered: what it says is checked, not trusted."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from deploy.child import QUERY_SECONDS, Child
from protocol.errors import PeerGone, UserError

AnswerT = TypeVar("AnswerT", bound=msgspec.Struct)


async def answer_of(
    child: Child | None, what: str, arguments: dict[str, Any], kind: type[AnswerT], seconds: float = QUERY_SECONDS
) -> AnswerT:
    """The answer as a `kind`; raises UserError when there is none, or another."""
    if child is None:
        raise UserError(f"nobody can be asked {what}")
    try:
        return msgspec.convert(await child.query(what, arguments, seconds), kind)
    except PeerGone as gone:
        raise UserError(f"{gone.peer} is {gone.state}: it was asked {what}") from None
    except msgspec.ValidationError:
        raise UserError(f"{child.target} answered {what} with something else") from None
