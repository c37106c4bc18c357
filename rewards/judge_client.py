"""Asking a vision-language model behind an OpenAI-compatible endpoint, with answers as JSON.

Answers are cached on disk, failed requests are repeated, what was spent is counted.
"""

import asyncio
import base64
import hashlib
import inspect
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from PIL import Image

from common.atomic import write_text
from common.errors import RewardError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_LOG = logging.getLogger("atelier.rewards")


@dataclass
class Cost:
    """What a judge has used up: requests, tokens, US dollars, answers reused."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    from_cache: int = 0


class JudgeFailure(Exception):
    """One question got no usable answer; the message says why."""


Parse = Callable[[str], dict[str, Any] | None]
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass
class Judge:
    """One model at one address.

    `base_url` ends in /v1. `api_key_env` names the environment variable that holds the key (None:
    the server wants none). A request that fails for a passing reason (429, 5xx, no connection) is
    repeated `retries` times with growing pauses, one whose answer is no JSON object as often
    without. At most `concurrency` requests are under way, over all calls of `ask`, which belong to
    one event loop. `cache` is a folder. `usd_per_million` is the price of (input, output) tokens;
    once `budget_usd` is spent, nothing more is asked (the requests then under way are still paid).
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512
    retries: int = 3
    timeout_s: float = 60.0
    concurrency: int = 8
    cache: str | None = None
    usd_per_million: Sequence[float] = (0.0, 0.0)
    budget_usd: float | None = None
    cost: Cost = field(default_factory=Cost, init=False)

    def __post_init__(self) -> None:
        """Raise RewardError for prices that are not two, and if no request may be under way."""
        if not isinstance(self.usd_per_million, list | tuple) or len(self.usd_per_million) != 2:
            raise RewardError(
                f"judge at {self.base_url}: usd_per_million is {self.usd_per_million}. Fix: write "
                "the price of input and of output tokens."
            )
        if self.concurrency < 1:
            raise RewardError(
                f"judge at {self.base_url}: concurrency is {self.concurrency}. Fix: write an "
                "integer of 1 or more."
            )
        self._free = asyncio.Semaphore(self.concurrency)
        self._warned = False

    async def ask(
        self,
        questions: Sequence[tuple[str, Sequence[Image.Image]]],
        parse: "Parse | None" = None,
    ) -> list[dict[str, Any] | JudgeFailure]:
        """Ask all questions, each a text with its pictures; return the JSON objects answered.

        A question whose answers are not JSON brings `parse`, which makes an object of a usable
        text and None of any other. A question that could not be answered gets a JudgeFailure in
        its place. Raises RewardError if the key is missing.
        """
        from openai import AsyncOpenAI

        async def one(text: str, images: Sequence[Image.Image]) -> dict[str, Any] | JudgeFailure:
            async with self._free:
                try:
                    pictures = await asyncio.to_thread(lambda: list(map(_data_url, images)))
                    return await self._answer(client, text, pictures, parse)
                except JudgeFailure as failure:
                    return failure

        # A client of its own for each call: one belongs to the event loop it was made in.
        async with AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._key(),
            max_retries=self.retries,
            timeout=self.timeout_s,
        ) as client:
            return list(await asyncio.gather(*(one(*question) for question in questions)))

    async def _answer(
        self,
        client: "AsyncOpenAI",
        text: str,
        pictures: Sequence[str],
        parse: "Parse | None",
    ) -> dict[str, Any]:
        path = self._cache_path(text, pictures)
        cached = _kept_answer(path) if path is not None else None
        if cached is not None:
            self.cost.from_cache += 1
            return cached
        content = [{"type": "text", "text": text}] + [
            {"type": "image_url", "image_url": {"url": picture}} for picture in pictures
        ]
        said = ""
        for _ in range(1 + self.retries):
            said = await self._request(client, content, wants_json=parse is None)
            answer = (parse or parse_object)(said)
            if answer is not None:
                if path is not None:
                    self._keep(path, answer)
                return answer
        wanted = "no JSON object" if parse is None else "not of the form asked for"
        raise JudgeFailure(f"the judge's answer is {wanted}: {said[:200]!r}")

    async def _request(self, client: "AsyncOpenAI", content: Any, *, wants_json: bool) -> str:
        from openai import OpenAIError

        if self.budget_usd is not None and self.cost.usd >= self.budget_usd:
            raise JudgeFailure(f"the budget of {self.budget_usd:g} USD is spent")
        self.cost.requests += 1
        try:
            reply = await client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                **({"response_format": {"type": "json_object"}} if wants_json else {}),
            )
        except (OpenAIError, ValueError) as error:  # the client does not catch a body of no JSON
            raise JudgeFailure(f"the judge did not answer: {error}") from error
        try:
            said, used = _read(reply)
        except (AttributeError, TypeError) as error:
            raise JudgeFailure(f"no answer of a judge: {str(reply)[:200]!r}") from error
        self.cost.input_tokens += used[0]
        self.cost.output_tokens += used[1]
        self.cost.usd += sum(
            n * price / 1e6 for n, price in zip(used, self.usd_per_million, strict=True)
        )
        return said

    def _keep(self, path: Path, answer: dict[str, Any]) -> None:
        try:
            write_text(path, json.dumps(answer))
        except OSError as error:  # the answer is paid for, and counts
            if not self._warned:
                _LOG.warning("answers of the judge at %s cannot be kept: %s", self.base_url, error)
            self._warned = True

    def _key(self) -> str:
        if self.api_key_env is None:
            return "none"  # the client wants one, the server does not look at it
        key = os.environ.get(self.api_key_env)
        if not key:
            raise RewardError(
                f"judge at {self.base_url}: the environment variable {self.api_key_env} is not "
                "set. Fix: set it to the key, or leave `api_key_env` out."
            )
        return key

    def _cache_path(self, text: str, pictures: Sequence[str]) -> Path | None:
        if self.cache is None:
            return None
        asked = [self.base_url, self.model, self.temperature, self.max_tokens, text, *pictures]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        return Path(self.cache) / digest[:2] / f"{digest}.json"


