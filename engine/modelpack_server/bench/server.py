"""A server of the OpenAI API, as a client sees it: one conversation's answer, token by token."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from modelpack.errors import (
    AuthError,
    ModelpackError,
    NotFoundError,
    RemoteUnavailableError,
    UsageError,
)

#: Seconds a server may keep silent: while it loads the model, or reads a long prompt slowly.
SILENCE = 600.0
_CONNECT = 10.0
# Makes answers exactly as long as they are asked for, where a server knows the field.
_IGNORE_EOS = {"ignore_eos": True}
_DELTAS = ("content", "reasoning_content", "reasoning", "tool_calls")
_MOST_LISTED = 8


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of itself: the model that is asked, and programs with their versions."""

    model: str
    versions: Mapping[str, str] = field(default_factory=dict)
    exact_lengths: bool = True


@dataclass(slots=True)
class Answer:
    """When the pieces of an answer came, on the clock of who asked; counts are the server's own."""

    times: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0


class AnswerError(Exception):
    """A request has no complete answer; the text is short enough to count by."""


class OpenAIServer:
    """Asks the server at `url` (its root, or the address of its API that ends in /v1).

    `open` finds the model and how the server has to be asked; it is needed before `ask`.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        silence: float = SILENCE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.url = api_root(url)
        self.served = Served(model or "")
        self._asked_model = model
        self._clock = clock
        self._fields: Mapping[str, Any] = _IGNORE_EOS
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(silence, connect=_CONNECT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def open(self) -> Served:
        """Find the model, and ask it once for a few tokens.

        Raises `RemoteUnavailableError`, `AuthError`, `NotFoundError` for a model that is not there,
        `UsageError` where one of several has to be chosen, and `ModelpackError`.
        """
        model = await self._find_model()
        self.served = Served(model)
        try:
            exact = await self._try_out()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self.served = Served(model, await self._versions(), exact)
        return self.served

    async def ask(self, messages: list[dict[str, str]], max_tokens: int) -> Answer:
        """Return the answer to a conversation; raises `AnswerError`."""
        answer = Answer()
        body = self._body(messages, max_tokens)
        try:
            async with self._http.stream("POST", self._chat, json=body) as response:
                if response.status_code != 200:
                    raise AnswerError(f"HTTP {response.status_code}")
                complete = False
                async for data in _events(response):
                    complete |= self._take(data, answer)
        except httpx.TimeoutException:
            raise AnswerError("timed out") from None
        except httpx.ConnectError:
            raise AnswerError("no connection") from None
        except httpx.HTTPError:
            raise AnswerError("the connection broke") from None
        if not complete:
            raise AnswerError("the stream ended early")
        if not answer.times:
            raise AnswerError("an empty answer")
        return answer

    @property
    def _chat(self) -> str:
        return f"{self.url}/chat/completions"

    def _body(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.served.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }

    def _take(self, data: str, answer: Answer) -> bool:
        """Take notice of an event; return whether it ends the answer."""
        if data == "[DONE]":
            return True
        try:
            event = json.loads(data)
            if event.get("error"):
                raise AnswerError(f"the server failed: {_message(event)[:80]}")
            usage = event.get("usage")
            ends = False
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                if any(delta.get(name) for name in _DELTAS):
                    answer.times.append(self._clock())
                    answer.text.append(delta.get("content") or "")
                ends |= choice.get("finish_reason") is not None
            if usage:
                answer.prompt_tokens = int(usage["prompt_tokens"])
                answer.completion_tokens = int(usage["completion_tokens"])
                details = usage.get("prompt_tokens_details") or {}
                answer.cached_tokens = int(details.get("cached_tokens") or 0)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise AnswerError("an event that is no chunk of a chat completion") from None
        return ends

    async def _find_model(self) -> str:
        if self._asked_model is not None:
            return self._asked_model
        try:
            response = await self._http.get(f"{self.url}/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise self._refused(response, "does not list its models")
        try:
            names = [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, TypeError, KeyError):
            raise ModelpackError(
                f"{self.url}/models is no list of models",
                hint="is it the address of an OpenAI-compatible API? or name the model: --model",
            ) from None
        if len(names) == 1:
            return names[0]
        listed = ", ".join(names[:_MOST_LISTED]) + (", …" if len(names) > _MOST_LISTED else "")
        raise UsageError(
            f"{self.url} serves {len(names)} models{': ' + listed if names else ''}",
            hint="say which: --model NAME" if names else "have it load one",
        )

    async def _try_out(self) -> bool:
        """Ask for two tokens; return whether the server takes the field that ignores ends."""
        messages = [{"role": "user", "content": "Hello"}]
        for fields in (_IGNORE_EOS, {}):
            self._fields = fields
            response = await self._http.post(self._chat, json=self._body(messages, 2))
            if response.status_code == 200:
                return bool(fields)
            if response.status_code not in (400, 422):
                break
        if response.status_code == 404:
            message = _message(_decoded(response))
            raise NotFoundError(
                f"{self.url} has no model {self.served.model!r}"
                + (f": {message}" if message else ""),
                hint="name one that it serves: --model NAME",
            )
        raise self._refused(response, f"does not answer as {self.served.model!r}")

    async def _versions(self) -> dict[str, str]:
        """Return what the server tells of its program: vLLM's, llama.cpp's and Ollama's ways."""
        found: dict[str, str] = {}
        root = self.url.removesuffix("/v1")
        for path, field_name, name in (
            ("/version", "version", "server"),
            ("/api/version", "version", "ollama API"),
            ("/props", "build_info", "llama.cpp"),
        ):
            try:
                response = await self._http.get(root + path, timeout=_CONNECT)
                version = _decoded(response).get(field_name) if response.is_success else None
            except (httpx.HTTPError, AttributeError):
                continue
            if isinstance(version, str):
                found[name] = version
        return found

    def _unreachable(self, error: httpx.HTTPError) -> ModelpackError:
        return RemoteUnavailableError(
            f"no server answers at {self.url}: {error or type(error).__name__}",
            hint="start one with `modelpack serve MODEL`, or check the address",
        )

    def _refused(self, response: httpx.Response, what: str) -> ModelpackError:
        message = _message(_decoded(response))
        text = f"{self.url} {what}: HTTP {response.status_code}" + (
            f", {message}" if message else ""
        )
        if response.status_code in (401, 403):
            return AuthError(text, hint="put its API key into the variable of --api-key-env")
        if response.status_code == 404:
            return NotFoundError(text, hint="is it the address of an OpenAI-compatible API?")
        return ModelpackError(text)


def api_root(url: str) -> str:
    """Return the address that paths like /models go below; raises `UsageError`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is not an address", hint="like http://127.0.0.1:12434")
    if parts.username is not None:
        raise UsageError(
            f"the address of {parts.hostname} holds a name or a password, which reports would tell",
            hint="put an API key into the variable of --api-key-env",
        )
    root = url.split("?")[0].rstrip("/").removesuffix("/chat/completions")
    return root if root.endswith("/v1") else f"{root}/v1"


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the data of server-sent events as they come."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", "replace")
    if rest.startswith(b"data:"):
        yield rest[5:].strip().decode("utf-8", "replace")


def _decoded(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {}


def _message(answer: Any) -> str:
    """Return what an error says, as OpenAI, FastAPI and others put it."""
    if not isinstance(answer, dict):
        return ""
    error = answer.get("error", answer.get("detail", answer.get("message", "")))
    if isinstance(error, dict):
        error = error.get("message", "")
    return error if isinstance(error, str) else json.dumps(error)[:200]
