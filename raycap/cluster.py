"""The Ray cluster a job runs on: find or start it, check that it can hold the job, and make paths absolute.

Owns no pipeline. Ray's CPUs are logical: a local start gives max(cores, what the job needs).
"""

import logging
import math
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from raycap.errors import UserError
from raycap.storage import is_url

PROBE_S = 3.0  # Ray itself retries an address that nothing answers, or another server, for minutes
_SETTINGS = b"\x04"  # the type of the frame with which HTTP/2 begins, RFC 9113, 3.4
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"
_SESSION_BYTES = 32 * 2**20  # of logs, for a start: without them Ray waits for half a minute, and does not say for what


def _started_here() -> str:
    """The address that `ray start` noted on this machine, where ray.init() looks for it too; "" if nothing answers there."""
    try:
        address = (_session_root() / "ray_current_cluster").read_text().strip()
        _probe(address)
    except (OSError, UserError):
        return ""  # the note may outlive its cluster
    return address


def _session_root() -> Path:
    """The folder of this machine below which Ray keeps the sockets and logs of a session, as Ray itself chooses it."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def _probe(address: str) -> None:
    """Raises UserError unless a gRPC server answers, as Ray's are: it greets in HTTP/2 at once, whatever its tokens are."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"RAY_ADDRESS is {address!r}, which is not host:port; set it to the head node's address or unset it"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S) as connection:
            connection.sendall(_HTTP2_GREETING)
            greeting = connection.recv(4)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address!r} within {PROBE_S:g} s ({error}); start one with "
            f"`ray start --head --num-cpus 8` or unset RAY_ADDRESS"
        ) from error
    if greeting[3:] != _SETTINGS and os.environ.get("RAY_USE_TLS") != "1":  # under TLS it says nothing to strangers
        raise UserError(
            f"what answers at RAY_ADDRESS={address!r} is no Ray cluster; give the address that `ray start --head` printed, or unset "
            f"RAY_ADDRESS"
        )


def _choose_address() -> str:
    """Where a process that has not loaded Ray yet will connect to; "local" stands for a new cluster.

    A new cluster switches token authentication on. Left alone it writes its token to the home folder, which then locks
    later clusters of the user; a token in the environment stays with this process and its children. Ray reads the
    environment when it is imported, so this comes first.
    """
    address = os.environ.get("RAY_ADDRESS") or _started_here() or "local"
    if address == "local" and not os.environ.get("RAY_AUTH_MODE"):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return address


_ADDRESS = os.environ.get("RAY_ADDRESS", "local") if "ray" in sys.modules else _choose_address()

import ray  # noqa: E402  # see _choose_address


def in_submitted_job() -> bool:
    """Whether this process is the entry point of a `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def resolve_root(value: str, flag: str) -> str:
    """`value` as an absolute path or URL. Relative paths mean the shell's folder, which a submitted job does not have.

    Raises UserError for a relative path inside a submitted job.
    """
    if not value or is_url(value):
        return value.rstrip("/")
    path = Path(value).expanduser()
    if not path.is_absolute() and in_submitted_job():
        raise UserError(
            f"relative path {value!r} for {flag} in a submitted Ray job, whose folder {str(Path.cwd())!r} may be a temporary "
            f"package; give an absolute path or an s3:// URL"
        )
    return str(path.absolute())


_ends_with_process = False
_lacks_cpus = False  # when it connected


def ends_with_process() -> bool:
    """Whether the connected cluster was started by `connect`, so that it ends with this process, and all that runs on it."""
    return _ends_with_process


def connect(*, num_cpus: int, num_gpus: int = 0, need: str) -> None:
    """Connects to Ray once per process: to $RAY_ADDRESS, else a cluster running on this machine, else a new local one.

    num_cpus, num_gpus: what the job needs at once; need: the same in words, for the message.
    Raises UserError at once if nothing answers at the address or the cluster is too small.
    """
    is_first = not ray.is_initialized()
    if is_first:
        _quiet()
        address = os.environ.get("RAY_ADDRESS") or _ADDRESS
        if address == "local":
            _check_session_root()
            # The dashboard answers the state queries of Ray Train's own clean-up, which complains every second without it.
            _init(address="local", num_cpus=max(os.cpu_count() or 1, num_cpus), include_dashboard=True)
            global _ends_with_process
            _ends_with_process = True
        else:
            if address != "auto":
                _probe(address)
            _init(address=address)
        _stop_in_order()
    _preflight(num_cpus, num_gpus, need)
    if is_first:
        _say_what_is_in_use(num_cpus, need)


def use_gpus(device: str, wanted: int, flag: str, num_gpus: float = 1.0) -> bool:
    """Whether `wanted` processes run on GPUs, num_gpus each. Raises UserError for auto on a cluster with some, but too few."""
    have, need = int(_resources().get("GPU", 0)), gpus_for(wanted, num_gpus)
    if device == "auto" and 0 < have < need:
        raise UserError(
            f"{flag} {wanted} needs {need} GPUs but the Ray cluster has {have}; lower {flag}, or give --device cpu to leave them unused"
        )
    return device == "cuda" or (device == "auto" and have >= need)


def gpus_for(processes: int, num_gpus: float) -> int:
    """GPUs that so many processes fill, num_gpus each; a GPU is shared by as many as fit on it whole."""
    if num_gpus < 1:
        return math.ceil(processes / int(1 / num_gpus))
    return processes * math.ceil(num_gpus)


def num_nodes() -> int:
    """Nodes of the connected cluster that are alive."""
    return len(_nodes())


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _quiet() -> None:
    """Ray's own progress and start-up chatter off, unless the user asked for it; ours replaces it."""
    for name, value in {
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # report() waits for it: 2 s by default
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)


