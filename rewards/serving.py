"""A reward as an HTTP service. `rewards.remote` is its client, and says what travels.

It listens where it is told to (loopback, unless a token guards it), reads no more than it is told
to, decodes nothing but msgpack, PNG and WebP, and asks one reward, one request at a time.
"""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgpack
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import DataError
from common.images import open_image
from rewards.remote import PICTURE_TYPE
from rewards.runner import RewardRunner, Scored

MSGPACK = "application/msgpack"
_BODY_SECONDS = 30.0
_WAITING_REQUESTS = 16


@dataclass(frozen=True)
class Limits:
    """What one request may bring: bytes, pictures, and pixels in all of them."""

    body_bytes: int = 64 * 2**20
    images: int = 256
    pixels: int = 2**28


class _Job(BaseModel):
    """A request for scores."""

    model_config = ConfigDict(strict=True, extra="forbid")

    images: list[bytes]
    prompts: list[str]
    columns: dict[str, list[Any]] = {}


class _Refused(Exception):
    """A request that is not answered with scores."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason


class _Metrics:
    """What Prometheus may ask; nothing about pictures or prompts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "atelier_reward_requests", "Score requests by status.", ["status"], registry=registry
        )
        self.images = Counter(
            "atelier_reward_images", "Images by outcome.", ["outcome"], registry=registry
        )
        self.seconds = Histogram(
            "atelier_reward_scoring_seconds", "Seconds of scoring a request.", registry=registry
        )
        self.waiting = Gauge(
            "atelier_reward_waiting_requests", "Requests waiting or scored.", registry=registry
        )


class RewardService:
    """Answers /score, /health and /metrics for a runner that holds one reward."""

    def __init__(self, runner: RewardRunner, token: str | None, limits: Limits) -> None:
        self._runner = runner
        self._token = token
        self._limits = limits
        self._metrics = _Metrics()
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def health(self, request: Request) -> Response:
        """Say what is served; needs no token."""
        return JSONResponse({"status": "ok", "reward": self._runner.names[0]})

    async def metrics(self, request: Request) -> Response:
        """Return the counters in Prometheus' text format."""
        if not self._authorised(request):
            return _refusal(401, "the bearer token is missing or wrong")
        return Response(generate_latest(self._metrics.registry), media_type="text/plain")

    async def score(self, request: Request) -> Response:
        """Score the pictures of a request."""
        if self._waiting >= _WAITING_REQUESTS:
            self._metrics.requests.labels("503").inc()
            return _refusal(503, f"{_WAITING_REQUESTS} requests are waiting already")
        self._waiting += 1
        self._metrics.waiting.set(self._waiting)
        try:
            body = await self._body(request)
            async with self._turn:  # pictures take much more memory than their bytes: one at a time
                pictures = _Pictures(self._limits)
                # Unpacking and decoding take a while: not in the loop that answers /health.
                job = await asyncio.to_thread(_read_job, body, self._limits, pictures)
                _refuse_paths(job, self._runner.path_columns)
                images = await asyncio.to_thread(_decoded, job.images, pictures)
                started = time.perf_counter()
                scored = await asyncio.to_thread(
                    self._runner.score, images, job.prompts, job.columns
                )
                self._metrics.seconds.observe(time.perf_counter() - started)
        except _Refused as refused:
            self._metrics.requests.labels(str(refused.status)).inc()
            return _refusal(refused.status, refused.reason)
        finally:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)
        return self._reply(scored)

    def _reply(self, scored: Sequence[Scored]) -> Response:
        name = self._runner.names[0]
        failed = sum(one.parts[name] is None for one in scored)
        self._metrics.requests.labels("200").inc()
        self._metrics.images.labels("scored").inc(len(scored) - failed)
        self._metrics.images.labels("failed").inc(failed)
        scores = [
            {
                "value": one.parts[name],
                "reason": one.reasons.get(name, ""),
                "details": one.details.get(name, {}),
            }
            for one in scored
        ]
        # An integer over 64 bits, which msgpack lacks, travels as text.
        content = msgpack.packb({"reward": name, "scores": scores}, default=str)
        return Response(content, media_type=MSGPACK)

    async def _body(self, request: Request) -> bytes:
        if not self._authorised(request):
            raise _Refused(401, "the bearer token is missing or wrong")
        # A web page in a browser on this machine cannot send this type unasked.
        if request.headers.get("content-type") != MSGPACK:
            raise _Refused(415, f"the content type must be {MSGPACK}")
        limit = self._limits.body_bytes
        too_large = _Refused(413, f"the request has more than {limit} bytes")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise _Refused(408, f"the request did not arrive in {_BODY_SECONDS:g} s") from None
        except ClientDisconnect:
            raise _Refused(400, "the request was cut off") from None
        return bytes(body)

    def _authorised(self, request: Request) -> bool:
        if self._token is None:
            return True
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())


