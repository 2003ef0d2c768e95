"""What the endpoint costs without its model: Door, Ray Serve and batching against FastAPI on uvicorn, with equal work.

Both take 60 KB bodies and answer the same JSON without decoding. p50 latency with one client, requests/s with eight, each
client on one kept connection, the two in turn.
"""

import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

BODY = b"\xff\xd8\xff" + b"x" * 60_000
CLIENTS = 8
SIZE = 32
ROUNDS = 3
Line = dict[str, Any]

PEER = """
import sys, uvicorn
from fastapi import FastAPI, Request

app = FastAPI()

@app.post("/v1/caption")
async def caption(request: Request) -> dict[str, object]:
    await request.body()
    return {"caption": "a caption", "score": -1.0, "log_prob": -3.0, "candidates": [], "width": 32, "height": 32, "checkpoint": "0" * 64, "verified": True}

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=False, log_level="error")
"""


def measure() -> Line:
    """p50 milliseconds with one client and requests/s with eight, ours and the peer's."""
    from ray import serve

    from raycap import cluster
    from raycap.config import ServeConfig
    from raycap.serving import run
    from raycap.serving.app import assemble

    config = ServeConfig(port=_free_port(), max_queue=64)
    peer_port = _free_port()
    cluster.connect(num_cpus=4, need="the benchmark")
    peer = subprocess.Popen([sys.executable, "-c", PEER, str(peer_port)])
    try:
        run._start_serve(config, "")
        serve.run(assemble(config, captioner=_no_op(), decoder=_no_decoder), name="noop")
        ports = {"ours": config.port, "peer": peer_port}
        for port in ports.values():
            _until_answered(port)
        measured: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
        for _ in range(ROUNDS):
            for name, port in ports.items():
                measured[name].append((_p50_ms(port), _requests_per_s(port)))
    finally:
        serve.shutdown()
        peer.kill()
        peer.wait()
    figures = {
        name: {
            "p50_ms": round(statistics.median(p50 for p50, _ in rounds), 2),
            "requests_per_s": round(statistics.median(rate for _, rate in rounds), 1),
        }
        for name, rounds in measured.items()
    }
    return {"name": "serve_noop", **figures, "unit": "ms, 1/s", "must": None, "aim": None}


def _no_op() -> Any:
    from ray import serve

    from raycap.schema import CaptionResult, DecodeSettings, ImageSpec
    from raycap.serving.http import Served

    @serve.deployment(name="captioner", max_ongoing_requests=96)
    class NoOp:
        async def served(self) -> Served:
            return Served(
                kind="no-op",
                step=None,
                fingerprint="0" * 64,
                verified=True,
                image=ImageSpec(size=SIZE),
                decode=DecodeSettings(),
                prompt="",
                max_new_tokens=20,
            )

        async def caption(self, pixels: Any, _: DecodeSettings) -> tuple[CaptionResult, str, bool]:
            return (await self._batch(pixels)), "0" * 64, True

        @serve.batch(max_batch_size=16, batch_wait_timeout_s=0)  # type: ignore[arg-type]
        async def _batch(self, pixels: list[Any]) -> list[CaptionResult]:
            return [CaptionResult(caption="a caption", score=-1.0)] * len(pixels)

    return NoOp.bind()  # type: ignore[attr-defined]


def _no_decoder(_: Any) -> Any:
    import numpy as np

    from raycap.image import Prepared

    class NoDecoder:
        def prepare(self, _: bytes, spec: Any) -> Prepared:
            return Prepared(pixels=np.zeros((3, spec.size, spec.size), np.uint8), width=SIZE, height=SIZE)

        def close(self) -> None:
            pass

    return NoDecoder()


def _client(port: int, until: Callable[[int], bool]) -> list[float]:
    """Seconds of each request on one connection, until told to end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    seconds: list[float] = []
    while not until(len(seconds)):
        begun = time.perf_counter()
        connection.request("POST", "/v1/caption", BODY, {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        content = json.loads(response.read())
        seconds.append(time.perf_counter() - begun)
        assert (response.status, content["caption"]) == (200, "a caption"), content
    connection.close()
    return seconds


def _p50_ms(port: int) -> float:
    return 1000 * statistics.median(_client(port, lambda done: done >= 200))


def _requests_per_s(port: int) -> float:
    end = time.perf_counter() + 4
    counts = [0] * CLIENTS

    def one(n: int) -> None:
        counts[n] = len(_client(port, lambda _: time.perf_counter() > end))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(CLIENTS)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun)


def _until_answered(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            _client(port, lambda done: done >= 20)
            return
        except (OSError, AssertionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
