"""Both ends of a link in one trio loop, over real sockets with CURVE and ZAP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio
import zmq

from protocol.links import KVM_GUEST, LinkKind
from protocol.startup import LinkEntry, LinkKey
from services.runtime.channel import ZmqChannel
from services.runtime.link import Link
from services.runtime.sockets import bind_socket, connect_socket
from services.runtime.zap import ZapServer

LOG = structlog.wrap_logger(structlog.ReturnLogger(), processors=[])
"""Renders nothing: a trace for each of many calls takes longer than the calls."""


def key_pair(link: str) -> LinkKey:
    """A fresh key of one end."""
    public, secret = zmq.curve_keypair()
    return LinkKey(link=link, public_key=public.decode(), secret_key=secret.decode())


@dataclass
class Ends:
    """Both ends, named by privilege, and the channel of the lower one."""

    upper: Link
    lower: Link
    raw: ZmqChannel


@asynccontextmanager
async def closing(context: zmq.Context[zmq.Socket[bytes]]) -> AsyncIterator[None]:
    """Ends the context with whatever is open in it."""
    try:
        yield
    finally:
        context.destroy(linger=0)


@asynccontextmanager
async def linked(tmp_path: Path, kind: LinkKind = KVM_GUEST) -> AsyncIterator[Ends]:
    """A link of `kind` whose ends nobody reads yet."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    upper_key, lower_key = key_pair("l"), key_pair("l")
    endpoint = f"ipc://{tmp_path}/s"

    def entry(peer_key: LinkKey, peer: str) -> LinkEntry:
        return LinkEntry(
            id="l",
            kind=kind.name,
            endpoint=endpoint,
            vm=None,
            peer=peer,
            peer_public_key=peer_key.public_key,
            binds=peer == "lower",
        )

    async with closing(context), trio.open_nursery() as nursery:
        zap = ZapServer(context)
        await nursery.start(zap.run)
        upper_socket = bind_socket(context, zap, entry(lower_key, "lower"), upper_key)
        lower_channel = ZmqChannel(connect_socket(context, entry(upper_key, "upper"), lower_key))
        upper = Link(ZmqChannel(upper_socket), kind, kind.upper, "l", "lower", LOG)
        lower = Link(lower_channel, kind, kind.lower, "l", "upper", LOG)
        yield Ends(upper, lower, lower_channel)
        nursery.cancel_scope.cancel()
