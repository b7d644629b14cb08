"""Where a secure VM may go. The policy comes with the VM, under the protection of its ESM blob, and moves with it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from services.ultravisor.migration.certificates import HostCertificate, Name, PublicKey
from services.ultravisor.migration.refusals import MigrationRefused, Reason

MAX_ENTRIES = 64


class MigrationPolicy(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """`may_migrate` at all; only to hosts of these `roots` and with these names, where any are named.

    `to_debuggable` allows a destination whose processes a debugger may be attached to.
    """

    may_migrate: bool = False
    roots: Annotated[tuple[PublicKey, ...], Meta(max_length=MAX_ENTRIES)] = ()
    hosts: Annotated[tuple[Name, ...], Meta(max_length=MAX_ENTRIES)] = ()
    to_debuggable: bool = False

    def check(self, destination: HostCertificate, *, debuggable: bool) -> None:
        """Raise MigrationRefused unless the VM may go to the host of this certificate (which was verified)."""
        if not self.may_migrate:
            raise MigrationRefused(Reason.POLICY, "it may not migrate at all")
        if self.roots and destination.root not in self.roots:
            raise MigrationRefused(Reason.POLICY, f"the root of {destination.host} is not among its own")
        if self.hosts and destination.host not in self.hosts:
            raise MigrationRefused(Reason.POLICY, f"{destination.host} is not among {', '.join(self.hosts)}")
        if debuggable and not self.to_debuggable:
            raise MigrationRefused(Reason.DEBUGGABLE, destination.host)
