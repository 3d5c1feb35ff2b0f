"""A chat with a model: `Chat` in this process, `RemoteChat` through a server's OpenAI API."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from modelpack.errors import ModelpackError, RemoteUnavailableError, UsageError
from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import RequestError
from modelpack_engine.models.load_progress import LoadProgress
from modelpack_engine.request import SamplingParams
from modelpack_server.conversation.chat import start_chat
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatDelta, ChatSpec, ChatUsage
from modelpack_server.pool.catalogue import Catalogue
from modelpack_server.pool.memory import device_memory
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings, preset_named
from modelpack_server.server_client import problem_of
from modelpack_server.tool_parsers.parts import Part, Reasoning, Text

T = TypeVar("T")

# A model without a chat template continues the text of the messages.
_NO_TEMPLATE = "{{ bos_token or '' }}{{ messages | map(attribute='content') | join('\n\n') }}"


class LocalModels:
    """A context manager that holds one loaded model at a time, in a pool of its own.

    All calls come from one thread, which runs the event loop for the duration of each call. Ctrl-C
    ends a call with `KeyboardInterrupt`; further calls are possible afterwards.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        config: EngineConfig | None = None,
        on_progress: Callable[[str, LoadProgress | None], None] | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._on_progress = on_progress
        self._config = config or EngineConfig()
        self._runner = asyncio.Runner()
        self._pool: ModelPool | None = None
        self._lease = AsyncExitStack()
        self._loaded: tuple[str, ModelSettings, ServedModel] | None = None

    def __enter__(self) -> LocalModels:
        self._runner.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._runner.run(self._close())
        finally:
            self._runner.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the event loop and return its result."""
        return self._runner.run(work)

    def load(self, name: str, settings: ModelSettings | None = None) -> ServedModel:
        """Unload the previous model, load a stored one and return it.

        A model that is already loaded with these settings is returned at once. If no model has that
        name, the previous model stays loaded. Raises the errors of `ModelPool.lease`.
        """
        return self.call(self._load(name, settings or ModelSettings()))

    async def _load(self, name: str, settings: ModelSettings) -> ServedModel:
        if self._pool is None:
            memory = await asyncio.to_thread(device_memory, self._config)
            self._pool = ModelPool(
                self._catalogue, memory=memory, keep_alive=math.inf, grace=0,
                on_progress=self._on_progress, logs_failures=False,
            )  # fmt: skip
        pool = self._pool
        found = await pool.find(name)
        key = found.key
        if self._loaded is not None:
            if self._loaded[:2] == (key, settings):
                return self._loaded[2]
            self._loaded = None
            await self._lease.aclose()
            await pool.unload()
        await pool.configure(found.base or name, settings)
        model = await self._lease.enter_async_context(pool.lease(name))
        self._loaded = key, settings, model
        return model

    async def _close(self) -> None:
        await self._lease.aclose()
        if self._pool is not None:
            await self._pool.close()


class Chat:
    """A conversation with a model: each prompt is sent with all previous messages.

    `given` holds fields of SamplingParams, which take precedence over `preset`, which takes
    precedence over the model's defaults. `max_tokens` limits each response (None: by the context).
    `reasoning` enables or disables reasoning, if the model supports that.
    """

    #: Whether `params` includes the model's own defaults.
    knows_defaults = True

    def __init__(
        self,
        model: ServedModel,
        *,
        system: str = "",
        given: Mapping[str, Any] | None = None,
        preset: str | None = None,
        max_tokens: int | None = None,
        reasoning: bool | None = None,
    ) -> None:
        self.model = model
        self.system = system
        self.given = dict(given or {})
        self.preset = preset
        self.max_tokens = max_tokens
        self.reasoning = reasoning
        self.turns: list[dict[str, Any]] = []

    def clear(self) -> None:
        """Delete all messages, but keep the settings."""
        self.turns = []

    async def ask(
        self, text: str, pictures: Sequence[dict[str, Any]] = ()
    ) -> AsyncGenerator[ChatDelta, None]:
        """Stream the response to `text`; keep it as a message, even if it is interrupted.

        `pictures` are parts of `PictureReader`, sounds and videos too. Raises the errors of
        `start_chat`, and `RequestError` if the model does not read them; then no message is kept.
        """
        processor = self.model.pictures
        if pictures and processor is None:
            reason = self.model.engine.no_vision
            why = f": {reason}" if reason else ", not pictures"
            raise RequestError(f"{self.model.name} accepts text only{why}")
        has_pictures = any(part["type"] == "image" for part in pictures)
        if has_pictures and processor is not None and not processor.image_token:
            why = processor.why_no_pictures
            raise RequestError(f"{self.model.name} reads no pictures: {why}")
        has_sounds = any(part["type"] == "audio" for part in pictures)
        if has_sounds and processor is not None and processor.sounds is None:
            raise RequestError(f"{self.model.name} reads no sound: {processor.why_no_sounds}")
        has_videos = any(part["type"] == "video" for part in pictures)
        if has_videos and processor is not None and processor.videos is None:
            raise RequestError(f"{self.model.name} reads no video: {processor.why_no_videos}")
        question = _question(text, pictures)
        said: list[Part] = []
        stream = await start_chat(self.model, self._spec([*self.turns, question]))
        async with stream:
            try:
                async for delta in stream:
                    said += delta.parts
                    yield delta
            finally:
                self.remember(question, said)

    def remember(self, question: dict[str, Any], said: Sequence[Part]) -> None:
        """Append a prompt and its response to the messages, unless the response is empty."""
        answer = "".join(part.text for part in said if isinstance(part, Text))
        thoughts = "".join(part.text for part in said if isinstance(part, Reasoning))
        if not answer and not thoughts:
            return
        turn = {"role": "assistant", "content": answer}
        if thoughts:
            turn["reasoning_content"] = thoughts
        self.turns += [question, turn]

    def check(self) -> None:
        """Raise `RequestError` if a sampling parameter is invalid."""
        self.params().check(self.model.vocab_size)

    def params(self) -> SamplingParams:
        """Return the sampling parameters: `given`, else the preset's, else the model's."""
        return self.model.sampling_params(self.given, preset=self.preset)

    def _spec(self, turns: list[dict[str, Any]]) -> ChatSpec:
        system = [{"role": "system", "content": self.system}] if self.system else []
        has_template = self.model.tokenizer.chat_template is not None
        return ChatSpec(
            [*system, *turns],
            params=self.params(),
            max_tokens=self.max_tokens or self.model.default("max_tokens"),
            reasoning=self.reasoning,
            template=None if has_template else _NO_TEMPLATE,
        )


def require_chat(model: ServedModel) -> None:
    """Raise `UsageError` for a model that answers no prompts."""
    from modelpack_engine.embedding.async_embedder import AsyncEmbedder
    from modelpack_engine.speech.async_transcriber import AsyncTranscriber

    if isinstance(model.engine, AsyncTranscriber):
        raise UsageError(
            f"{model.name} is a speech-to-text model, which answers no prompts",
            hint="use `modelpack transcribe`, or `modelpack serve` to serve transcriptions",
        )

    if isinstance(model.engine, AsyncEmbedder):
        raise UsageError(
            f"{model.name} is an embedding model, which generates no text",
            hint="use `modelpack smoke` to test it, or `modelpack serve` to serve embeddings",
        )


# Seconds to connect, and to wait for each chunk: the server may have to load the model first.
_CONNECT_SECONDS, _READ_SECONDS = 5, 600


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model of a server, with the attributes of `ServedModel` that `Chat` uses."""

    url: str
    name: str
    max_model_len: int | None = None
    vocab_size: int = 1 << 30  # unknown here; the server checks token ids

    def default(self, name: str) -> Any:
        """Return the default of SamplingParams: the server's own defaults are unknown."""
        return getattr(SamplingParams(), name, None)

    def sampling_params(
        self, given: Mapping[str, Any], *, preset: str | None = None
    ) -> SamplingParams:
        """Return the sampling parameters of the request: `given`, else the preset's."""
        chosen = preset_named(preset).sampling if preset else {}
        return SamplingParams(**{**chosen, **given})


