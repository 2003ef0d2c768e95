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

PROBE_S = 3.0  # Ray itself retries an address that nothing answers for minutes


def _started_here() -> str:
    """The address that `ray start` noted on this machine, where ray.init() looks for it too; "" if nothing answers there."""
    note = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        address = note.read_text().strip()
        _probe(address)
    except (OSError, UserError):
        return ""  # the note may outlive its cluster
    return address


def _probe(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"RAY_ADDRESS is {address!r}, which is not host:port; set it to the head node's address or unset it"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address!r} within {PROBE_S:g} s ({error}); start one with "
            f"`ray start --head --num-cpus 8` or unset RAY_ADDRESS"
        ) from error


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


def ends_with_process() -> bool:
    """Whether the connected cluster was started by `connect`, so that it ends with this process, and all that runs on it."""
    return _ends_with_process


def connect(*, num_cpus: int, num_gpus: int = 0, need: str) -> None:
    """Connects to Ray once per process: to $RAY_ADDRESS, else a cluster running on this machine, else a new local one.

    num_cpus, num_gpus: what the job needs at once; need: the same in words, for the message.
    Raises UserError at once if nothing answers at the address or the cluster is too small.
    """
    if not ray.is_initialized():
        _quiet()
        address = os.environ.get("RAY_ADDRESS") or _ADDRESS
        if address == "local":
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


def _init(**options: Any) -> None:
    try:
        # What workers log stays in Ray's session folder: thousands of lines that bury ours. Errors come as exceptions.
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"cannot connect to the Ray cluster at {options['address']!r}: {str(error).splitlines()[0]}; check RAY_ADDRESS and that "
            f"RAY_AUTH_MODE is the same here as where the cluster was started"
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
