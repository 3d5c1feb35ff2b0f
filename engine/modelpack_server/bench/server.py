"""A client that sends the requests of a workload to a server and records the responses.

Servers accept only text, so each token id is sent as one of a few hundred short English words.
Nearly every vocabulary has these words, with a leading space, as single tokens. A prompt
therefore has about as many tokens as ids, and prompts share a prefix if their ids do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from modelpack_server.bench.streams import ConnectionLostError, EventResponse, EventServer

_TEXT = """
able about above act add after again age ago air all alone along also always and animal answer
any appear area arm around art ask away back bad ball bank bar base beat bed been before began
best big bird black blue board boat body book both bottom box boy bring brother build busy buy
call came car care carry case cat catch cause cell cent center chair chance change check child
choose city class clean clear close cloud coast cold color come common cook cool copy corn
correct cost count country course cover cross cry current cut dance dark day dead deal dear deep
degree did die direct do doctor dog dollar done door down draw dream dress drink drive drop dry
during each ear early earth east easy eat edge effect egg eight else end energy engine enough
enter equal even evening event ever every exact example eye face fact fair fall family far farm
fast father fear feed feel feet few field fight fill find fine finger finish fire first fish fit
five floor flow fly follow food foot force form forward found four free fresh friend from front
fruit full fun game garden gas gave get girl give glad glass go gold gone good got govern grand
grass gray great green grew ground group grow guess had half hand happen hard has hat have he
head hear heart heat heavy held help her here high hill his history hit hold hole home hope
horse hot hour house how huge human hundred hunt ice idea if in inch industry iron island job
join jump just keep key kill kind king knew know lady lake land language large last late laugh
law lay lead learn least leave led left leg length less let letter level lie life lift light
like line list listen little live long look lost lot loud love low machine made main make man
many map mark market mass matter may mean measure meat meet men metal method middle might mile
milk million mind mine minute miss modern moment money month moon more morning most mother
mountain mouth move much music must name nation nature near neck need never new next night nine
no noise noon north nose note nothing notice now number object ocean of off offer office often
oil old on once one only open or order other our out over own page paint pair paper part party
pass past path pay people perhaps person picture piece place plain plan plane plant play please
point poor position possible post pound power present press pretty print problem produce product
pull push put question quick quiet race radio rain ran range rate reach read ready real reason
red rest result rich ride right ring rise river road rock roll room root round row rule run said
sail salt same sand save saw say school science sea season seat second see seed seem self sell
send sense sent serve set seven several shall shape share she ship shoe shop short should show
side sign silver simple since sing single sister sit six size skin sky sleep slow small smell
smile snow so soft soil some son song soon sound south space speak special speed spell spend
spot spring square stand star start state stay
"""
_WORDS = _TEXT.split()


def text_of(token_ids: Iterable[int]) -> str:
    """Return a text of about as many tokens; the same ids give the same text."""
    return " ".join(_WORDS[token_id % len(_WORDS)] for token_id in token_ids)


#: Seconds to wait for the next chunk: the server may load the model or read a long prompt first.
READ_SECONDS = 600.0
_CONNECT = 10.0
# Makes responses exactly `max_tokens` long, if the server supports the field.
_IGNORE_EOS = {"ignore_eos": True}
_DELTAS = ("content", "reasoning_content", "reasoning", "tool_calls")
_MOST_LISTED = 8


@dataclass(frozen=True, slots=True)
class Served:
    """A server: its model, its programs with their versions, and whether it supports ignore_eos."""

    model: str
    versions: Mapping[str, str] = field(default_factory=dict)
    exact_lengths: bool = True


@dataclass(slots=True)
class Answer:
    """A response: the arrival times of its chunks, and the server's token counts."""

    times: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0


class AnswerError(Exception):
    """A request failed; the message is short, since the report counts failures by message."""


