"""Images prepared in child processes with limits: what a file does to its decoder, it does to a child.

Owns the children: their start, their time, their end, and who is to blame. Not the protocol and not the limits a child
sets itself (raycap/decode_child.py), nor the pixels (raycap/image.py).

The life of an image: `prepare_all` puts it into the pool's queue; the next free worker, a thread with one child, writes it
to the child, waits for the answer until the time is over, checks it and puts it in its place. A child that dies, hangs or
has no memory left costs the image it was working on; the next image of this worker starts a new child. An image that a
child did not live to read goes to a new one.
"""

import contextlib
import fcntl
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import cykooz_resizer
import numpy as np
import PIL
import simplejpeg

from raycap.decode_child import BEGUN, KINDS, MAX_MESSAGE_BYTES, MAX_SIZE, OK, READY, REQUEST, RESPONSE
from raycap.errors import ErrorKind, ImageError, RaycapError
from raycap.image import MAX_BYTES, MAX_PIXELS, Prepared, check_bytes
from raycap.schema import ImageSpec

_START_S = 60.0  # a child starts in 0.2 s; a machine under load takes longer
_PIPE_BYTES = 2**20  # Linux' limit without privileges; 384 x 384 pixels pass in one piece
_STARTS = 3  # so often a child may die at its start, one after the other


