"""Start and stop the endpoint: what is checked before Ray, Serve's own options, readiness, and the end by signal."""

import logging
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import ray
from ray import serve as ray_serve

from raycap import cluster
from raycap.checkpoint import open_spec
from raycap.config import ServeConfig
from raycap.errors import RaycapError, UserError
from raycap.scorer import chosen_by, scorer_fingerprint
from raycap.serving.app import (
    LOOPBACK,
    assemble,
    check_token,
    checkpoint_of,
    decode_settings,
    limits_of,
    num_cpus,
    uses_gpus,
)
from raycap.serving.door import front_environment, token_digest

APP = "raycap"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the environment knows our loopback
READY_WITHIN_S = 60.0
WATCH_S = 5.0
SERVE_GRACE_S = 5.0  # Serve's own time-out comes after ours, which answers in our words


def serve(config: ServeConfig) -> None:
    """Runs the endpoint until SIGINT or SIGTERM, then lets requests finish and stops it.

    Raises UserError before anything starts if the command cannot work, and RaycapError if the application vanishes.
    """
    url = start(config)
    try:
        token = ' -H "Authorization: Bearer $RAYCAP_TOKEN"' if os.environ.get("RAYCAP_TOKEN") else ""
        listening = "" if config.host in LOOPBACK else f", listening on {config.host}:{config.port}"
        print(f"serving {url}{listening}")
        print(f"try     curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg'{token} {url}/v1/caption")
        for metrics in _metrics_urls():
            print(f"metrics {metrics}")
        sys.stdout.flush()
        while APP in ray_serve.status().applications:
            time.sleep(WATCH_S)
        raise RaycapError(f"the application {APP!r} is gone from Ray Serve: somebody stopped it; start it again")
    except KeyboardInterrupt:  # SIGTERM too, see raycap/cluster.py
        print("stopping: requests at work may finish", flush=True)
        _stop_or_leave()
    except BaseException:
        _stop_quietly()
        raise


def _stop_or_leave() -> None:
    """stop(); but a signal to the whole process group ends a Ray of ours too, and then nothing is left to wait for."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            stop()
        except BaseException as error:
            failed.append(error)

    stopping = threading.Thread(target=work, daemon=True)
    stopping.start()
    while stopping.is_alive():
        stopping.join(0.5)
        if cluster.ends_with_process() and not cluster.is_alive():
            print("Ray was stopped by the same signal", flush=True)
            os._exit(0)  # Ray's client would look for it for a minute, and then abort
    if failed:
        raise failed[0]


def start(config: ServeConfig) -> str:
    """Starts the endpoint and returns its base URL once /readyz answers 200.

    Raises UserError if the token, checkpoint, cluster or port do not allow it; nothing of ours then stays running.
    """
    token = os.environ.get("RAYCAP_TOKEN", "")
    check_token(config.host, token)
    source = checkpoint_of(config)
    spec = open_spec(source, prompt=config.prompt)
    decode_settings(config, spec)
    if not spec.verified:
        print(f"{source} is unverified: no raycap.json vouches for it", flush=True)
    if scorer_fingerprint(config.scorer, spec.image, source):
        print(chosen_by(config.scorer), flush=True)
    cluster.connect(
        num_cpus=num_cpus(config),
        need=f"--num-replicas {config.num_replicas} captioners + --decode-workers {config.decode_workers}",
    )
    uses_gpus(config)
    digest = token_digest(token)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the driver's; replicas log to Serve's own files
    found = _running_on()
    if found is None:
        _check_port(config.host, config.port)
    elif found != (config.host, config.port):
        raise UserError(
            f"Ray Serve already listens on {found[0]}:{found[1]} of this Ray cluster, and has one address for all applications; give "
            f"--host {found[0]} --port {found[1]}, or end Ray Serve with `serve shutdown -y` on the cluster's head node"
        )
    elif APP in ray_serve.status().applications:
        raise UserError(
            f"a raycap endpoint already runs on {found[0]}:{found[1]} of this Ray cluster; stop the job that started it, or, if that is "
            f"gone, end Ray Serve with `serve shutdown -y` on the cluster's head node, or use another cluster"
        )
    _started_serve.append(found is None)
    try:
        if found is None:
            _start_serve(config, digest)
        ray_serve.run(assemble(config, digest=digest), name=APP, route_prefix="/")
        url = base_url(config)
        _wait_until_ready(url)
    except BaseException as error:
        _stop_quietly()
        if isinstance(error, (RaycapError, KeyboardInterrupt)) or not isinstance(error, Exception):
            raise
        raise RaycapError(f"Ray Serve could not start the endpoint: {_last_line(error)}; see {_logs()}") from error
    return url


def stop() -> None:
    """Ends our application, after its requests. Serve itself ends too if we started it and nothing else runs on it.

    On a cluster that ends with this process Serve is left to that: its own end takes seconds and prints an error.
    """
    ours = _started_serve.pop() if _started_serve else False
    if APP in ray_serve.status().applications:
        ray_serve.delete(APP)
    if ours and not cluster.ends_with_process() and not ray_serve.status().applications:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]


_started_serve: list[bool] = []  # whether the running endpoint brought Serve with it


def base_url(config: ServeConfig) -> str:
    """Where a client on this machine reaches the endpoint."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); stop what listens there, or give another --port"
        ) from error


def _running_on() -> tuple[str, int] | None:
    """Host and port of the Serve that runs on the connected cluster."""
    from ray.serve.context import _get_global_client  # Serve tells its address nowhere else

    client = _get_global_client(raise_if_no_controller_running=False)
    return (client.http_config.host, client.http_config.port) if client else None


def _start_serve(config: ServeConfig, digest: str) -> None:
    ray_serve.start(
        proxy_location="HeadOnly" if config.host in LOOPBACK else "EveryNode",
        http_options={
            "host": config.host,
            "port": config.port,
            "request_timeout_s": config.request_timeout_s + SERVE_GRACE_S,
        },
        logging_config={"enable_access_log": False},
        controller_options={"runtime_env": {"env_vars": front_environment(limits_of(config), digest)}},
    )


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    last = "no answer"
    while time.monotonic() < deadline:
        try:
            with DIRECT.open(f"{url}/readyz", timeout=10):
                return
        except OSError as error:  # HTTPError is one
            last = str(error)
        time.sleep(0.1)
    raise RaycapError(f"{url}/readyz did not answer 200 within {READY_WITHIN_S:g} s ({last}); see {_logs()}")


def _stop_quietly() -> None:
    try:
        stop()
    except Exception as error:
        print(f"warning: the endpoint may still run ({error}); `serve shutdown` ends it", flush=True)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _logs() -> str:
    return "the logs below logs/serve/ of Ray's session folder, /tmp/ray/session_latest"


def _metrics_urls() -> Iterator[str]:
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
