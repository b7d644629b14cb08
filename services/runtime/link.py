"""One end of a link under trio: calls out, calls in, replies matched by correlation id.

The reader never awaits a handler. A handler registered with `on` answers at once and is run by the reader; one
registered with `on_waiting` is a task of its own, at most MAX_OPEN_CALLS of them, beyond which the caller gets H_BUSY
or U_BUSY. Whatever a peer sends ends in a reply, a line for the operator, or both; it never ends the reader (S5).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import outcome
import trio

from protocol.declare import Call
from protocol.errors import GuestFault, MalformedMessage, PeerError, PeerGone, UnexpectedMessage
from protocol.hcalls import HCALLS
from protocol.links import ULTRAVISOR_KVM, LinkKind, name_of
from protocol.messages import BodyT, Message, ReplyT, decode_registers, decode_result
from protocol.refusals import HELD_UP_STATES, Refusal, refusal, reply_of_code, why_not_served
from protocol.registers import to_register
from protocol.roles import Role
from protocol.ucalls import UV_RETURN
from protocol.wire import MAX_OPEN_CALLS, Envelope, MessageKind, decode, encode, is_bundle, unbundle
from services.runtime.channel import ZmqChannel
from services.runtime.log import Log
from services.runtime.patience import Patience
from services.runtime.tracer import Tap
from services.runtime.watch import Watcher

LOST_STATES = frozenset({"gone", "failed", "stopped", "unresponsive", "closed"})
"""A peer in one of these answers nothing; in any other it is expected to answer, however late."""

MAX_TOGETHER = 32
"""Calls that one task serves: the caller can work on the first answers while the next are made."""

DEFERRED = None
"""What a handler returns when somebody will call `Link.reply` later."""

AtOnce = Callable[[Envelope, Any], Any]
Waiting = Callable[[Envelope, Any], Awaitable[Any]]
Batch = list[tuple[Envelope, list[int]]]
"""Calls with their registers."""
TogetherHandler = Callable[[Batch], Awaitable[list[Any]]]


class _Group:
    """Calls of one task that are waited for together."""

    __slots__ = ("correlations", "missing", "replies", "task")

    def __init__(self, task: trio.lowlevel.Task, correlations: range) -> None:
        self.task = task
        self.correlations = correlations
        self.missing = len(correlations)
        self.replies: list[msgspec.Raw] = [msgspec.Raw()] * len(correlations)

    def take(self, envelope: Envelope) -> None:
        """One reply; the last one wakes the task."""
        self.replies[envelope.correlation - self.correlations.start] = envelope.body
        self.missing -= 1
        if not self.missing:
            trio.lowlevel.reschedule(self.task, outcome.Value(None))


@dataclass(frozen=True, slots=True)
class _Handler:
    decode: Callable[[msgspec.Raw], Any]
    kind: MessageKind
    at_once: AtOnce | None = None
    waiting: Waiting | None = None
    together: TogetherHandler | None = None


class Link:
    """One end of one link; `peer` names the other process, `peer_state` is `up` or what became of it."""

    def __init__(self, channel: ZmqChannel, kind: LinkKind, me: Role, link_id: str, peer: str, log: Log) -> None:
        self.id = link_id
        self.peer = peer
        self.kind = kind
        self.peer_state = "up"
        self.refused = 0
        self.patience = Patience()
        """Bounds of what this side waits for at the peer."""
        self.tap: Tap | None = None
        self.watch: Watcher | None = None
        self._channel = channel
        channel.bundles = kind.bundles
        self._inbound = kind.inbound(me)
        self._log = log.bind(link=link_id, peer=peer)
        self._handlers: dict[int, _Handler] = {}
        self._pending: dict[int, trio.lowlevel.Task | _Group] = {}
        self._lasting: set[int] = set()
        """Those of `_pending` that a peer which is held up does not end."""
        self._next_correlation = 1
        self._open_tasks = 0
        self._gathered: dict[tuple[int, int], Batch] = {}
        self._nursery: trio.Nursery | None = None

    # -- handlers ---------------------------------------------------------------------------------------------

    def on(self, call: Call | Message[Any, Any], handler: AtOnce) -> None:
        """Serve `call` in the reader: `handler(envelope, body)` returns the reply, or DEFERRED."""
        self._register(call, _Handler(_decoder_for(call), _kind_of(call), at_once=handler))

    def on_waiting(self, call: Call | Message[Any, Any], handler: Waiting) -> None:
        """Serve `call` in a task of its own."""
        self._register(call, _Handler(_decoder_for(call), _kind_of(call), waiting=handler))

    def on_together(self, call: Call, handler: TogetherHandler) -> None:
        """Serve `call` in a task, with up to MAX_TOGETHER that came with it and have the same first register.

        `handler` returns a reply for each.
        """
        self._register(call, _Handler(_decoder_for(call), _kind_of(call), together=handler))

    def _register(self, call: Call | Message[Any, Any], handler: _Handler) -> None:
        if call.number not in self._inbound:
            raise ValueError(f"{self.kind.name} does not carry {call.name} towards this role")
        self._handlers[call.number] = handler

    # -- calls out --------------------------------------------------------------------------------------------

    async def call(self, message: Message[BodyT, ReplyT], body: BodyT, cause: int = 0) -> ReplyT:
        """Call the peer and wait for its reply; raises PeerGone, MalformedMessage."""
        return message.decode_reply(await self._ask(message.number, body, cause))

    async def call_registers(self, call: Call, args: Sequence[int], cause: int = 0) -> list[int]:
        """Issue a hypercall or ultracall and wait for `[code, outputs...]`; raises PeerGone, MalformedMessage."""
        return decode_result(await self._ask(call.number, args, cause))

    async def call_lasting(self, message: Message[BodyT, ReplyT], body: BodyT, cause: int = 0) -> ReplyT:
        """As `call`, for what must not be done twice: a peer that is held up is waited for, until it answers or dies.

        Whoever calls sets a bound, if there is to be one.
        """
        return message.decode_reply(await self._ask_lasting(message.number, body, cause))

    async def call_registers_lasting(self, call: Call, args: Sequence[int], cause: int = 0) -> list[int]:
        """As `call_lasting`, for a hypercall or ultracall."""
        return decode_result(await self._ask_lasting(call.number, args, cause))

    async def call_many(self, call: Call, args_of_each: Sequence[Sequence[int]], cause: int = 0) -> list[list[int]]:
        """As `call_registers` for each of `args_of_each`, all open at once; the results in the same order."""
        if not args_of_each:
            await trio.lowlevel.checkpoint()
            return []
        if self.peer_state != "up":
            raise PeerGone(self.peer, self.peer_state)
        first = self._next_correlation
        self._next_correlation += len(args_of_each)
        correlations = range(first, self._next_correlation)
        group = _Group(trio.lowlevel.current_task(), correlations)
        sent = self._send_many(
            [
                encode(MessageKind.CALL, call.number, correlation, cause, args)
                for correlation, args in zip(correlations, args_of_each, strict=True)
            ]
        )
        if not sent:
            raise PeerGone(self.peer, "unresponsive")
        for correlation in correlations:
            self._pending[correlation] = group

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            for correlation in correlations:
                self._pending.pop(correlation, None)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        return [decode_result(reply) for reply in group.replies]

    def send_event(self, message: Message[BodyT, Any], body: BodyT, cause: int = 0) -> bool:
        """Tell the peer something that has no reply; False when it takes no more messages."""
        return self._send(MessageKind.EVENT, message.number, 0, cause, body)

    def offer_event(self, message: Message[BodyT, Any], body: BodyT, cause: int = 0) -> bool:
        """Tell the peer something that may be lost: False when it is down or takes nothing now. Nothing is kept."""
        if self.peer_state != "up":
            return False
        frames = (encode(MessageKind.EVENT, message.number, 0, cause, body),)
        try:
            sent = self._channel.offer(frames)
        except PeerError:
            return False
        if sent and self.tap is not None:
            self.tap(True, frames)
        return sent

    def send_call(self, number: int, correlation: int, body: Any, cause: int) -> None:  # noqa: ANN401
        """Send a call whose answer does not come as a reply (a reflected hypercall is answered by UV_RETURN).

        A peer that is held up finds it when it goes on: nothing else would tell it. Raises PeerGone.
        """
        self._check_alive()
        self._send_or_raise(number, correlation, cause, body)

    def reply(self, envelope: Envelope, body: Any) -> None:  # noqa: ANN401
        """Answer a deferred call."""
        self._send(MessageKind.REPLY, envelope.number, envelope.correlation, envelope.cause, body)

    def reply_many(self, answers: Sequence[tuple[Envelope, Any]]) -> None:
        """Answer several deferred calls together."""
        self._send_many(
            [
                encode(MessageKind.REPLY, envelope.number, envelope.correlation, envelope.cause, body)
                for envelope, body in answers
                if envelope.kind is MessageKind.CALL
            ]
        )

    def peer_is(self, state: str) -> None:
        """Take note of what became of the peer; when it is lost its open calls end with PeerGone.

        Those of `call_lasting` end only with its death.
        """
        self.patience.peer_is(state)
        if state not in LOST_STATES:
            state = "up"
        if state == self.peer_state:
            return
        self.peer_state = state
        if state == "up":
            self._log.info("peer is up again")
            return
        self._log.warning("peer lost", state=state, open_calls=len(self._pending))
        for task in self._take_ending(state):
            trio.lowlevel.reschedule(task, outcome.Error(PeerGone(self.peer, state)))

    @property
    def open_calls(self) -> int:
        """Calls of this side that wait for a reply."""
        return len(self._pending)

    def statistics(self) -> dict[str, int | str]:
        """For the operator: calls made so far, those that wait for a reply, those of the peer that are being served,
        messages that it has not taken, and what was refused of it."""
        return {
            "peer": self.peer,
            "calls": self._next_correlation - 1,
            "open_calls": self.open_calls,
            "serving": self._open_tasks,
            "queued": self._channel.n_queued,
            "refused": self.refused,
        }

    async def _ask(self, number: int, body: Any, cause: int) -> msgspec.Raw:  # noqa: ANN401
        if self.peer_state != "up":
            raise PeerGone(self.peer, self.peer_state)
        return await self._ask_open(number, body, cause)

    async def _ask_lasting(self, number: int, body: Any, cause: int) -> msgspec.Raw:  # noqa: ANN401
        self._check_alive()
        correlation = self._next_correlation
        self._lasting.add(correlation)
        try:
            return await self._ask_open(number, body, cause)
        finally:
            self._lasting.discard(correlation)

    async def _ask_open(self, number: int, body: Any, cause: int) -> msgspec.Raw:  # noqa: ANN401
        correlation = self._next_correlation
        self._next_correlation += 1
        self._send_or_raise(number, correlation, cause, body)
        self._pending[correlation] = trio.lowlevel.current_task()

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._pending.pop(correlation, None)
            return trio.lowlevel.Abort.SUCCEEDED

        raw: msgspec.Raw = await trio.lowlevel.wait_task_rescheduled(abort)
        return raw

    def _check_alive(self) -> None:
        if self.peer_state != "up" and self.peer_state not in HELD_UP_STATES:
            raise PeerGone(self.peer, self.peer_state)

    def _take_ending(self, state: str) -> list[trio.lowlevel.Task]:
        lasting = self._lasting if state in HELD_UP_STATES else frozenset[int]()
        open_calls, self._pending = self._pending, {}
        ending: dict[trio.lowlevel.Task, None] = {}
        for correlation, waiter in open_calls.items():
            if correlation in lasting:
                self._pending[correlation] = waiter
            else:
                ending[waiter.task if isinstance(waiter, _Group) else waiter] = None
        return list(ending)

    def _send_or_raise(self, number: int, correlation: int, cause: int, body: Any) -> None:  # noqa: ANN401
        """A call that was not sent is never answered: raises PeerGone."""
        if not self._send(MessageKind.CALL, number, correlation, cause, body):
            raise PeerGone(self.peer, "unresponsive")

    def _send(self, kind: MessageKind, number: int, correlation: int, cause: int, body: Any) -> bool:  # noqa: ANN401
        frames = (encode(kind, number, correlation, cause, body),)
        if self.tap is not None:
            self.tap(True, frames)
        try:
            self._channel.send(frames)
        except PeerError as error:
            self._refuse(str(error))
            return False
        return True

    def _send_from_reader(self, envelope: Envelope, body: Any) -> None:  # noqa: ANN401
        frames = (encode(MessageKind.REPLY, envelope.number, envelope.correlation, envelope.cause, body),)
        if self.tap is not None:
            self.tap(True, frames)
        try:
            self._channel.send_from_reader(frames)
        except PeerError as error:
            self._refuse(str(error))

    def _send_many(self, encoded: list[bytes]) -> bool:
        messages = [(frame,) for frame in encoded]
        if self.tap is not None:
            for frames in messages:
                self.tap(True, frames)
        try:
            self._channel.send_many(messages)
        except PeerError as error:
            self._refuse(str(error))
            return False
        return True

    # -- calls in ---------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read and serve until cancelled; what is still open then ends with PeerGone."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._channel.watch)
                task_status.started()
                await self._channel.serve(self._take)
        finally:
            self.peer_is("closed")
            self._channel.close()

    def _take(self, frames: list[bytes]) -> int:
        """Serve what came as one ZeroMQ message; how many messages it was."""
        if self.kind.bundles and len(frames) == 1 and is_bundle(frames[0]):
            return self._take_bundle(frames[0])
        self._take_message(frames)
        return 1

    def _take_bundle(self, frame: bytes) -> int:
        try:
            messages = unbundle(frame)
        except MalformedMessage as error:
            self._refuse(str(error))
            return 1
        for message in messages:
            self._take_message([message])
        return len(messages) or 1

    def _take_message(self, frames: list[bytes]) -> None:
        if self.tap is not None:
            self.tap(False, frames)
        try:
            if len(frames) != 1:
                raise UnexpectedMessage(f"{len(frames)} frames where one is declared")
            envelope = decode(frames[0])
            if self.watch is None or self.watch(self, envelope):
                self._dispatch(envelope)
        except PeerError as error:
            self._refuse(str(error))

    def serve_now(self, envelope: Envelope) -> None:
        """Serve a message that a watcher has kept."""
        try:
            self._dispatch(envelope)
            self._channel.hurry()
        except PeerError as error:
            self._refuse(str(error))

    def refuse_now(self, envelope: Envelope, code: int) -> None:
        """Answer a call that a watcher has kept with `code` alone."""
        if self.kind is ULTRAVISOR_KVM and envelope.number in HCALLS.by_number:
            # A reflected hypercall has this answer and no other.
            self.send_call(UV_RETURN.number, 0, [to_register(code), envelope.correlation], envelope.cause)
            return
        self._answer(envelope, reply_of_code(envelope.number, code))

    def _dispatch(self, envelope: Envelope) -> None:
        if envelope.kind is MessageKind.REPLY:
            self._take_reply(envelope)
        else:
            self._take_call(envelope)

    def _take_reply(self, envelope: Envelope) -> None:
        waiter = self._pending.pop(envelope.correlation, None)
        if isinstance(waiter, _Group):
            waiter.take(envelope)
        elif waiter is not None:
            trio.lowlevel.reschedule(waiter, outcome.Value(envelope.body))
        elif not 0 <= envelope.correlation < self._next_correlation:
            # Of an earlier one the caller may have given up.
            raise UnexpectedMessage(f"a reply to call {envelope.correlation}, which was never made")

    def _take_call(self, envelope: Envelope) -> None:
        handler = self._handlers.get(envelope.number)
        if handler is None:
            self._answer_unknown(envelope)
            return
        if envelope.kind is not handler.kind:
            self._answer(envelope, refusal(envelope.number, Refusal.UNKNOWN))
            raise UnexpectedMessage(f"{name_of(envelope.number)} is no {envelope.kind.name.lower()}")
        try:
            body = handler.decode(envelope.body)
        except MalformedMessage as error:
            self._answer(envelope, refusal(envelope.number, Refusal.MALFORMED))
            raise error
        if handler.at_once is not None:
            self._serve_at_once(handler.at_once, envelope, body)
        elif handler.waiting is not None:
            self._serve_in_task(handler.waiting, envelope, body)
        elif handler.together is not None:
            self._gather(handler.together, envelope, body)

    def _answer_unknown(self, envelope: Envelope) -> None:
        if envelope.kind is MessageKind.CALL:
            self._answer(envelope, refusal(envelope.number, why_not_served(envelope.number)))
        if envelope.number not in self._inbound and not self.kind.open_numbers:
            raise UnexpectedMessage(f"{name_of(envelope.number)} is not carried in this direction")

    def _serve_at_once(self, handler: AtOnce, envelope: Envelope, body: Any) -> None:  # noqa: ANN401
        try:
            result = handler(envelope, body)
            if result is not DEFERRED and envelope.kind is MessageKind.CALL:
                self._send_from_reader(envelope, result)
        except Exception as error:
            self._answer(envelope, self._failure(envelope, error))

    def _serve_in_task(self, handler: Waiting, envelope: Envelope, body: Any) -> None:  # noqa: ANN401
        if self._open_tasks >= MAX_OPEN_CALLS or self._nursery is None:
            self._answer(envelope, refusal(envelope.number, Refusal.BUSY))
            return
        self._open_tasks += 1
        self._nursery.start_soon(self._serve, handler, envelope, body)

    def _gather(self, handler: TogetherHandler, envelope: Envelope, registers: list[int]) -> None:
        if self._open_tasks >= MAX_OPEN_CALLS or self._nursery is None:
            self._answer(envelope, refusal(envelope.number, Refusal.BUSY))
            return
        self._open_tasks += 1
        key = (envelope.number, registers[0] if registers else 0)
        batch = self._gathered.get(key)
        if batch is None or len(batch) == MAX_TOGETHER:
            batch = self._gathered[key] = []
            self._nursery.start_soon(self._serve_together, handler, key, batch)
        batch.append((envelope, registers))

    async def _serve_together(self, handler: TogetherHandler, key: tuple[int, int], batch: Batch) -> None:
        if self._gathered.get(key) is batch:
            del self._gathered[key]
        try:
            try:
                results = await handler(batch)
                self.reply_many([(envelope, result) for (envelope, _), result in zip(batch, results, strict=True)])
            except Exception as error:
                self.reply_many([(envelope, self._failure(envelope, error)) for envelope, _ in batch])
        finally:
            self._open_tasks -= len(batch)

    async def _serve(self, handler: Waiting, envelope: Envelope, body: Any) -> None:  # noqa: ANN401
        try:
            try:
                result = await handler(envelope, body)
                if result is not DEFERRED:
                    self._answer(envelope, result)
            except Exception as error:
                self._answer(envelope, self._failure(envelope, error))
        finally:
            self._open_tasks -= 1

    def _failure(self, envelope: Envelope, error: Exception) -> Any:  # noqa: ANN401
        """What the peer gets when its call ended in an exception."""
        if isinstance(error, (GuestFault, PeerError)):
            self._refuse(str(error))
            return refusal(envelope.number, Refusal.MALFORMED)
        if isinstance(error, PeerGone):
            self._log.warning("call ended", call=name_of(envelope.number), reason=str(error))
            return refusal(envelope.number, Refusal.of_peer(error.state))
        self._log.error("internal error", call=name_of(envelope.number), exc_info=error)
        return refusal(envelope.number, Refusal.GONE)

    def _answer(self, envelope: Envelope, body: Any) -> None:  # noqa: ANN401
        if envelope.kind is MessageKind.CALL:
            self.reply(envelope, body)

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        if self.refused <= 100 or self.refused % 1000 == 0:
            self._log.warning("refused", reason=reason, refused=self.refused)


def _decoder_for(call: Call | Message[Any, Any]) -> Callable[[msgspec.Raw], Any]:
    return decode_registers if isinstance(call, Call) else call.decode_body


def _kind_of(call: Call | Message[Any, Any]) -> MessageKind:
    """How its sender sends it."""
    return MessageKind.EVENT if isinstance(call, Message) and call.reply is None else MessageKind.CALL
