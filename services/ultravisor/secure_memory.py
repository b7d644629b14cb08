"""Secure memory: an account in bytes for the host, and one memory file for each secure VM.

Each VM has its own descriptor, so no guest can reach another's. `memfd_secret` takes the pages out of the kernel's own
mapping; it counts against RLIMIT_MEMLOCK of every process that maps it, so it is used where the size may be locked,
and a sealed ordinary memory file otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import resource
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from protocol.errors import HostFault
from protocol.geometry import PAGE_SHIFT, gpa_of
from shared.gfn_ranges import runs_of
from shared.memfd import SealedMemory, unmap
from shared.touched import touch, touched_in_file, touched_in_locked

_SYS_MEMFD_SECRET = 447
_CAP_IPC_LOCK = 14
_RUN_PAGES = 16
"""What one thread makes before it does what else is to be done: 3 to 5 ms, of `memfd_secret`."""
_libc = ctypes.CDLL(None, use_errno=True)


class SecureAccount:
    """How much of the host's secure memory is taken. A charge is never more than what is free."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0

    @property
    def free_bytes(self) -> int:
        """What a new charge may take."""
        return self.total_bytes - self.used_bytes

    def charge(self, n_bytes: int) -> bool:
        """Take `n_bytes`; False and nothing taken when that is more than is free."""
        if n_bytes > self.free_bytes:
            return False
        self.used_bytes += n_bytes
        return True

    def credit(self, n_bytes: int) -> None:
        """Give `n_bytes` back."""
        self.used_bytes -= n_bytes


def secret_memory_limit() -> int | None:
    """How many bytes of `memfd_secret` this process may lock: 0 where the kernel has none, None without limit."""
    fd = _memfd_secret()
    if fd < 0:
        return 0
    os.close(fd)
    if _has_ipc_lock():
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def largest_secret_bytes() -> int | None:
    """The largest VM whose secure memory is `memfd_secret`: half of what this process may lock; None: any."""
    limit = secret_memory_limit()
    return None if limit is None else limit // 2


class SecureMemory:
    """The secure memory of one VM: `buffer` here, `fd` for its guest. `mode` says which kind of file it is.

    Zero-filled when made; a page that was never touched takes no memory.
    """

    def __init__(self, vm: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._file = _secret_memory(size_bytes) or SealedMemory(f"pefbox-secure-{vm}", size_bytes, others_write=True)
        self.mode = "memfd_secret" if isinstance(self._file, SecretMemory) else "memfd"
        self.fd = self._file.fd
        self.buffer = self._file.buffer
        self._n_threads = os.cpu_count() or 1
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: frozenset[int] = frozenset()
        """GFNs whose pages are being made, or are by now."""
        self._closing = False

    def touched(self) -> bytearray:
        """A byte a page: 0 for one that nobody ever touched, which holds zeros."""
        if isinstance(self._file, SecretMemory):
            return touched_in_locked(self.buffer)
        return touched_in_file(self.fd, self.size_bytes >> PAGE_SHIFT)

    def touch(self, gfns: Sequence[int]) -> None:
        """Have the kernel make these pages, which are written next; what they hold stays."""
        if not isinstance(self._file, SecretMemory):
            return
        missing = [gfn for gfn in gfns if gfn not in self._ahead]
        share = -(-len(missing) // self._n_threads)
        for _ in self._pool().map(functools.partial(touch, self.buffer), runs_of(missing, share)):
            pass

    def touch_ahead(self, gfns: Sequence[int]) -> None:
        """As `touch`, once and in the background: it goes on while they are written."""
        self._ahead = frozenset(gfns)
        runs = iter(runs_of(gfns, _RUN_PAGES))
        for _ in range(self._n_threads):
            self._pool().submit(self._make_next, runs)

    def _make_next(self, runs: Iterator[range]) -> None:
        """One run; the next one comes behind what somebody waits for."""
        run = next(runs, None)
        make = self._touch_secret if isinstance(self._file, SecretMemory) else self._allocate
        if run is None or self._closing or not make(run):
            return
        # After `close` there is no thread for it.
        with suppress(RuntimeError):
            self._pool().submit(self._make_next, runs)

    def _touch_secret(self, run: range) -> bool:
        touch(self.buffer, run)
        return True

    def _allocate(self, run: range) -> bool:
        try:
            os.posix_fallocate(self.fd, gpa_of(run.start), len(run) << PAGE_SHIFT)
        except OSError:
            # There is not so much memory: whoever writes there is told.
            return False
        return True

    def _pool(self) -> ThreadPoolExecutor:
        self._threads = self._threads or ThreadPoolExecutor(self._n_threads, "touch")
        return self._threads

    def close(self) -> None:
        """Unmap and close; views taken from `buffer` must be gone. The memory is, when the guest has dropped it too."""
        self._closing = True
        if self._threads is not None:
            self._threads.shutdown()
        self.buffer.release()
        # The system zeroes it and puts it back page by page, which nobody else's call is to wait for.
        threading.Thread(target=self._file.close, name="release", daemon=True).start()


class SecretMemory:
    """A mapped `memfd_secret`: the same interface as SealedMemory."""

    def __init__(self, size_bytes: int) -> None:
        self.fd = _memfd_secret()
        if self.fd < 0:
            raise HostFault("memfd_secret is not available")
        try:
            os.ftruncate(self.fd, size_bytes)
            self._mmap = mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            os.close(self.fd)
            raise HostFault(f"cannot map {size_bytes} bytes of secret memory: {error.strerror}") from None
        self.buffer = memoryview(self._mmap)

    def close(self) -> None:
        """Release mapping and descriptor."""
        self.buffer.release()
        unmap(self._mmap)
        os.close(self.fd)


def _secret_memory(size_bytes: int) -> SecretMemory | None:
    largest = largest_secret_bytes()
    if largest is not None and size_bytes > largest:
        return None
    try:
        return SecretMemory(size_bytes)
    except HostFault:
        return None


def _memfd_secret() -> int:
    fd: int = _libc.syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC)
    return fd


def _has_ipc_lock() -> bool:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False