_JUDGES: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Judge]] = WeakKeyDictionary()
"""The judges of each event loop. The runner gives each reward a loop of its own for all its calls,
so calls that run side by side share a judge, and other rewards and runs have others."""


def shared_judge(**args: Any) -> Judge:
    """Return the running event loop's judge with these arguments: its costs add up over calls."""
    judges = _JUDGES.setdefault(asyncio.get_running_loop(), {})
    key = json.dumps(args, default=str)
    if key not in judges:
        judges[key] = Judge(**args)
    return judges[key]


def with_judge(function: _Function) -> _Function:
    """Let a reward that hands its `**judge` to `shared_judge` declare what `Judge` takes.

    A reward's arguments are read from its signature, and columns must not fill them.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    judge = inspect.signature(Judge).parameters.values()
    options = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in judge]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object in an answer, also from between ``` fences or words; None if none."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        return None
    try:
        value = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read(reply: Any) -> tuple[str, tuple[int, int]]:
    """Return the text of a reply, "" for none, and its tokens (input, output), 0 if not told.

    The client does not check what came: a page of HTML is a text, and anything may be None. Raises
    AttributeError or TypeError for what is no reply.
    """
    usage, choices = reply.usage, reply.choices
    used = (int(usage.prompt_tokens or 0), int(usage.completion_tokens or 0)) if usage else (0, 0)
    message = choices[0].message if choices else None
    said = (message.content or "") if message else ""
    if not isinstance(said, str):
        raise TypeError(f"the content is a {type(said).__name__}")
    return said, used


def _kept_answer(path: Path) -> dict[str, Any] | None:
    """Return the answer in a file; None, so that it is asked for again, if there is none in it."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
