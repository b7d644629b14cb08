"""What a debugger may do to a processor, whoever it works for. Everything here runs in the processor's thread.

Two may want it: the guest's owner, and the host, which has a normal VM as QEMU has one under KVM. There is one set of
points, as there is one set of debug registers, so one of them has the processor at a time; the host's ends with the
first instruction of a secure VM. A processor that a debugger has stopped serves all messages; its time stands still.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from protocol.errors import GuestFault
from protocol.geometry import PAGE_SHIFT
from protocol.messages import MAX_DEBUG_POINTS, Access
from services.guest.address_space import AddressSpace
from services.guest.debug_engine import EngineDebug
from services.guest.engine import Engine
from services.guest.exits import Exit
from services.guest.run_state import Hold
from services.guest.vm_memory import GuestVmMemory
from services.runtime.gdb.target import NO_MEMORY, SMALLEST_PAGE_BYTES, Point, Refused, Stop, StopKind
from shared.gdb_registers import Description, Values


class User(Enum):
    """Who debugs, by the hold that stops the processor for it."""

    OWNER = Hold.OWNER
    HOST = Hold.HYPERVISOR


class Processor(Protocol):
    """What the debugger needs of the processor."""

    def hold(self, hold: Hold) -> None:
        """Run no more, before the next slice begins."""

    def let_go(self, hold: Hold) -> None:
        """Run, unless something else holds it."""

    def follow(self) -> None:
        """Look again at what comes before the engine."""

    @property
    def stands(self) -> bool:
        """Whether its engine is left, with registers that are whole: a call may be open."""

    @property
    def is_free(self) -> bool:
        """Whether no call is open, so that another one can be made."""

    @property
    def is_frozen(self) -> bool:
        """Whether its state is on its way to another place, or may be."""


class Debugger:
    """The debugging side of one processor."""

    def __init__(
        self, engine: Engine, memory: GuestVmMemory, processor: Processor, tell_host: Callable[[Stop], None]
    ) -> None:
        self.steps = False
        """Whether the engine is to do a step in the place of a slice."""
        self.tell_host = tell_host
        self._debugged = engine
        self._memory = memory
        self._processor = processor
        self._user: User | None = None
        self._told: Callable[[Stop], None] = _nobody
        self._passing = False
        """Whether the step under way only leads past a point."""
        self._due: Stop | None = None
        """Told as soon as the processor stands."""
        self._crash: Stop | None = None
        self._is_halted = False
        """Whether the user was told of a stop, and has not let the processor go since."""

    @property
    def _engine(self) -> EngineDebug:
        return self._debugged.debug

    @property
    def _space(self) -> AddressSpace:
        assert self._memory.space is not None
        return self._memory.space

    # -- who debugs -------------------------------------------------------------------------------------------

    def take(self, user: User, told: Callable[[Stop], None]) -> None:
        """`user` debugs from now on, and `told` hears of every stop; raises Refused while another one does."""
        if self._user not in (None, user):
            raise Refused("the processor has a debugger already")
        self._user, self._told = user, told

    def release(self, user: User) -> None:
        """`user` debugs no more, and the processor is not stopped for it."""
        if self._user is user:
            self.give_up(user)
            self._processor.let_go(user.value)

    def give_up(self, user: User) -> None:
        """As `release`, but a processor that is stopped stays so."""
        if self._user is not user:
            return
        self._engine.set_points(frozenset())
        self._engine.forget_step()
        self._user, self._told, self._due = None, _nobody, None
        self.steps = self._passing = self._is_halted = False
        self._processor.follow()

    def begins(self, *, secure: bool) -> None:
        """The processor has begun anew, and what it runs is `secure`, of which the host sees nothing."""
        self._crash = None
        if secure:
            self.give_up(User.HOST)
        if self._is_halted and self._user is User.OWNER:
            # Nothing is as the owner was told any more.
            self._tell(Stop(StopKind.INTERRUPT))

    # -- looking and changing ---------------------------------------------------------------------------------

    @property
    def description(self) -> Description:
        """The registers that there are."""
        return self._engine.description

    def values(self) -> Values:
        """All registers."""
        return self._engine.values()

    def set_register(self, number: int, value: int) -> None:
        """Change one; raises Refused."""
        self._need_unfrozen()
        self._engine.set_register(number, value)

    def translate(self, address: int) -> int:
        """The guest physical address behind an effective one; raises Refused."""
        return self._engine.translate(address)

    def read(self, address: int, n_bytes: int) -> bytes:
        """Memory at an effective address, up to the end of its page; raises Refused."""
        gpa, n_bytes = self._place(address, n_bytes)
        self._fetch_page(gpa, Access.READ)
        return self._space.load(gpa, n_bytes)

    def write(self, address: int, data: bytes) -> None:
        """Change memory at an effective address; raises Refused."""
        self._need_unfrozen()
        while data:
            gpa, n_bytes = self._place(address, len(data))
            self._fetch_page(gpa, Access.WRITE)
            self._space.store(gpa, data[:n_bytes])
            address, data = address + n_bytes, data[n_bytes:]
        self._engine.memory_changed()

    def _need_unfrozen(self) -> None:
        if self._processor.is_frozen:
            raise Refused("the VM is about to move or to be saved, as it was a moment ago: nothing can be changed now")

    def _place(self, address: int, n_bytes: int) -> tuple[int, int]:
        n_bytes = min(n_bytes, SMALLEST_PAGE_BYTES - address % SMALLEST_PAGE_BYTES)
        gpa = self._engine.translate(address)
        if not 0 <= gpa <= self._space.size_bytes - n_bytes:
            raise Refused(f"{address:#x} is no memory of {self._space.size_bytes:#x} bytes", NO_MEMORY)
        return gpa, n_bytes

    def _fetch_page(self, gpa: int, access: Access) -> None:
        """Have the map give a page as if the processor had touched it; raises Refused."""
        if self._space.gives(gpa, access):
            return
        if not self._processor.is_free:
            raise Refused(
                f"the page of {gpa:#x} is not here, and the processor is in a call: step out of it", NO_MEMORY
            )
        try:
            self._space.resolve(gpa >> PAGE_SHIFT, access)
        except GuestFault as fault:
            raise Refused(str(fault), NO_MEMORY) from None

    def monitor(self, words: list[str]) -> str:
        """A command of the engine's own, some of which change registers; raises Refused."""
        self._need_unfrozen()
        return self._engine.monitor(words)

    def set_points(self, user: User, points: frozenset[Point]) -> None:
        """Stop at these for `user`; raises Refused, also for one who does not debug: nobody would let the processor go
        on from there. Raises Unsupported."""
        if self._user is not user:
            raise Refused("whoever sets breakpoints and watchpoints has to debug the processor")
        if len(points) > MAX_DEBUG_POINTS:
            raise Refused(f"more than {MAX_DEBUG_POINTS} breakpoints and watchpoints")
        self._engine.set_points(points)

    # -- running ----------------------------------------------------------------------------------------------

    def halt(self, user: User) -> None:
        """Stand still, and tell it when that is so."""
        if self._user is not user:
            return
        self._processor.hold(user.value)
        self.steps = self._passing = False
        self._due = self._crash or Stop(StopKind.INTERRUPT)
        if self._processor.stands:
            self.standing()

    def go(self, user: User, *, step: bool) -> None:
        """Run, or do a step; over a point where the processor stands already."""
        if self._user is not user:
            return
        self.arm(step=step)
        if self._crash is not None:
            self.halt(user)
            return
        self._processor.let_go(user.value)

    def arm(self, *, step: bool) -> None:
        """As `go`, as soon as the processor is let go by somebody else."""
        self._due, self._is_halted = None, False
        if not step:
            self._engine.forget_step()
        self._passing = not step and self._engine.passes
        self.steps = step or self._passing

    def step(self) -> Exit:
        """For the processor: what it runs in the place of a slice."""
        return self._engine.step()

    def trapped(self) -> None:
        """For the processor: the engine ended with Pause.TRAP."""
        stop = self._engine.stop
        if self._user is None:
            return
        if self._passing and stop.watch is None:
            self.steps = self._passing = False
            self._processor.follow()
            return
        self._stopped(stop)

    def crashed(self, reason: str) -> None:
        """For the processor: the kernel cannot go on."""
        self._crash = Stop(StopKind.CRASHED, text=f"guest crashed: {reason}")
        if self._user is not None:
            self._stopped(self._crash)

    def standing(self) -> None:
        """For the processor: it stands still now."""
        due, self._due = self._due, None
        if due is not None:
            self._tell(due)

    def _stopped(self, stop: Stop) -> None:
        assert self._user is not None
        self.steps = self._passing = False
        self._processor.hold(self._user.value)
        self._due = None
        self._tell(stop)

    def _tell(self, stop: Stop) -> None:
        self._is_halted = True
        self._told(stop)


def _nobody(_stop: Stop) -> None:
    """Nobody debugs."""
