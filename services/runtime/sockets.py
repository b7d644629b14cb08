"""How the two ends of a link open their ZeroMQ socket.

CURVE on both, the ZAP domain admits exactly one public key, finite marks, no lingering. The more privileged end binds.
"""

from __future__ import annotations

import zmq

from protocol.errors import HostFault
from protocol.startup import LinkEntry, LinkKey
from protocol.wire import HIGH_WATER_MARK, MAX_MESSAGE_BYTES
from services.runtime.zap import ZapServer

_RECONNECT_MS = 10
_HANDSHAKE_MS = 5_000


def bind_socket(
    context: zmq.Context[zmq.Socket[bytes]], zap: ZapServer, entry: LinkEntry, key: LinkKey
) -> zmq.Socket[bytes]:
    """The bound end of `entry`; only the peer's key is let in. Raises HostFault when the endpoint cannot be bound."""
    zap.allow(entry.id, entry.peer_public_key)
    socket = _dealer(context, key)
    socket.curve_server = True
    socket.setsockopt(zmq.ZAP_DOMAIN, entry.id.encode())
    try:
        socket.bind(entry.endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise HostFault(f"cannot bind link {entry.id}: {error.strerror}") from None
    return socket


def connect_socket(context: zmq.Context[zmq.Socket[bytes]], entry: LinkEntry, key: LinkKey) -> zmq.Socket[bytes]:
    """The connecting end of `entry`; the peer proves its key in the handshake."""
    socket = _dealer(context, key)
    socket.curve_serverkey = entry.peer_public_key.encode()
    socket.connect(entry.endpoint)
    return socket


def _dealer(context: zmq.Context[zmq.Socket[bytes]], key: LinkKey) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    socket.curve_publickey = key.public_key.encode()
    socket.curve_secretkey = key.secret_key.encode()
    return socket