class RemoteChat(Chat):
    """A conversation with a model of a server, through its OpenAI API."""

    model: RemoteModel  # type: ignore[assignment]
    knows_defaults = False

    async def ask(
        self, text: str, pictures: Sequence[dict[str, Any]] = ()
    ) -> AsyncGenerator[ChatDelta, None]:
        """Stream the response, as `Chat.ask` does; closing the generator cancels the request."""
        import httpx

        question = _question(text, pictures)
        url = f"{self.model.url}/v1/chat/completions"
        key = os.environ.get("MODELPACK_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
        said: list[Part] = []
        try:
            async with (
                httpx.AsyncClient(timeout=timeout, headers=headers, trust_env=False) as client,
                client.stream("POST", url, json=self._body([*self.turns, question])) as response,
            ):
                if response.status_code >= 400:
                    raise problem_of(response.status_code, _decoded(await response.aread()))
                async for line in response.aiter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        delta = _read(data, url)
                        said += delta.parts
                        yield delta
        except httpx.HTTPError as error:
            raise RemoteUnavailableError(f"no response from {url}: {error}") from error
        finally:
            self.remember(question, said)

    def _body(self, turns: list[dict[str, Any]]) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        optional = {"max_tokens": self.max_tokens, "preset": self.preset,
                    "enable_thinking": self.reasoning}  # fmt: skip
        return {
            "model": self.model.name,
            "messages": [*system, *map(_as_json, turns)],
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in optional.items() if value is not None},
            **self.given,
        }


def _question(text: str, pictures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    parts = [*pictures, {"type": "text", "text": text}]
    return {"role": "user", "content": parts if pictures else text}


def _as_json(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a message as OpenAI's API takes it: pictures as data: URLs, sounds in base64."""
    if not isinstance(turn["content"], list):
        return turn
    return {**turn, "content": [_part_as_json(part) for part in turn["content"]]}


def _part_as_json(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": part["picture"].data_url}}
    if part["type"] == "audio":
        sound = part["sound"]
        data = base64.b64encode(sound.data).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": sound.format}}
    if part["type"] == "video":
        return {"type": "video_url", "video_url": {"url": part["video"].data_url}}
    return part


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _read(data: str, url: str) -> ChatDelta:
    try:
        return _delta(json.loads(data))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ModelpackError(f"cannot read the response of {url}: {error}") from error


def _delta(event: dict[str, Any]) -> ChatDelta:
    """Return the delta of a chunk: parts of the response, its finish reason, or token counts."""
    if "error" in event:
        raise ModelpackError(str(event["error"].get("message", "the server failed")))
    usage = event.get("usage")
    counted = None
    if usage is not None:
        prompt, answer = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
        counted = ChatUsage(
            usage["prompt_tokens"],
            usage["completion_tokens"],
            (prompt or {}).get("cached_tokens") or 0,
            (answer or {}).get("reasoning_tokens") or 0,
        )
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        parts: list[Part] = []
        if delta.get("reasoning_content"):
            parts.append(Reasoning(_text(delta["reasoning_content"])))
        if delta.get("content"):
            parts.append(Text(_text(delta["content"])))
        return ChatDelta(0, tuple(parts), finish=choice.get("finish_reason"), usage=counted)
    return ChatDelta(0, usage=counted)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value
