"""Metrics and the access log of the endpoint: what is counted, and under which names. Needs Ray, runs in every process."""

import json

from ray.util.metrics import Counter, Gauge, Histogram

from raycap.serving.door import OUR_PATHS, Exchange, log

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]


class Metrics:
    """Ray exports them on each node's metrics port, each name with `ray_` in front."""

    def __init__(self) -> None:
        self._requests = Counter(
            "raycap_serve_requests",
            "Requests by status; error_kind is empty for a result.",
            ("path", "status", "error_kind"),
        )
        self._request_s = Histogram("raycap_serve_request_seconds", "Seconds a request took.", _SECONDS, ("path",))
        self._decode_s = Histogram(
            "raycap_serve_decode_seconds", "Seconds to decode an image, waiting included.", _SECONDS
        )
        self._model_s = Histogram("raycap_serve_model_seconds", "Seconds of the model for one batch.", _SECONDS)
        self._batch = Histogram("raycap_serve_batch_size", "Images in one batch.", [1, 2, 4, 8, 16, 32, 64, 128, 256])
        self._held = Gauge("raycap_serve_queue_length", "Requests that an HTTP replica holds.")

    def request(self, exchange: Exchange) -> None:
        """Counts a request and logs it as one line of JSON, which escapes whatever a client wrote."""
        path = exchange.path if exchange.path in OUR_PATHS else "other"  # clients must not make up label values
        tags = {"path": path, "status": str(exchange.status), "error_kind": exchange.error_kind}
        self._requests.inc(tags=tags)
        self._request_s.observe(exchange.seconds, tags={"path": path})
        line = {
            "request_id": exchange.request_id,
            "method": exchange.method[:16],
            "path": exchange.path[:200],
            "status": exchange.status,
            "error_kind": exchange.error_kind,
            "bytes": exchange.num_bytes,
            "seconds": round(exchange.seconds, 4),
        }
        log.info(json.dumps(line))

    def decode(self, seconds: float) -> None:
        self._decode_s.observe(seconds)

    def model(self, seconds: float, batch_size: int) -> None:
        self._model_s.observe(seconds)
        self._batch.observe(batch_size)

    def held(self, requests: int) -> None:
        self._held.set(requests)