class OpenAIServer:
    """A client of the server at `url`, its root or the address of its API that ends in /v1.

    `open` finds the model and the fields that the server supports; call it before `ask`.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        read_seconds: float = READ_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.url = api_root(url)
        self.served = Served(model or "")
        self._asked_model = model
        self._clock = clock
        self._fields: Mapping[str, Any] = _IGNORE_EOS
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._events = EventServer(
            self.url, headers, read_seconds=read_seconds, connect_seconds=_CONNECT
        )
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(read_seconds, connect=_CONNECT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._events.close()
        await self._http.aclose()

    async def open(self) -> Served:
        """Find the model, and request a few tokens from it.

        Raises `RemoteUnavailableError`, `AuthError`, `NotFoundError` for a missing model,
        `UsageError` if the server has several models and none was chosen, and `ModelpackError`.
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
        """Return the response to a conversation; raise `AnswerError`."""
        answer = Answer()
        body = json.dumps(self._body(messages, max_tokens)).encode()
        try:
            async with await self._events.post("/chat/completions", body) as response:
                if response.status != 200:
                    raise AnswerError(f"HTTP {response.status}")
                complete = False
                async for data in _events(response):
                    complete |= self._take(data, answer)
        except TimeoutError:
            raise AnswerError("timed out") from None
        except ConnectionLostError:
            raise AnswerError("connection lost") from None
        except OSError:
            raise AnswerError("cannot connect") from None
        if not complete:
            raise AnswerError("incomplete stream")
        if not answer.times:
            raise AnswerError("empty response")
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

    def _take(self, data: bytes, answer: Answer) -> bool:
        """Add an event to the response; return whether it is the last one."""
        if data == b"[DONE]":
            return True
        try:
            event = json.loads(data.decode("utf-8", "replace"))
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
            raise AnswerError("invalid event: not a chunk of a chat completion") from None
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
                f"{self.url}/models did not return a list of models",
                hint="check that this is an OpenAI-compatible API, or give --model NAME",
            ) from None
        if len(names) == 1:
            return names[0]
        listed = ", ".join(names[:_MOST_LISTED]) + (", …" if len(names) > _MOST_LISTED else "")
        raise UsageError(
            f"{self.url} serves {len(names)} models{': ' + listed if names else ''}",
            hint="choose one with --model NAME" if names else "load a model in the server",
        )

    async def _try_out(self) -> bool:
        """Request two tokens; return whether the server supports the field ignore_eos."""
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
                hint="choose a model of the server with --model NAME",
            )
        raise self._refused(response, f"does not serve {self.served.model!r}")

    async def _versions(self) -> dict[str, str]:
        """Return the versions that the server reports, as vLLM, llama.cpp or Ollama."""
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
            f"no response from {self.url}: {error or type(error).__name__}",
            hint="start one with `modelpack serve MODEL`, or check the address",
        )

    def _refused(self, response: httpx.Response, what: str) -> ModelpackError:
        message = _message(_decoded(response))
        text = f"{self.url} {what}: HTTP {response.status_code}{', ' if message else ''}{message}"
        if response.status_code in (401, 403):
            return AuthError(text, hint="set the variable of --api-key-env to its API key")
        if response.status_code == 404:
            return NotFoundError(text, hint="check that this is an OpenAI-compatible API")
        return ModelpackError(text)


def api_root(url: str) -> str:
    """Return the base address of the API, which ends in /v1; raise `UsageError`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"{url!r} is not an http address", hint="give an address like http://127.0.0.1:12434"
        )
    if parts.username is not None:
        raise UsageError(
            f"the address of {parts.hostname} contains credentials, which the report would show",
            hint="set the variable of --api-key-env to the API key",
        )
    root = url.split("?")[0].rstrip("/").removesuffix("/chat/completions")
    return root if root.endswith("/v1") else f"{root}/v1"


async def _events(response: EventResponse) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events as they arrive."""
    rest = b""
    async for chunk in response.pieces():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _decoded(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {}


def _message(answer: Any) -> str:
    """Return the message of an error in the format of OpenAI, FastAPI or other servers."""
    if not isinstance(answer, dict):
        return ""
    error = answer.get("error", answer.get("detail", answer.get("message", "")))
    if isinstance(error, dict):
        error = error.get("message", "")
    return error if isinstance(error, str) else json.dumps(error)[:200]


# Seconds to wait for the server to exit.
_EXIT_SECONDS = 20.0
# Seconds in which a server that refuses connections may exit, because its model cannot be loaded.
_DEATH_SECONDS = 2.0
# The server must not require API keys: it listens on loopback, for this process only.
_UNSET_VARIABLES = ("MODELPACK_KEYS",)


@contextmanager
def served(model: str, options: Sequence[str]) -> Iterator[str]:
    """Run `modelpack serve` with `options` for `model`; yield its address.

    The model may still be loading; requests wait for it. Raises `ModelpackError` with the server's
    message if it does not start.
    """
    command = [sys.executable, "-m", "modelpack", "serve", "--port", "0", "-q", *options, model]
    environment = {k: v for k, v in os.environ.items() if k not in _UNSET_VARIABLES}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                process.wait()
                errors.seek(0)
                raise _failure(model, errors.read())
            yield url
        except RemoteUnavailableError:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_DEATH_SECONDS)
            if not process.returncode:
                raise
            errors.seek(0)
            raise _failure(model, errors.read()) from None
        finally:
            process.terminate()
            try:
                process.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _failure(model: str, said: str) -> ModelpackError:
    """Return an error with the message that the server printed before it exited."""
    lines = said.strip().splitlines()
    found = {kind: text for kind, _, text in (line.partition(": ") for line in lines)}
    reason = found.get("error", found.get("Error", lines[-1] if lines else "no message"))
    return ModelpackError(f"cannot serve {model}: {reason}", hint=found.get("hint"))
