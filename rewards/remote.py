"""The reward `remote`: scores from servers that run `atelier serve-reward`.

What travels: POST /score with a msgpack map {"images": [PNG or WebP bytes], "prompts": [text],
"columns": {name: [value]}}, all of one length; a picture in a column is the msgpack extension type
1, with its bytes. Back comes {"reward": name, "scores": [{"value": number or nil, "reason": text,
"details": map}]}, in order.
"""

import asyncio
import io
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import httpx
import msgpack
from PIL import Image

from common.errors import RewardError
from common.images import open_image
from rewards.contract import Score
from rewards.plugins import reward

_PAUSES = (0.0, 0.5, 2.0)
"""Seconds before each round over all servers."""
_REST_SECONDS = 10.0
"""A server that did not answer is asked last for this long."""
_CONNECT_SECONDS = 5.0
_FINAL = (400, 401, 413, 415)
"""Statuses that mean the request itself, which all servers would refuse alike."""
_AT_ONCE = 2
"""Requests to a server under way: one is scored while the next one travels."""
PICTURE_TYPE = 1
"""Number of msgpack's extension type for a picture among the columns."""


@dataclass
class _Server:
    """What an event loop knows about a server; `busy` counts waiting calls too."""

    url: str
    busy: int = 0
    rests_until: float = 0.0
    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))


_SERVERS: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Server]] = WeakKeyDictionary()


@reward(name="remote", paths_argument="pictures", cacheable=False)
async def remote(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    servers: Sequence[str],
    token_file: str | None = None,
    server_timeout_s: float = 30.0,
    pictures: Sequence[str] = (),
    **columns: Sequence[Any],
) -> list[Score]:
    """Return what a server says about the pictures; they travel as PNG, with all columns.

    `servers` are addresses such as http://127.0.0.1:8765, all with the same reward. Each call goes
    to the one with the fewest calls under way; batches of one run so spread over all, and at most
    two at a time are sent to each. One that cannot be reached, takes longer than `server_timeout_s`
    or answers with something else is passed over, three rounds in all; so is a busy one (503), but
    the last one of a round is asked again at the pace it wants (Retry-After) for up to
    `server_timeout_s`.
    `token_file` holds the bearer token. `pictures` names columns that hold paths of pictures (the
    `source` of an edit): the pictures are sent instead, since servers open no paths.
    Raises RewardError if no server answers or one refuses the request (400, 401, 413, 415).
    """
    if isinstance(servers, str):
        raise RewardError(f"reward `remote`: servers is a text. Fix: write a list, [{servers}].")
    body = await asyncio.to_thread(_packed, images, prompts, columns, pictures)
    headers = {"Content-Type": "application/msgpack"}
    if token_file is not None:
        headers["Authorization"] = f"Bearer {read_token(Path(token_file))}"
    pool = [_server(url.rstrip("/")) for url in servers]
    timeout = httpx.Timeout(server_timeout_s, connect=_CONNECT_SECONDS)
    # Proxies and certificates are not taken from the environment: scores come from where it says.
    async with httpx.AsyncClient(
        verify=_tls(), trust_env=False, headers=headers, timeout=timeout
    ) as client:
        return await _ask(client, pool, body, len(images), server_timeout_s)


def read_token(file: Path) -> str:
    """Return the token in a file; RewardError if there is none."""
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"the token file {file} cannot be read: {error}.") from error
    if not token or not token.isascii() or not token.isprintable():
        raise RewardError(f"{file} holds no token. Fix: write one line of plain characters.")
    return token


async def _ask(
    client: httpx.AsyncClient, pool: Sequence[_Server], body: bytes, count: int, seconds: float
) -> list[Score]:
    """Return the first `count` scores that a server answers with; RewardError if none does."""
    problem = "`servers` is empty"
    for pause in _PAUSES if pool else ():
        await asyncio.sleep(pause)
        untried = list(pool)
        while untried:
            now = time.monotonic()
            server = min(untried, key=lambda one: (one.rests_until > now, one.busy))
            untried.remove(server)
            server.busy += 1
            rested_until = server.rests_until
            try:
                async with server.free:
                    if untried and server.rests_until > rested_until:  # it failed meanwhile
                        untried.append(server)
                        continue
                    url, patience = f"{server.url}/score", 0.0 if untried else seconds
                    answer = await _post(client, url, body, seconds, patience)
                if answer.status_code == 200:
                    return _scores(answer, count)
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
                server.rests_until = time.monotonic() + _REST_SECONDS
                problem = f"{server.url}: {type(error).__name__} {error}".rstrip()
                continue
            finally:
                server.busy -= 1
            problem = f"{server.url} answered {answer.status_code}: {answer.text[:200]}"
            if answer.status_code in _FINAL:
                raise RewardError(problem)
    raise RewardError(f"no server gave scores; the last problem: {problem}")


async def _post(
    client: httpx.AsyncClient, url: str, body: bytes, seconds: float, busy_seconds: float
) -> httpx.Response:
    """Return a server's answer; while it is busy, it is asked again for up to `busy_seconds`.

    Raises TimeoutError for one that is not there in `seconds`, however steadily it trickles in.
    """
    end = time.monotonic() + busy_seconds
    while True:
        async with asyncio.timeout(seconds):
            answer = await client.post(url, content=body)
        wait = _retry_after(answer)
        if answer.status_code != 503 or time.monotonic() + wait > end:
            return answer
        await asyncio.sleep(wait)


def _retry_after(answer: httpx.Response) -> float:
    """Return the seconds that a busy server asks for; 1 unless it names a number of them."""
    seconds = answer.headers.get("retry-after", "")
    return max(0.1, float(seconds)) if seconds.isdecimal() else 1.0


def _scores(answer: httpx.Response, count: int) -> list[Score]:
    try:
        items = msgpack.unpackb(answer.content)["scores"]
        if len(items) != count:
            raise ValueError(f"{len(items)} for {count} images")
        return [Score(item["value"], str(item["reason"]), dict(item["details"])) for item in items]
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise httpx.DecodingError(f"it did not answer with scores: {error!r}") from error


def _packed(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    columns: dict[str, Sequence[Any]],
    pictures: Sequence[str],
) -> bytes:
    for name in pictures:
        if name not in columns:
            raise RewardError(f"the prompt records lack the column `{name}` of `pictures`.")
        columns[name] = [
            open_image(Path(value)) if isinstance(value, str) else value for value in columns[name]
        ]
    job = {
        "images": [_png(image) for image in images],
        "prompts": list(prompts),
        "columns": {name: list(values) for name, values in columns.items()},
    }
    try:
        return bytes(msgpack.packb(job, default=_encoded))
    except TypeError as error:
        raise RewardError(f"a column holds what cannot be sent: {error}") from error


def _encoded(value: Any) -> msgpack.ExtType:
    if not isinstance(value, Image.Image):
        raise TypeError(f"a {type(value).__name__}")
    return msgpack.ExtType(PICTURE_TYPE, _png(value))


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)  # 1 is several times faster than 6
    return stream.getvalue()


def _server(url: str) -> _Server:
    """Return the running event loop's record of a server: a semaphore belongs to one loop."""
    servers = _SERVERS.setdefault(asyncio.get_running_loop(), {})
    return servers.setdefault(url, _Server(url))


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
