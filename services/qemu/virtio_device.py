"""What every virtio device does, whatever its transport: negotiation, status, reset, queues, faults.

A subclass handles chains. Each queue has one worker task, the only one that touches the queue's ring: requests that
must wait for the host run in tasks of their own and hand their result to the worker. A broken ring or an unreachable
buffer ends in `fail`: NEEDS_RESET, a configuration interrupt and a reason for the operator, never in an exception.

Source: VIRTIO 1.4, sections 2.1 to 2.7, 3.1.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from enum import IntEnum
from typing import ClassVar, Protocol

import msgspec
import trio

from protocol.errors import PefboxError
from protocol.startup import NO_OFFER, DmaOffer
from services.qemu.request_trace import RequestTrace
from services.qemu.virtio_access import AccessState, DeviceMemory, MemoryAccess
from services.qemu.virtqueue import Chain, QueueState, Virtqueue
from services.runtime.cause import CAUSE
from services.runtime.tracer import Tracer
from shared.virtio import DeviceId, DeviceStatus, Feature, feature_mask, has_feature
from shared.virtio_pci import NO_VECTOR

FEATURES = feature_mask((Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX))
"""What every device here offers."""

CHAINS_BETWEEN_CHECKPOINTS = 8
"""A guest that never lets its queue run empty does not starve the other tasks of the process."""

POLL_NS = 1_000_000
"""So long a queue that was busy is looked at before the device asks for a kick: about what a kick costs the guest.

Busy is a queue with several requests at once, or one request after another with no longer between them than this.
"""

_LONG_AGO_NS = -(1 << 62)

_DRIVER_BITS = (
    DeviceStatus.ACKNOWLEDGE
    | DeviceStatus.DRIVER
    | DeviceStatus.DRIVER_OK
    | DeviceStatus.FEATURES_OK
    | DeviceStatus.FAILED
)


class Transport(Protocol):
    """How a device tells its driver something."""

    def queue_interrupt(self, queue: Virtqueue) -> None:
        """Buffers of `queue` were used."""

    def config_interrupt(self) -> None:
        """The configuration or the status changed."""

    def queues_started(self) -> None:
        """The device serves its queues from now on."""

    def device_reset(self) -> None:
        """The device is as at power-on; forget vectors and pending interrupts."""


class VirtioState(msgspec.Struct):
    """A device between two requests."""

    queues: list[QueueState]
    status: int = 0
    driver_features: int = 0
    config_generation: int = 0
    config_vector: int = NO_VECTOR
    access: AccessState = msgspec.field(default_factory=AccessState)
    fault: str | None = None
    """Why the device needs a reset, or why it refused the driver's features."""


