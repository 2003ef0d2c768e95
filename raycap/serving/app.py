"""The Ray Serve application: an HTTP deployment on CPUs in front of a captioner deployment that batches.

`build` is what a Serve config file names as import path; its args are ServeConfig's fields. The life of a request:
Door, route, a decoding process, then as pixels to a captioner, where it joins what else arrives within batch_wait_s.
Every queue on the way is bounded: max_queue in the HTTP replica, and Serve's own in front of both deployments.
"""

import asyncio
import math
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from raycap import cluster, storage
from raycap.captioner import Captioner
from raycap.checkpoint import SEAL, CheckpointSpec
from raycap.config import ServeConfig, compute_dtype, default_root
from raycap.data.demo import given_or_demo
from raycap.decode_pool import DecodePool
from raycap.errors import RequestErrorKind, UserError
from raycap.schema import CaptionResult, DecodeSettings
from raycap.serving.door import Door, Limits, Refusal, overloaded, token_digest
from raycap.serving.http import Decoder, Served, build_http
from raycap.serving.observe import Metrics

Pixels = npt.NDArray[np.uint8]
SPARE_SLOTS = 32  # of Serve, beyond max_queue: for /healthz, /readyz and for saying 429
DRAIN_S = 5.0  # added to the request time-out: how long a replica that is told to stop may take
READY_TIMEOUT_S = 5.0
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def build(args: dict[str, Any]) -> Application:
    """The application for a Serve config file, `import_path: raycap.serving.app:build`; args are ServeConfig's fields.

    Serve's http_options are set apart and cannot be seen from here, so args have to repeat the host (the file in cluster/
    does, by a YAML anchor). Raises UserError for a host other than loopback without RAYCAP_TOKEN in the environment of the
    nodes, and for unknown or wrong args.
    """
    known = [field.name for field in fields(ServeConfig)]
    for name in args:
        if name not in known:
            close = get_close_matches(str(name), known, 1)
            hint = f"did you mean {close[0]!r}" if close else f"there are {', '.join(known)}"
            raise UserError(f"args of raycap.serving.app:build hold {name!r}, which is no setting; {hint}")
    try:
        config = TypeAdapter(ServeConfig).validate_python(args)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}={first['input']!r}: " if first["loc"] else ""
        raise UserError(
            f"args of raycap.serving.app:build do not fit: {where}{first['msg']}; jobs/serve.py --help tells what they mean"
        ) from error
    check_token(config.host, os.environ.get("RAYCAP_TOKEN", ""))
    return assemble(config)


def check_token(host: str, token: str) -> None:
    """Raises UserError if the host can be reached from other machines and there is no bearer token, or a malformed one."""
    if host not in LOOPBACK and not token:
        raise UserError(
            f"host {host!r} is not loopback, so requests need a token; set RAYCAP_TOKEN in the environment, for example to the "
            f"output of `openssl rand -hex 32`, or leave the host out"
        )
    if token != token.strip() or any(not 33 <= ord(c) < 127 for c in token):
        raise UserError("RAYCAP_TOKEN holds blanks or characters other than printable ASCII; set another one")


def checkpoint_of(config: ServeConfig) -> str:
    """The checkpoint to serve, the demo's where none is given. Raises UserError if the demo is not there."""
    demo = storage.join(default_root("demo"), "checkpoint")
    return given_or_demo(config.checkpoint, demo, SEAL, to="serve", flags="--checkpoint")


def uses_gpus(config: ServeConfig) -> bool:
    """Whether the captioners run on GPUs. Raises UserError for auto on a cluster with some, but too few."""
    return cluster.use_gpus(config.device, math.ceil(config.num_replicas * config.num_gpus), "--num-replicas")


