"""Every error the project raises on purpose.

PefboxError
├── UserError                 a mistake of the person at the command line: one line, what, where, what to do
│   └── ClusterFileError      a mistake in a cluster file: file, line, key, what is allowed
├── PeerError                 a peer process broke the protocol (S5): answered and audited, never fatal
│   ├── MalformedMessage      a frame that is no message of this protocol
│   └── UnexpectedMessage     a well-formed message that this link does not carry
├── PeerGone                  the peer of a call died, hangs or was stopped before it answered
├── CallTimeout               the peer did not answer within the bound of the call
├── GuestFault                a guest handed over an address or a structure that does not hold
├── ImageRefused              an ESM blob, kernel or page image failed its check; carries the true reason
└── HostFault                 this machine refused something: a full /dev/shm, a truncated segment
"""

from __future__ import annotations

_MAX_TEXT_CHARS = 500


class PefboxError(Exception):
    """Base of all errors that the project raises on purpose."""


class UserError(PefboxError):
    """A mistake of whoever runs `pefbox`; `str()` is the one line that is shown."""


class ClusterFileError(UserError):
    """A mistake in a cluster file.

    `path`, `line` (1-based, None when unknown) and `key` say where; `problem` says what and what is allowed.
    """

    def __init__(self, path: str, key: str, problem: str, line: int | None = None) -> None:
        self.path, self.key, self.problem, self.line = path, key, problem, line
        where = f"{path}:{line}" if line is not None else path
        super().__init__(f"{where}: {key}: {problem}" if key else f"{where}: {problem}")


class PeerError(PefboxError):
    """A peer broke the protocol."""


class MalformedMessage(PeerError):
    """A frame that does not decode as a message of this protocol.

    `text` may quote the peer, who chooses how long that is: it is cut short.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= _MAX_TEXT_CHARS else f"{text[:_MAX_TEXT_CHARS]}...")


class UnexpectedMessage(PeerError):
    """A message whose number, kind or direction this link does not carry."""


class PeerGone(PefboxError):
    """The peer of an open call is dead, stopped or unresponsive.

    `peer` is its name (`alpha/kvm`), `state` what became of it.
    """

    def __init__(self, peer: str, state: str) -> None:
        self.peer, self.state = peer, state
        super().__init__(f"{peer} is {state}")


class CallTimeout(PefboxError):
    """A call was not answered within its bound; `peer`, `call` and `seconds` say which."""

    def __init__(self, peer: str, call: str, seconds: float) -> None:
        self.peer, self.call, self.seconds = peer, call, seconds
        super().__init__(f"{peer} did not answer {call} within {seconds:g} s")


class GuestFault(PefboxError):
    """A guest handed over an address or a structure that does not hold."""


class ImageRefused(PefboxError):
    """A measured image failed its check. `reason` is for the operator only, never for guest or host."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class HostFault(PefboxError):
    """The machine under the emulator refused an operation (space, descriptor, truncated segment)."""
