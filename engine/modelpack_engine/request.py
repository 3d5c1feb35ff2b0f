"""EngineRequest, SamplingParams and Media: a prompt, how to sample its continuation, and limits."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

from modelpack_engine.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 4096  # of one stop string
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024
REPETITION_PENALTIES = (1e-6, 1e6)  # logits divided by less may become infinite


class LogitsMask(Protocol):
    """The tokens that may come next in one choice of a request; grammars implement this.

    A mask outlives preemption: tokens that it accepted before are not generated again.
    """

    def allowed(self) -> bytes | None:
        """Return a bit per token id (LSB first), or None if any token may come.

        Raises `EngineError` if the mask fails; the choice then ends with an error.
        """

    def accept(self, token_id: int) -> None:
        """Advance by the token that was sampled; must not raise."""


@runtime_checkable
class CopyableMask(LogitsMask, Protocol):
    """A mask whose copy can accept proposed tokens while the mask itself stays where it is."""

    def copy(self) -> Self:
        """Return an independent mask in the same state."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are sampled, with the names of the OpenAI and vLLM APIs.

    `temperature` 0 is greedy. `top_k` 0 or -1 keeps all tokens. `logprobs` is the number of
    alternatives reported with each token (None: no log-probabilities; 0: only the sampled token's),
    and `prompt_logprobs` the same for the prompt. The same `seed` gives the same text in any batch.
    No end of sequence or stop string ends the text before `min_tokens`. `skip_special_tokens`
    leaves special tokens out of the text. `mask` makes the mask of one choice; the text ends when
    the mask allows nothing but its end, so `mask` excludes `min_tokens` and `ignore_eos`.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    mask: Callable[[], LogitsMask] | None = field(default=None, hash=False, compare=False)

    def check_sizes(self) -> None:
        """Raise `RequestError`, naming the field, if a value has too many items."""
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise RequestError(
                f"stop must be up to {MAX_STOP_STRINGS} non-empty strings", param="stop"
            )
        if any(len(text) > MAX_STOP_CHARACTERS for text in self.stop):
            raise RequestError(
                f"stop strings must have at most {MAX_STOP_CHARACTERS} characters", param="stop"
            )
        sizes = (
            ("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS),
            ("logit_bias", self.logit_bias, MAX_BIASES),
        )
        for name, items, limit in sizes:
            if len(items) > limit:
                raise RequestError(
                    f"{name} has {len(items)} items, the limit is {limit}", param=name
                )

    def check(self, vocab_size: int) -> None:
        """Raise `RequestError`, naming the field, if a value is not valid."""
        ranges = (
            ("max_tokens", self.max_tokens, 1, None),
            ("min_tokens", self.min_tokens, 0, self.max_tokens),
            ("temperature", self.temperature, 0, None),
            ("top_k", self.top_k, -1, None),
            ("min_p", self.min_p, 0, 1),
            ("repetition_penalty", self.repetition_penalty, *REPETITION_PENALTIES),
            ("presence_penalty", self.presence_penalty, -2, 2),
            ("frequency_penalty", self.frequency_penalty, -2, 2),
            ("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
        )
        for name, value, low, high in ranges:
            if value is None:
                continue
            if (
                not value >= low
                or (high is not None and not value <= high)
                or value == float("inf")
            ):
                limits = f"{low} or more" if high is None else f"{low} to {high}"
                raise RequestError(f"{name} is {value}, expected {limits}", param=name)
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}, expected above 0, up to 1", param="top_p")
        if self.mask is not None and (self.min_tokens or self.ignore_eos):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise RequestError(
                f"{name} cannot be combined with structured output, whose grammar ends the text",
                param=name,
            )
        self.check_sizes()
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{name} has the token {token_id}, but the vocabulary has {vocab_size}",
                        param=name,
                    )
        for bias in self.logit_bias.values():
            if not -100 <= bias <= 100:
                raise RequestError(
                    f"logit_bias contains {bias}, expected -100 to 100", param="logit_bias"
                )


@dataclass(frozen=True, slots=True, eq=False)
class MediaSource:
    """Decoded content, from which a `MediaProcessor` makes the encoder's inputs again.

    `content` has the pixels of a picture (uint8 [height, width, 3]), the samples of a sound
    (float32 [samples]) or the frames of a part of a video (uint8 [frames, height, width, 3]), and
    `numbers` what else the inputs depend on.
    """

    kind: Literal["picture", "sound", "video"]
    content: NDArray[Any] = field(repr=False)
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Media:
    """A picture, a sound or a part of a video: the `token_ids` from position `start` stand for it.

    `digest` is the SHA-256 of the decoded pixels and of everything else that the encoder's
    `inputs` depend on: equal digests mean equal embeddings. `param` names the picture in errors.
    With a `source` and no inputs, these are made from it if the encoder has no embeddings.
    With M-RoPE, `grid` has the frames, rows and columns of its tokens. With `frame`, it continues
    the video of the media before it, at that temporal position from the video's first one.

    Tokens in one of the ranges `bidirectional`, which count from `start`, attend to all others in
    it: a step computes all of them, or all that are not cached. With `in_windows`, they do so in
    layers with a window. With `until`, tokens up to this position attend to keys and values that
    the encoder returns.
    """

    start: int
    token_ids: tuple[int, ...] = field(repr=False)
    digest: bytes
    inputs: Mapping[str, NDArray[Any]] = field(repr=False)
    param: str = "messages"
    grid: tuple[int, int, int] | None = None
    bidirectional: tuple[tuple[int, int], ...] = ()
    in_windows: bool = False
    until: int = 0
    frame: int | None = None
    source: MediaSource | None = None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The positions [first, stop) of each range in `bidirectional`."""
        return [(self.start + first, self.start + stop) for first, stop in self.bidirectional]

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + len(self.token_ids)

    @property
    def lacks_inputs(self) -> bool:
        """Whether the encoder's inputs have to be made from the source."""
        return self.source is not None and not self.inputs

    @property
    def nbytes(self) -> int:
        """The bytes of the encoder's inputs, and of what they are made from."""
        source = 0 if self.source is None else self.source.content.nbytes
        return source + sum(array.nbytes for array in self.inputs.values())


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt and how to continue it.

    `n` sequences are sampled from the prompt (the API's choices). `continues_text` is for
    completions, whose text continues the prompt instead of starting a new message. Requests share
    cached prefixes only with requests of the same `cache_salt`. Waiting requests of different
    `owner` take turns. A `background` request gives its place to other requests that wait for one.
    `adapter` names an adapter of the engine. `media` are the pictures of the prompt, in its order.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    n: int = 1
    continues_text: bool = False
    cache_salt: bytes = b""
    owner: bytes = b""
    background: bool = False
    adapter: str | None = None
    media: tuple[Media, ...] = ()

    def check(self, vocab_size: int) -> None:
        """Raise `RequestError`, naming the field, unless a model of `vocab_size` can serve it."""
        self.params.check(vocab_size)
        if self.n < 1:
            raise RequestError(f"n is {self.n}, expected 1 or more", param="n")
        if not _all_below(self.prompt_token_ids, vocab_size):
            wrong = next(each for each in self.prompt_token_ids if not 0 <= each < vocab_size)
            raise RequestError(
                f"the prompt has the token {wrong}, but the vocabulary has {vocab_size}",
                param="prompt",
            )
        before = 0
        for media in self.media:
            placed = tuple(self.prompt_token_ids[media.start : media.stop])
            if media.start < before or not placed or placed != media.token_ids:
                raise RequestError(
                    f"the picture at token {media.start} does not match the prompt", param="prompt"
                )
            before = media.stop


def _all_below(token_ids: Collection[int], size: int) -> bool:
    """Return whether all ids are in 0 … `size` - 1, three times as fast as a Python loop."""
    import numpy as np  # imported here: HTTP clients import this module and need no NumPy

    try:
        packed = array("I", token_ids)
    except OverflowError:
        return False
    return not packed or int(np.frombuffer(packed, np.uintc).max()) < size