class VirtioDevice(ABC):
    """A virtio device. `name` is for the operator; `features` are offered beyond `FEATURES` and those of `offer`."""

    MAY_OFFER: ClassVar[int] = 0
    """Features of its own that a device of this class offers, some of them only with certain settings."""
    FEATURE_BITS: ClassVar[type[IntEnum] | None] = None
    """The names of its own features."""

    def __init__(
        self,
        name: str,
        device_id: DeviceId,
        memory: DeviceMemory,
        *,
        queue_sizes: Sequence[int],
        features: int = 0,
        offer: DmaOffer = NO_OFFER,
    ) -> None:
        self.name = name
        self.device_id = device_id
        self.access = MemoryAccess(memory, offer)
        self._own_features = FEATURES | features
        self.queues = [Virtqueue(index, size) for index, size in enumerate(queue_sizes)]
        self.state = VirtioState([queue.state for queue in self.queues])
        self.transport: Transport | None = None
        self.on_fault: Callable[[str, str], None] | None = None
        self.poll_ns = POLL_NS
        self._kicks = [trio.Event() for _ in self.queues]
        self._kick_causes = [0] * len(self.queues)
        self._done_causes = [0] * len(self.queues)
        """On whose behalf the queue's next interrupt is: that of the request that ended last."""
        self._served_ns = [_LONG_AGO_NS] * len(self.queues)
        """When a queue last ran empty."""
        self._finished: list[deque[tuple[Chain, int, int]]] = [deque() for _ in self.queues]
        """Chains that were served, the bytes written to each, and its cause."""
        self._nursery: trio.Nursery | None = None
        self._working = 0
        self._resetting = False
        self.held = False
        """The machine is about to run elsewhere: nothing new is begun."""
        self._quiet = trio.Event()

    @abstractmethod
    async def handle(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Serve one chain: bytes written to it, or None when it goes back later or was given back by the device itself.

        GuestFault for a chain that is no request of this device.
        """

    @abstractmethod
    def read_config(self, offset: int, n_bytes: int) -> bytes:
        """The device configuration from `offset`; zeros beyond its end."""

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 (most devices have nothing to write)
        """The driver writes to the device configuration at `offset`; what is not its own to write stays."""

    def wants(self, queue: Virtqueue) -> bool:
        """Whether the device has a use for a chain of `queue` now; when that changes it calls `wake`."""
        return True

    def served(self, queue: Virtqueue) -> None:  # noqa: B027 (most devices have nothing to do then)
        """Some chains of `queue` were handled, and it may take a while until the next one is."""

    def wake(self, queue: Virtqueue) -> None:
        """The device has something to do for `queue`; ignored while it does not run."""
        self.kick(queue.index)

    def was_reset(self) -> None:  # noqa: B027 (most devices keep nothing)
        """The device is as at power-on: forget what belonged to the former driver."""

    # What the driver does through the transport.

    @property
    def features(self) -> int:
        """The feature word that the device offers now."""
        return self._own_features | self.access.features

    @property
    def status(self) -> int:
        """The status byte; 0 only once a reset is complete and no request of before it is open."""
        return self.state.status

    def set_status(self, value: int) -> None:
        """The driver writes the status byte."""
        if value == 0:
            self.request_reset()
            return
        if self._resetting:
            return
        # A driver never clears a bit other than by a reset, and NEEDS_RESET is the device's alone.
        new = value & _DRIVER_BITS & ~self.state.status
        if new & DeviceStatus.FEATURES_OK and not self._accept_features():
            new &= ~DeviceStatus.FEATURES_OK
        self.state.status |= new & ~DeviceStatus.DRIVER_OK
        if new & DeviceStatus.DRIVER_OK:
            self._driver_ok()

    def set_driver_features(self, features: int) -> None:
        """The driver writes its feature word; nothing happens once FEATURES_OK is set."""
        if not self.state.status & DeviceStatus.FEATURES_OK:
            self.state.driver_features = features

    def configure_queue(self, index: int) -> QueueState | None:
        """The settings of a queue while the driver may still change them, else None."""
        locked = self._resetting or self.state.status & DeviceStatus.DRIVER_OK
        if locked or index >= len(self.queues) or self.queues[index].state.enabled:
            return None
        return self.queues[index].state

    def kick(self, index: int) -> None:
        """The driver made buffers available; ignored before DRIVER_OK and for a queue that does not run."""
        if self.serving and not self.held and index < len(self.queues) and self.queues[index].running:
            self._kick_causes[index] = CAUSE.get()
            self._kicks[index].set()

    def trace_to(self, tracer: Tracer, lpid: int) -> None:
        """Note the requests of all queues, as those of VM `lpid`."""
        for queue in self.queues:
            queue.trace = RequestTrace(tracer, lpid, self.name, queue.index)

    def reach(self) -> frozenset[int]:
        """The GFNs that the device could read or write now, should it turn against its driver; none unless it runs."""
        running = next((queue for queue in self.queues if queue.running), None) if self.serving else None
        return frozenset() if running is None else running.dma.reach()

    # Life of the device.

    @property
    def fault(self) -> str | None:
        """Why it needs a reset, or refused its driver."""
        return self.state.fault

    @property
    def serving(self) -> bool:
        """Whether the device may touch buffers."""
        live = self.state.status & (DeviceStatus.DRIVER_OK | DeviceStatus.NEEDS_RESET) == DeviceStatus.DRIVER_OK
        return live and not self._resetting

    @property
    def busy(self) -> bool:
        """Whether anything is left to do: a worker runs, a request is open, or a kick waits."""
        return self._working > 0 or any(kick.is_set() for kick in self._kicks)

    async def run(self) -> None:
        """Serve the queues until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for queue in self.queues:
                nursery.start_soon(self._work, queue)

    async def drained(self) -> None:
        """Return when everything that was available has been served."""
        while self.busy:
            await self._quiet.wait()

    async def hold(self) -> None:
        """Begin nothing new until `release`; returns when all that was begun is done."""
        self.held = True
        await self.drained()

    def release(self) -> None:
        """Go on, with all that came meanwhile."""
        self.held = False
        for queue in self.queues:
            self.wake(queue)

    def request_reset(self) -> None:
        """Back to power-on, at once or when the open requests have ended; until then the status stays non-zero."""
        self._resetting = True
        self._settle()

    async def reset(self) -> None:
        """As `request_reset`, and wait for it."""
        self.request_reset()
        while self._resetting:
            await self._quiet.wait()

    def put_behind_iommu(self, reason: str) -> None:
        """The device uses bus addresses from now on. A driver that has settled on another way must begin again."""
        self.access.put_behind_iommu()
        if self.state.status & DeviceStatus.FEATURES_OK:
            self.fail(reason)

    def power_on(self) -> None:
        """The machine was reset, and the device with it."""
        self.access.power_on()

    def fail(self, reason: str) -> None:
        """The driver broke the device: NEEDS_RESET, told to the driver, and `reason` told to the operator."""
        if self.state.status & DeviceStatus.NEEDS_RESET:
            return
        self._note(reason)
        self.state.status |= DeviceStatus.NEEDS_RESET
        if self.state.status & DeviceStatus.DRIVER_OK and self.transport is not None:
            self.transport.config_interrupt()

    def save(self) -> VirtioState:
        """A copy of the state; the device is drained."""
        if self.busy or self._resetting:
            raise RuntimeError(f"{self.name} still has work to do")
        self.state.access = self.access.state
        return msgspec.convert(msgspec.to_builtins(self.state), VirtioState)

    def load(self, state: VirtioState) -> None:
        """Go on from `state`, of a device with the same queues."""
        if len(state.queues) != len(self.queues):
            raise ValueError(f"{self.name} has {len(self.queues)} queues, the saved one {len(state.queues)}")
        self.state = msgspec.convert(msgspec.to_builtins(state), VirtioState)
        self.access.state = self.state.access
        for queue, saved in zip(self.queues, self.state.queues, strict=True):
            queue.reset()
            queue.state = saved
        if self.serving:
            self._start_queues()

    def later(self, queue: Virtqueue, chain: Chain, work: Callable[[], Awaitable[int]], /) -> None:
        """Run the coroutine function `work` in a task of its own; it returns the bytes written to `chain`."""
        if self._nursery is None:
            raise RuntimeError(f"{self.name} does not run")
        self._working += 1
        self._nursery.start_soon(self._finish_later, queue, chain, work)

    # Inside.

    def _accept_features(self) -> bool:
        chosen = self.state.driver_features
        refusal = None
        if chosen & ~self.features:
            refusal = f"the driver accepts features that are not offered ({chosen & ~self.features:#x})"
        elif not has_feature(chosen, Feature.VERSION_1):
            refusal = "the driver does not accept VIRTIO_F_VERSION_1"
        else:
            refusal = self.access.refusal(chosen)
        if refusal is not None:
            self._note(refusal)
        return refusal is None

    def _driver_ok(self) -> None:
        self.state.status |= DeviceStatus.DRIVER_OK
        if not self.state.status & DeviceStatus.FEATURES_OK:
            self.fail("DRIVER_OK without FEATURES_OK")
            return
        broken = self.access.broken_promise(self.state.driver_features)
        if broken is not None:
            self.fail(broken)
            return
        self._start_queues()

    def _start_queues(self) -> None:
        try:
            space = self.access.space(self.state.driver_features)
            for queue in self.queues:
                if queue.state.enabled:
                    queue.start(space, self.state.driver_features)
        except PefboxError as error:
            self.fail(str(error))
            return
        if self.transport is not None:
            self.transport.queues_started()
        for queue in self.queues:
            self.kick(queue.index)

    def _note(self, reason: str) -> None:
        self.state.fault = reason
        if self.on_fault is not None:
            self.on_fault(self.name, reason)

    async def _work(self, queue: Virtqueue) -> None:
        while True:
            await self._kicks[queue.index].wait()
            self._kicks[queue.index] = trio.Event()
            self._working += 1
            try:
                await self._serve(queue)
            except PefboxError as error:
                self.fail(f"queue {queue.index}: {error}")
            finally:
                self._working -= 1
                self._settle()

    async def _serve(self, queue: Virtqueue) -> None:
        if self.serving:
            await queue.pause_notifications()
        n_chains = 0
        comes_often = time.monotonic_ns() - self._served_ns[queue.index] < self.poll_ns
        while self.serving:
            await self._publish_finished(queue)
            if not self.wants(queue):
                await self._signal(queue)
                return
            # What is found without a kick belongs to the last one.
            CAUSE.set(self._kick_causes[queue.index])
            chain = await queue.pop()
            if chain is None:
                await self._signal(queue)
                self._served_ns[queue.index] = time.monotonic_ns()
                if (comes_often or n_chains > 1) and await self._poll(queue):
                    continue
                if not self._finished[queue.index] and not await queue.resume_notifications():
                    return
                continue
            self._done_causes[queue.index] = CAUSE.get()
            written = await self.handle(queue, chain)
            if written is not None:
                await queue.push(chain.head, written)
            n_chains += 1
            if n_chains % CHAINS_BETWEEN_CHECKPOINTS == 0:
                await self._signal(queue)
                await trio.lowlevel.checkpoint()

    async def _poll(self, queue: Virtqueue) -> bool:
        """Look at a queue that was busy for a while; whether there is something to do."""
        end_ns = time.monotonic_ns() + self.poll_ns
        while self.serving and time.monotonic_ns() < end_ns:
            if self._finished[queue.index] or await queue.has_available():
                return True
            await trio.lowlevel.checkpoint()
        return False

    async def _publish_finished(self, queue: Virtqueue) -> None:
        finished = self._finished[queue.index]
        while finished and self.serving:
            chain, written, cause = finished.popleft()
            self._done_causes[queue.index] = cause
            CAUSE.set(cause)
            await queue.push(chain.head, written)

    async def _signal(self, queue: Virtqueue) -> None:
        CAUSE.set(self._done_causes[queue.index])
        self.served(queue)
        if await queue.wants_interrupt() and self.transport is not None and self.serving:
            self.transport.queue_interrupt(queue)

    async def _finish_later(self, queue: Virtqueue, chain: Chain, work: Callable[[], Awaitable[int]]) -> None:
        try:
            written = await work()
            self._finished[queue.index].append((chain, written, CAUSE.get()))
            self._kicks[queue.index].set()
        except PefboxError as error:
            self.fail(f"queue {queue.index}: {error}")
        finally:
            self._working -= 1
            self._settle()

    def _settle(self) -> None:
        """Complete a pending reset, and wake who waits for quiet."""
        if self._resetting and self._working == 0:
            self._complete_reset()
        if not self.busy:
            self._quiet.set()
            self._quiet = trio.Event()

    def _complete_reset(self) -> None:
        for queue in self.queues:
            queue.reset()
        for finished in self._finished:
            finished.clear()
        self.state = VirtioState([queue.state for queue in self.queues])
        self._resetting = False
        self.access.device_reset()
        self.was_reset()
        if self.transport is not None:
            self.transport.device_reset()