def build_app(
    runner: RewardRunner, token: str | None = None, limits: Limits | None = None
) -> Starlette:
    """Return the service as an ASGI application.

    Without a token only requests to this very machine's names are answered, so that no web page
    can reach it by a name of its own.
    """
    service = RewardService(runner, token, limits or Limits())
    return Starlette(
        routes=[
            Route("/score", service.score, methods=["POST"]),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
        ],
        middleware=[Middleware(_ThisMachineAlone)] if token is None else [],
    )


def is_loopback(host: str | None) -> bool:
    """Return whether a name or address without port can only be this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


class _ThisMachineAlone:
    """Answers only requests to this machine's own names. (Starlette's own knows no IPv6.)"""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_loopback(_asked_host(scope)):
            refusal = _refusal(400, "without a token only this machine's own names are answered")
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _asked_host(scope: Scope) -> str | None:
    try:
        return urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname
    except ValueError:  # half an IPv6 address
        return None


class _Pictures:
    """Opens the pictures of one request, up to so many pixels in all."""

    def __init__(self, limits: Limits) -> None:
        self._limit = self._left = limits.pixels

    def open(self, data: bytes) -> Image.Image:
        """Return the picture; DataError if it cannot be opened, _Refused if it is too much."""
        image = open_image(data, "the picture")
        self._left -= image.width * image.height
        if self._left < 0:
            raise _Refused(413, f"the images have more than {self._limit} pixels in all")
        return image

    def in_column(self, code: int, data: bytes) -> Image.Image:
        """Return the picture of a msgpack extension value."""
        if code != PICTURE_TYPE:
            raise _Refused(400, f"columns: msgpack extension type {code} is unknown")
        try:
            return self.open(data)
        except DataError as error:
            raise _Refused(400, f"a picture among the columns: {error}") from None


def _read_job(body: bytes, limits: Limits, pictures: _Pictures) -> _Job:
    try:
        unpacked = msgpack.unpackb(body, ext_hook=pictures.in_column, strict_map_key=False)
        job = _Job.model_validate(unpacked)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        raise _Refused(400, f"{place}: {first['msg']}") from None
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise _Refused(400, f"not msgpack: {error}") from None
    if len(job.images) > limits.images:
        raise _Refused(413, f"{len(job.images)} images; {limits.images} are allowed")
    if {len(job.prompts), *map(len, job.columns.values())} - {len(job.images)}:
        raise _Refused(400, "images, prompts and columns differ in length")
    return job


def _refuse_paths(job: _Job, columns: Iterable[str]) -> None:
    """Refuse all but pictures where the reward would open a file of this machine."""
    for name in columns:
        if not all(isinstance(x, Image.Image | None) for x in job.columns.get(name, [])):
            raise _Refused(
                400,
                f"columns.{name}: a server opens no paths. Fix: send the pictures "
                f"(`pictures: [{name}]` under the arguments of the reward `remote`)",
            )


def _decoded(encoded: Sequence[bytes], pictures: _Pictures) -> list[Any]:
    """Return the pictures; for one that is refused the reason, which costs only its own score."""
    images: list[Any] = []
    for data in encoded:
        try:
            images.append(pictures.open(data))
        except DataError as error:
            images.append(error)
    return images


def _refusal(status: int, reason: str) -> Response:
    headers = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse({"error": reason}, status, headers)
