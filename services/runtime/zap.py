"""Who may connect: one ZAP server a process, under trio.

Each link's ZAP domain admits exactly one public key. Without this task running no link is bound, since libzmq without
a ZAP handler lets any CURVE client in.
"""

from __future__ import annotations

from typing import Any

import trio
import zmq
from zmq.auth.base import Authenticator

from services.runtime.channel import ZmqChannel


class _OneKey:
    """A credentials provider that knows one key."""

    def __init__(self, public_key: str) -> None:
        self._key = public_key.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether `key` (z85) is the one."""
        return key == self._key


class ZapServer:
    """Answers libzmq's authentication requests of this process.

    Open it before the first bind; `allow` names the one key of a domain, `forget` closes the domain.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._authenticator: Any = Authenticator(context)
        self._authenticator.start()
        self._channel = ZmqChannel(self._authenticator.zap_socket)

    def allow(self, domain: str, public_key: str) -> None:
        """Admit the holder of `public_key` (z85) to `domain`, and nobody else."""
        self._authenticator.credentials_providers[domain] = _OneKey(public_key)

    def forget(self, domain: str) -> None:
        """Admit nobody to `domain` any more."""
        self._authenticator.credentials_providers.pop(domain, None)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        # An empty table would make the library fall back to certificates; nobody holds the key of this domain.
        self._authenticator.credentials_providers.setdefault("nobody", _OneKey(""))
        task_status.started()
        try:
            while True:
                await self._authenticator.handle_zap_message(await self._channel.receive())
        finally:
            self._channel.close()