class DecodePool:
    """Prepares images in `num_workers` child processes, exactly as prepare_bytes does in this one.

    timeout_s: of one image, by the clock. memory_bytes: address space of a child, about 120 MB of which it needs for
    itself; 1 GiB holds the largest image of MAX_PIXELS (a WebP takes 0.93 GiB). With less, a large image may be called
    corrupt: not every decoder tells the lack of memory from damage. max_bytes: of an encoded image, at most MAX_BYTES.

    Children start when they are first needed. They see neither this process's environment nor its open files, and end
    with `close` or with this process, whatever ends it; a pool that is dropped without `close` keeps them until then.
    After a fork, the new process starts children of its own.
    """

    def __init__(
        self,
        num_workers: int = 1,
        *,
        timeout_s: float = 10.0,
        memory_bytes: int = 2**30,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if num_workers < 1 or not timeout_s > 0 or memory_bytes < 1 or not 0 < max_bytes <= MAX_BYTES:
            raise ValueError(
                f"a decode pool needs num_workers >= 1, timeout_s > 0, memory_bytes >= 1 and 1 <= max_bytes <= {MAX_BYTES}, "
                f"got {num_workers}, {timeout_s}, {memory_bytes} and {max_bytes}"
            )
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes
        self.max_bytes = max_bytes
        self._closed = False
        self._changed = threading.Condition(threading.Lock())
        self._jobs: deque[_Job] = deque()
        self._threads: list[threading.Thread] = []
        self._children: set[_Child] = set()
        _POOLS.add(self)

    def prepare(self, data: bytes, spec: ImageSpec) -> Prepared:
        """The image in data, prepared in a child. Blocks; may be called from many threads.

        Raises ImageError, and RaycapError if children die at their start or the pool is closed.
        """
        result = self.prepare_all([data], spec)[0]
        if isinstance(result, ImageError):
            raise result
        return result

    def prepare_all(self, images: Sequence[bytes], spec: ImageSpec) -> list[Prepared | ImageError]:
        """What became of each image, in order; all workers share them. Raises RaycapError as prepare does."""
        if not 0 < spec.size <= MAX_SIZE:
            raise ValueError(f"a decoder prepares images of 1 to {MAX_SIZE} pixels a side, not {spec.size}")
        call = _Call(len(images))
        jobs = []
        for place, data in enumerate(images):
            try:
                check_bytes(data, self.max_bytes)
                jobs.append(_Job(call, place, data, spec))
            except ImageError as error:
                call.put(place, error)
        self._enqueue(jobs)
        try:
            return call.wait()
        except BaseException:
            with self._changed:  # nobody waits for the rest
                self._jobs = deque(job for job in self._jobs if job.call is not call)
            raise

    def close(self) -> None:
        """End all children and wait until they have ended. Calls that wait raise RaycapError."""
        with self._changed:
            self._closed = True
            jobs, self._jobs = self._jobs, deque()
            threads, self._threads = self._threads, []
            for child in self._children:
                child.kill()
            self._changed.notify_all()
        for job in jobs:
            job.call.fail(_closed())
        for thread in threads:
            thread.join()

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _after_fork(self) -> None:
        """In the process that was forked: no threads and no children yet; those there are belong to the other process."""
        for child in self._children:
            child.disown()
        self._changed = threading.Condition(threading.Lock())
        self._jobs, self._threads, self._children = deque(), [], set()

    def _enqueue(self, jobs: "list[_Job]") -> None:
        with self._changed:
            if self._closed:
                raise _closed()
            if jobs and not self._threads:
                # A child dies with the thread that started it (prctl), so threads that live as long as the pool do it.
                self._threads = [
                    threading.Thread(target=self._work, name=f"decode-{n}", daemon=True)
                    for n in range(self.num_workers)
                ]
                for thread in self._threads:
                    thread.start()
            self._jobs.extend(jobs)
            self._changed.notify(len(jobs))

    def _work(self) -> None:
        """One worker: a thread and its child."""
        child: _Child | None = None
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    break
                job = self._jobs.popleft()
            try:
                if child is None or not child.alive():
                    child = self._start(child)
                job.call.put(job.place, child.prepare(job.data, job.spec, self.timeout_s))
            except ImageError as error:
                if self._ended():  # then it was close() that killed the child
                    job.call.fail(_closed())
                else:
                    job.call.put(job.place, error)
            except _DiedBefore as error:
                job.deaths += 1
                with self._changed:
                    if again := not self._closed and job.deaths < _STARTS:
                        self._jobs.appendleft(job)
                if not again:
                    job.call.fail(_closed() if self._ended() else RaycapError(str(error)))
            except BaseException as error:  # whoever waits must not wait for ever
                self._drop(child)
                child = None
                job.call.fail(_closed() if self._ended() else error)
        self._drop(child)

    def _start(self, dead: "_Child | None") -> "_Child":
        self._drop(dead)
        for attempt in range(_STARTS):
            child = _Child(self.memory_bytes, self.timeout_s)
            with self._changed:
                self._children.add(child)
                if self._closed:
                    child.kill()
            try:
                child.wait_until_ready()
                return child
            except RaycapError:
                self._drop(child)
                if self._ended() or attempt == _STARTS - 1:
                    raise
        raise AssertionError

    def _ended(self) -> bool:
        return self._closed

    def _drop(self, child: "_Child | None") -> None:
        if child is not None:
            with self._changed:
                self._children.discard(child)
            child.end()


_POOLS: "weakref.WeakSet[DecodePool]" = weakref.WeakSet()


def _renew_pools() -> None:
    for pool in _POOLS:
        pool._after_fork()


os.register_at_fork(after_in_child=_renew_pools)


def _closed() -> RaycapError:
    return RaycapError("the decode pool is closed, so it prepares no image; make a new one")


class _Call:
    """The results of one call of prepare_all as they come in."""

    def __init__(self, num_images: int) -> None:
        self._results: list[Prepared | ImageError | None] = [None] * num_images
        self._missing = num_images
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not num_images:
            self._done.set()

    def put(self, place: int, result: Prepared | ImageError) -> None:
        with self._lock:
            self._results[place] = result
            self._missing -= 1
            if not self._missing:
                self._done.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> list[Prepared | ImageError]:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return [result for result in self._results if result is not None]


class _Job:
    """One image of a call."""

    __slots__ = ("call", "data", "deaths", "place", "spec")

    def __init__(self, call: _Call, place: int, data: bytes, spec: ImageSpec) -> None:
        self.call = call
        self.place = place
        self.data = data
        self.spec = spec
        self.deaths = 0  # of children that had not read it


class _Died(Exception):
    """The pipe of the child is closed at its end."""


class _DiedBefore(Exception):
    """The child died, but not of this image: it had not read it yet."""


class _Child:
    """One process and the pipes to it. Used by one thread; `kill` by any."""

    def __init__(self, memory_bytes: int, timeout_s: float) -> None:
        self.memory_bytes = memory_bytes
        arguments = [str(memory_bytes), str(math.ceil(timeout_s))]
        try:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed by end()
            self.process = subprocess.Popen(
                # -S: no site packages but those named; -P: nothing from the working folder; -s, -B: no user's folder, no .pyc
                [sys.executable, "-S", "-P", "-s", "-B", "-m", "raycap.decode_child", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                close_fds=True,
                env=_environment(),
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
            )
        except OSError as error:
            raise RaycapError(
                f"cannot start the decoder process {sys.executable!r}: {error}; see ulimit -u, ulimit -n and TMPDIR"
            ) from error
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests = self.process.stdin.fileno()
        self._answers = self.process.stdout.fileno()
        for fd in (self._requests, self._answers):
            os.set_blocking(fd, False)
            if sys.platform == "linux":
                with contextlib.suppress(OSError):  # beyond the user's share of pipe memory they stay small
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> None:
        """The process has ended and been waited for, its pipes are closed."""
        self.process.kill()
        self.process.wait()
        self.disown()

    def disown(self) -> None:
        """Close this process's ends of the pipes and leave the child to whoever started it."""
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            assert stream is not None
            stream.close()
        self.process.returncode = self.process.returncode or 0  # nothing left to wait for

    def wait_until_ready(self) -> None:
        """Raises RaycapError if the child ends, or says something else, or nothing for a minute."""
        answer = bytearray(len(READY))
        try:
            self._receive(memoryview(answer), time.monotonic() + _START_S)
        except (_Died, TimeoutError):
            self.process.kill()
            ending = _ending(self.process.wait())
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise RaycapError(
                f"the decoder process {ending} at its start with memory_bytes={self.memory_bytes}"
                f"{f' ({said})' if said else ''}; give the decode pool more memory, or see that "
                f"{sys.executable!r} imports raycap.image"
            ) from None
        if answer != READY:
            self.process.kill()
            raise RaycapError(f"the decoder process is of another version of raycap: it said {bytes(answer)!r}")

    def prepare(self, data: bytes, spec: ImageSpec, timeout_s: float) -> Prepared:
        """Raises ImageError, after which the child is not alive if it was its own end, and _DiedBefore."""
        deadline = time.monotonic() + timeout_s
        begun = bytearray(1)
        try:
            request = REQUEST.pack(
                spec.decode == "fast",
                spec.resample == "bilinear",
                spec.fit == "crop",
                spec.size,
                spec.shorter_side,
                len(data),
            )
            self._send([memoryview(request), memoryview(data)], deadline)
            self._receive(memoryview(begun), deadline)
            header = bytearray(RESPONSE.size)
            self._receive(memoryview(header), deadline)
            code, width, height, num_bytes = RESPONSE.unpack(header)
            if begun != BEGUN:
                raise self._nonsense()
            if code == OK:
                pixels = np.empty((3, spec.size, spec.size), np.uint8)
                if num_bytes != pixels.nbytes or not 0 < width * height <= MAX_PIXELS:
                    raise self._nonsense()
                self._receive(pixels.data.cast("B"), deadline)
                return Prepared(pixels, width, height)
            if code >= len(KINDS) or num_bytes > MAX_MESSAGE_BYTES:
                raise self._nonsense()
            message = bytearray(num_bytes)
            self._receive(memoryview(message), deadline)
        except TimeoutError:
            self.kill()
            self.process.wait()
            raise _timed_out(timeout_s) from None
        except _Died:
            self.kill()  # it may have closed its pipe and live
            code = self.process.wait()
            if begun != BEGUN:
                raise _DiedBefore(
                    f"the decoder process {_ending(code)} before it read an image, {_STARTS} times; see what ends it"
                ) from None
            if code == -signal.SIGXCPU:
                raise _timed_out(timeout_s) from None
            raise ImageError(
                ErrorKind.DECODER_CRASH, f"the process that decoded the image {_ending(code)}; the image is unusable"
            ) from None
        kind = KINDS[code]
        if kind == ErrorKind.DECODER_MEMORY:
            self.kill()
            self.process.wait()
            raise ImageError(
                kind, f"the image cannot be decoded within the {self.memory_bytes} bytes a decoder may use"
            )
        raise ImageError(kind, message.decode(errors="replace"))

    def _nonsense(self) -> ImageError:
        self.kill()
        self.process.wait()
        return ImageError(ErrorKind.DECODER_CRASH, "the process that decoded the image gave an answer that is none")

    def _send(self, parts: list[memoryview], deadline: float) -> None:
        while parts:
            try:
                written = os.writev(self._requests, parts)
            except BlockingIOError:
                self._wait(self._requests, select.POLLOUT, deadline)
                continue
            except BrokenPipeError:
                raise _Died from None
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][written:]

    def _receive(self, target: memoryview, deadline: float) -> None:
        """Fill target. Raises _Died, TimeoutError."""
        while target:
            try:
                received = os.readv(self._answers, [target])
            except BlockingIOError:
                self._wait(self._answers, select.POLLIN, deadline)
                continue
            if not received:
                raise _Died
            target = target[received:]

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        rest_s = deadline - time.monotonic()
        if rest_s <= 0 or not poll.poll(math.ceil(rest_s * 1000)):
            raise TimeoutError


def _environment() -> dict[str, str]:
    """What a child needs to import raycap.image, and nothing else: no keys, no tokens, no proxies."""
    packages = (Path(__file__), *(Path(str(m.__file__)) for m in (np, PIL, simplejpeg, cykooz_resizer)))
    folders = dict.fromkeys(str(file.absolute().parents[1]) for file in packages)
    kept = {name: os.environ[name] for name in ("PYTHONHOME", "LD_LIBRARY_PATH") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(folders),
        "OPENBLAS_NUM_THREADS": "1",  # each thread of it would take address space
        "OMP_NUM_THREADS": "1",
    }


def _ending(returncode: int) -> str:
    if returncode < 0:
        try:
            return f"died of {signal.Signals(-returncode).name}"
        except ValueError:
            return f"died of signal {-returncode}"
    return f"ended with exit code {returncode}"


def _timed_out(timeout_s: float) -> ImageError:
    return ImageError(ErrorKind.DECODER_TIMEOUT, f"the image was not decoded within {timeout_s} s")