def _check_session_root() -> None:
    """Raises UserError if a session of Ray cannot be kept on this machine."""
    root = _session_root()
    try:
        if not root.is_absolute():
            raise OSError("not an absolute path")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            os.posix_fallocate(file.fileno(), 0, _SESSION_BYTES)
    except OSError as error:
        raise UserError(
            f"cannot start Ray, which keeps its sockets and logs in {str(root)!r}: {error.strerror or error}; free space there, or set "
            f"RAY_TMPDIR to a folder that can be written"
        ) from error


def _init(**options: Any) -> None:
    try:
        # What workers log stays in Ray's session folder: thousands of lines that bury ours. Errors come as exceptions.
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # Ray raises whatever stood in its way, a bare Exception among others
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if options["address"] == "local":
            raise UserError(
                f"cannot start Ray on this machine: {reason}; see the newest session's logs in {str(_session_root())!r}, `ulimit -n` and "
                f"the memory that is free, or set RAY_TMPDIR to a short absolute path with space"
            ) from error
        raise UserError(
            f"cannot connect to the Ray cluster at {options['address']!r}: {reason}; check RAY_ADDRESS and that RAY_AUTH_MODE is the "
            f"same here as where the cluster was started"
        ) from error


def is_alive() -> bool:
    """Whether the control store of the connected cluster still answers."""
    try:
        _probe(ray.get_runtime_context().gcs_address)
    except UserError:
        return False
    return True


def _stop_in_order() -> None:
    """SIGTERM, which `ray job stop` sends, stops a job as Ctrl-C does. Ray's own handler prints a stack and aborts."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's background jobs inherit it
        signal.default_int_handler(number, frame)
    signal.raise_signal(signal.SIGINT)


def _preflight(num_cpus: int, num_gpus: int, need: str) -> None:
    have = _resources()
    for name, wanted in (("CPU", num_cpus), ("GPU", num_gpus)):
        if wanted > have.get(name, 0):
            more = (
                f"ask for less or start Ray with more logical CPUs, for example `ray start --head --num-cpus {max(8, num_cpus)}`"
                if name == "CPU"
                else "ask for less, or give --device cpu"
            )
            raise UserError(
                f"the job needs {wanted} {name}s at once ({need}) but the Ray cluster has {have.get(name, 0):g}; {more}"
            )


def _free_cpus() -> float:
    """Of the connected cluster, now."""
    free: float = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
    return free


def _say_what_is_in_use(num_cpus: int, need: str) -> None:
    """Prints a line if a job of num_cpus has to wait for others: on a cluster of its own it never has."""
    global _lacks_cpus
    _lacks_cpus = not _ends_with_process and _free_cpus() < num_cpus
    if _lacks_cpus:
        print(
            f"the job needs {num_cpus} CPUs at once ({need}), and {_free_cpus():g} of {_resources()['CPU']:g} are free now; it may wait "
            f"until other work on the Ray cluster ends",
            flush=True,
        )


def waits_for() -> str:
    """What a job waits for that has no result yet. A cluster does not say who uses its CPUs, so the words are those of the start."""
    if _lacks_cpus and (free := _free_cpus()) < 1:
        return f"free CPUs ({free:g} of {_resources()['CPU']:g})"
    return "Ray's processes and the first unit"


def check_shared(root: str) -> None:
    """Raises UserError if `root` is a local path that some node of the cluster does not see."""
    if is_url(root) or num_nodes() == 1:
        return
    Path(root).mkdir(parents=True, exist_ok=True)
    blind = nodes_without(root)
    if blind:
        raise UserError(
            f"--out {root!r} is a local folder that {len(blind)} of {num_nodes()} nodes do not see ({', '.join(blind[:3])}); give a "
            f"folder on shared storage or an s3:// URL"
        )


def nodes_without(path: str) -> list[str]:
    """Addresses of the nodes on which `path` does not exist."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0)
    def sees() -> bool:
        return Path(path).exists()

    nodes = _nodes()
    answers = ray.get(
        [
            sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote()
            for n in nodes
        ]
    )
    return [node["NodeManagerAddress"] for node, seen in zip(nodes, answers, strict=True) if not seen]
