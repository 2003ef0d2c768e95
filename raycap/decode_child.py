"""The child of a DecodePool: reads encoded images from its standard input, writes prepared pixels to its standard output.

Owns the protocol and the limits of the process; loads what raycap.image needs only, and that under the limits. Nothing that is
written is a pickle: the child handles bytes of strangers, so the parent believes it nothing but numbers it has checked.

    parent -> child   REQUEST (fast, bilinear, crop, size, shorter_side, num_bytes), then the encoded image
    child -> parent   READY once; for each request BEGUN when it has been read, so that no image is blamed for the end of a
                      child that never saw it, then RESPONSE (code, width, height, num_bytes) and what follows: uint8
                      (3, size, size) if code is OK, else the message of the error KINDS[code], UTF-8
"""

import ctypes
import os
import resource
import signal
import struct
import sys

from raycap.errors import ErrorKind, ImageError
from raycap.schema import ImageSpec

REQUEST = struct.Struct("<???III")
RESPONSE = struct.Struct("<BIII")
READY = b"raycap decoder 2"
BEGUN = b"+"
OK = 255
KINDS = tuple(ErrorKind)
MAX_MESSAGE_BYTES = 2000
MAX_SIZE = 8192  # of a side, in pixels: what a parent may ask for

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MAX_STDERR_BYTES = 65536


def main(memory_bytes: int, cpu_s: int) -> None:
    """Answer requests until standard input ends. memory_bytes: address space. cpu_s: CPU seconds of one image."""
    _limit(memory_bytes)
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not look like an answer
    from raycap.image import keep_freed_memory, prepare_bytes

    keep_freed_memory()
    _write(answers, READY)
    with open(0, "rb", buffering=65536) as requests:
        while len(header := requests.read(REQUEST.size)) == REQUEST.size:
            fast, bilinear, crop, size, shorter_side, num_bytes = REQUEST.unpack(header)
            _limit_cpu(cpu_s)
            try:
                data = requests.read(num_bytes)
            except MemoryError:
                while num_bytes > 0:  # the parent listens only when it has sent everything
                    num_bytes -= len(requests.read(min(num_bytes, 65536))) or num_bytes
                _write(answers, BEGUN, RESPONSE.pack(KINDS.index(ErrorKind.DECODER_MEMORY), 0, 0, 0))
                return
            if len(data) < num_bytes:
                return  # the parent is gone
            _write(answers, BEGUN)
            try:
                spec = ImageSpec(
                    size=size,
                    decode="fast" if fast else "exact",
                    resample="bilinear" if bilinear else "bicubic",
                    fit="crop" if crop else "squash",
                    shorter_side=shorter_side,
                )
                prepared = prepare_bytes(data, spec)
            except ImageError as error:
                message = str(error).encode(errors="replace")[:MAX_MESSAGE_BYTES]
                _write(answers, RESPONSE.pack(KINDS.index(error.kind), 0, 0, len(message)), message)
                if error.kind == ErrorKind.DECODER_MEMORY:
                    return  # nobody knows what a failed allocation left behind
            else:
                pixels = prepared.pixels.data.cast("B")
                _write(answers, RESPONSE.pack(OK, prepared.width, prepared.height, len(pixels)), pixels)


def _limit(memory_bytes: int) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, _MAX_STDERR_BYTES)
    _lower(resource.RLIMIT_AS, memory_bytes)
    if sys.platform == "linux":  # elsewhere the end of standard input says that the parent is gone
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _lower(limit: int, value: int) -> None:
    _, most = resource.getrlimit(limit)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(limit, (value, value))


def _limit_cpu(cpu_s: int) -> None:
    """Let the process live for cpu_s more seconds of CPU: the line behind the parent's clock."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    value = int(used.ru_utime + used.ru_stime) + cpu_s + 1
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _write(fd: int, *parts: "bytes | memoryview") -> None:
    rest = [memoryview(part) for part in parts]
    while rest:
        written = os.writev(fd, rest)
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][written:]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
