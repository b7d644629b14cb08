"""A client of the Debug Adapter Protocol, as an editor is one."""

from __future__ import annotations

import itertools
import json
from typing import Any

import trio

from deploy.dap_port import DapFrames, dap_frame

SECONDS = 20.0


class DapClient:
    """One connection; events that come while an answer is waited for are kept."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.events: list[dict[str, Any]] = []
        self._numbers = itertools.count(1)
        self._frames = DapFrames()
        self._messages: list[dict[str, Any]] = []

    async def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """The body of the answer to a request, which must succeed."""
        number = await self.send(command, **arguments)
        answer = await self.next_of(lambda message: message.get("request_seq") == number)
        assert answer["success"], answer
        return dict(answer.get("body") or {})

    async def send(self, command: str, **arguments: object) -> int:
        """Send a request and wait for nothing; its number."""
        number = next(self._numbers)
        request = {"seq": number, "type": "request", "command": command, "arguments": arguments}
        await self.stream.send_all(dap_frame(request))
        return number

    async def event(self, name: str) -> dict[str, Any]:
        """The body of the next event of that name."""
        found = await self.next_of(lambda message: message.get("event") == name)
        return dict(found.get("body") or {})

    async def next_of(self, wanted: Any) -> dict[str, Any]:  # noqa: ANN401
        """The first message, of those that are kept or come, that is wanted; the others are kept."""
        with trio.fail_after(SECONDS):
            while True:
                for message in self._messages:
                    if wanted(message):
                        self._messages.remove(message)
                        return message
                data = await self.stream.receive_some(65536)
                assert data, "debugpy closed the connection"
                for frame in self._frames.feed(data):
                    self._messages.append(json.loads(frame.partition(b"\r\n\r\n")[2]))

    async def attach(self) -> None:
        """From the first word to where threads run under the debugger."""
        await self.ask("initialize", adapterID="debugpy", clientID="test", pathFormat="path")
        attaching = await self.send("attach", justMyCode=False)
        await self.event("initialized")
        await self.ask("configurationDone")
        await self.next_of(lambda message: message.get("request_seq") == attaching)


async def connect(port: int) -> DapClient:
    """A client of debugpy at that port."""
    return DapClient(await trio.open_tcp_stream("127.0.0.1", port))
