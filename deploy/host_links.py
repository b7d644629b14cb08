"""The ways between hosts and what shape each has: as the cluster file says, and as it was changed since."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from deploy.cluster_file import HostLinkSpec
from shared.link_shape import PLAIN, LinkShape


class LinkRow(LinkShape, frozen=True, kw_only=True):
    """A link, as `status` and `pefbox link` show it."""

    between: tuple[str, str]


class HostLinks:
    """The shape of the way between each two hosts: as the cluster file has it, and as it was changed since."""

    def __init__(self, links: Iterable[HostLinkSpec]) -> None:
        self._rows = {frozenset(link.between): _row(link.between, link.shape) for link in links}
        self._n_told = 0

    def between(self, one: str, other: str) -> LinkShape:
        """Of the way between two hosts, or within one."""
        row = self._rows.get(frozenset((one, other)))
        return PLAIN if row is None else _shape(row)

    def row(self, one: str, other: str) -> LinkRow:
        """The same, with its ends in the order in which it was first named."""
        return self._rows.get(frozenset((one, other))) or _row((one, other), PLAIN)

    def change(self, one: str, other: str, shape: LinkShape) -> None:
        """It has this shape from now on."""
        self._rows[frozenset((one, other))] = _row(self.row(one, other).between, shape)

    def rows(self) -> list[LinkRow]:
        """All links that the file names or that were changed."""
        return list(self._rows.values())

    def next_number(self) -> int:
        """For what a process is told: the order in which these were true."""
        self._n_told += 1
        return self._n_told


def _row(between: tuple[str, str], shape: LinkShape) -> LinkRow:
    return LinkRow(between=between, **msgspec.structs.asdict(shape))


def _shape(row: LinkRow) -> LinkShape:
    return LinkShape(**{name: getattr(row, name) for name in LinkShape.__struct_fields__})