def assemble(
    config: ServeConfig,
    *,
    digest: str = "",
    captioner: Application | None = None,
    decoder: Callable[[ServeConfig], Decoder] | None = None,
) -> Application:
    """The application. digest: token_digest of the bearer token; without one the replicas look for RAYCAP_TOKEN.

    captioner, decoder: stand-ins with the methods of CaptionerReplica and of DecodePool, for benchmarks and tests.
    """
    slots = config.max_queue + SPARE_SLOTS
    options = {
        "max_ongoing_requests": slots,
        "max_queued_requests": slots,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": config.request_timeout_s + DRAIN_S,
        "logging_config": {"enable_access_log": False},  # the Door writes one line a request
    }
    if captioner is None:
        gpu = uses_gpus(config)
        threads = max(1, (os.cpu_count() or 1) // config.num_replicas)
        captioner = CaptionerReplica.options(  # type: ignore[attr-defined]
            num_replicas=config.num_replicas,
            ray_actor_options={"num_cpus": 1, "num_gpus": config.num_gpus if gpu else 0},
            **options,
        ).bind(config, checkpoint_of(config), "cuda" if gpu else "cpu", compute_dtype(config.dtype, gpu), threads)
    http = HttpReplica.options(ray_actor_options={"num_cpus": config.decode_workers}, **options)  # type: ignore[attr-defined]
    application: Application = http.bind(config, digest, captioner, decoder or _decode_pool)
    return application


def num_cpus(config: ServeConfig) -> int:
    """Ray CPUs that the application takes."""
    return config.decode_workers + config.num_replicas


def _decode_pool(config: ServeConfig) -> Decoder:
    return DecodePool(config.decode_workers, timeout_s=config.decode_timeout_s, max_bytes=config.max_body_bytes)


@serve.deployment(name="captioner")
class CaptionerReplica:
    """One model. Requests that arrive together run together, those with equal decode settings in one forward pass."""

    def __init__(self, config: ServeConfig, checkpoint: str, device: str, dtype: str, torch_threads: int) -> None:
        self._captioner = Captioner.load(
            checkpoint, device=device, dtype=dtype, prompt=config.prompt, scorer=config.scorer
        )
        self._served = _served(self._captioner, config)
        # One thread, so that requests are collected while the model works. OpenMP's setting belongs to the thread.
        self._thread = ThreadPoolExecutor(1, "model", torch.set_num_threads, (torch_threads,))
        self._metrics = Metrics()
        batch: Any = serve.batch(max_batch_size=config.micro_batch_size, batch_wait_timeout_s=config.batch_wait_s)
        self._batched: Callable[[Pixels, DecodeSettings], Awaitable[CaptionResult | Exception]] = batch(self._batch)

    async def served(self) -> Served:
        return self._served

    async def caption(self, pixels: Pixels, settings: DecodeSettings) -> tuple[CaptionResult, str, bool]:
        result = await self._batched(pixels, settings)
        if isinstance(result, Exception):
            raise result
        return result, self._served.fingerprint, self._served.verified

    async def _batch(self, pixels: list[Pixels], settings: list[DecodeSettings]) -> list[CaptionResult | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, pixels, settings)

    def _work(self, pixels: Sequence[Pixels], settings: Sequence[DecodeSettings]) -> list[CaptionResult | Exception]:
        """One result per image; a group that fails does so alone."""
        begun = time.perf_counter()
        groups: dict[DecodeSettings, list[int]] = defaultdict(list)
        for i, wanted in enumerate(settings):
            groups[wanted].append(i)
        results: dict[int, CaptionResult | Exception] = {}
        for wanted, rows in groups.items():
            try:
                captioned = self._captioner.caption_prepared(np.stack([pixels[i] for i in rows]), wanted)
                results |= dict(zip(rows, captioned, strict=True))
            except Exception as error:
                results |= dict.fromkeys(rows, error)
        self._metrics.model(time.perf_counter() - begun, len(pixels))
        return [results[i] for i in range(len(pixels))]


def decode_settings(config: ServeConfig, spec: CheckpointSpec) -> DecodeSettings:
    """What a request gets that asks for nothing else. Raises ValueError if the model, or a scorer, has no use for it."""
    return spec.settings(
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        num_candidates=config.num_candidates,
        others=config.decode_settings,
        for_scorer=bool(config.scorer),
    )


def _served(captioner: Captioner, config: ServeConfig) -> Served:
    spec = captioner.spec
    decode = decode_settings(config, spec)
    return Served(
        kind=spec.kind,
        step=spec.info.get("step"),
        fingerprint=spec.fingerprint,
        verified=spec.verified,
        scorer=captioner.scorer.fingerprint if captioner.scorer else None,
        image=spec.image,
        decode=decode,
        prompt=spec.text.prompt,
        max_new_tokens=spec.most_new_tokens or spec.text.max_tokens,
        num_required_tokens=spec.num_required_tokens(decode),
    )


class Remote:
    """The captioner deployment as the endpoint sees it: Serve's and Ray's exceptions become answers to the client."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def served(self) -> Served:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                served: Served = await self._call("served")
        except TimeoutError:
            raise _unavailable("no captioner answers; it is starting, or starting again: try again later") from None
        return served

    async def caption(self, pixels: Pixels, settings: DecodeSettings) -> tuple[CaptionResult, str, bool]:
        answer: tuple[CaptionResult, str, bool] = await self._call("caption", pixels, settings)
        return answer

    async def _call(self, method: str, *args: Any) -> Any:
        for attempt in (1, 2):
            try:
                return await getattr(self._handle, method).remote(*args)
            except BackPressureError as error:
                raise overloaded("more requests are waiting than the captioners hold; try again later") from error
            except (RayActorError, DeploymentUnavailableError) as error:
                if attempt == 2:  # a caption has no side effect, so one that lost its process may be asked for again
                    raise _unavailable("the captioner died over this request; try again later") from error
                await asyncio.sleep(0.2)  # until Serve has noticed, and takes another one
            except RayServeException as error:
                raise _unavailable(f"no captioner takes requests ({type(error).__name__}); try again later") from error
        raise AssertionError("unreachable")


def _unavailable(message: str) -> Refusal:
    return Refusal(503, RequestErrorKind.UNAVAILABLE, message, {"Retry-After": "1"})


@serve.deployment(name="http")
@serve.ingress()
class HttpReplica:
    """Takes requests, decodes images in processes of its own, and asks the captioner."""

    def __init__(
        self,
        config: ServeConfig,
        digest: str,
        captioner: DeploymentHandle[Any],
        decoder: Callable[[ServeConfig], Decoder],
    ) -> None:
        self._config = config
        self._digest = digest or token_digest(os.environ.get("RAYCAP_TOKEN", ""))
        self._captioner = captioner
        self._decoder = decoder(config)

    def __serve_build_asgi_app__(self) -> Door:
        metrics = Metrics()
        routes = build_http(
            Remote(self._captioner),
            self._decoder,
            decode_workers=self._config.decode_workers,
            decoded=metrics.decode,
        )
        return Door(routes, limits_of(self._config), digest=self._digest, report=metrics.request, held=metrics.held)

    def __del__(self) -> None:
        self._decoder.close()


def limits_of(config: ServeConfig) -> Limits:
    return Limits(
        max_body_bytes=config.max_body_bytes,
        request_timeout_s=config.request_timeout_s,
        max_queue=config.max_queue,
    )
