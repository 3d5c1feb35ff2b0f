"""A second question about a file: what its prompt needs is found by the bytes of the file."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.core.sequence import Sequence as EngineSequence
from modelpack_engine.engine import Engine
from modelpack_engine.errors import RequestError
from modelpack_engine.request import EngineRequest, Media, MediaSource, SamplingParams
from modelpack_engine.vision import processor_cache
from modelpack_engine.vision.encoder import VisionEncoder
from modelpack_engine.vision.processor import PictureProcessor
from modelpack_engine.vision.processor_cache import Place, PlacedFile, ProcessorCache
from modelpack_server.conversation.pictures import PictureFile, PictureFiles, SentFile
from modelpack_server.conversation.sounds import SoundFile
from modelpack_server.conversation.videos import VideoFile
from tests.engine.vision import hearing, tiny, watching
from tests.engine.vision.media import file_of, url
from tests.engine.vision.sound_files import tone, wav
from tests.engine.vision.test_api import image, said, served
from tests.engine.vision.test_documents import THREE
from tests.engine.vision.tiny import KINDS, PREFIX, kinds, picture, run
from tests.engine.vision.video_files import frames, written

ONE, TWO, WIDE = picture(1), picture(2, 31, 17), picture(3, 16, 64)
FILE, OTHER = (PictureFile(file_of(each), "here") for each in (ONE, TWO))
IT, MANY = "<image>What is it?", "<image>How many?"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count files that are decoded, and pictures that are processed."""
    counter = Counter[str]()

    def count(kind: type, name: str, what: str) -> None:
        made = getattr(kind, name)

        def counted(*given: Any, **options: Any) -> Any:
            counter[what] += 1
            return made(*given, **options)

        monkeypatch.setattr(kind, name, counted)

    count(PictureFiles, "_read", "decoded")
    count(PictureProcessor, "_processed", "processed")
    return counter


def asked(
    engine: Engine,
    text: str,
    files: Sequence[SentFile],
    owner: bytes = b"",
    prompt_of: Any = None,
) -> EngineRequest:
    """Return a greedy request, as a server makes it of files."""
    assert engine.vision is not None
    processor = engine.vision.processor
    of = prompt_of or (lambda text: tiny.prompt_of(tiny.placeholder(processor._kind), text))
    ids = engine.tokenizer.encode(processor.with_spaces(of(text)), add_special_tokens=False)
    with PictureFiles(files, owner, processor.sounds, processor.videos) as opened:
        ids, media = processor.place(ids, opened)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    return EngineRequest(ids, params, media=media, owner=owner, cache_salt=owner)


def engine_of(kind: str = "llava", **settings: Any) -> Engine:
    return tiny.tiny_engine(kind, max_num_batched_tokens=256, **settings)


def cache_of(engine: Engine) -> ProcessorCache:
    assert engine.vision is not None
    return engine.vision.processor.cache


def encoder_of(engine: Engine) -> VisionEncoder:
    assert engine.vision is not None
    return engine.vision.encoder


def drop_embeddings(engine: Engine) -> None:
    encoder = encoder_of(engine)
    encoder._kept.clear()
    encoder._nbytes = 0


@pytest.mark.parametrize("kind", kinds("llava", "qwen2_5_vl", "mllama", "idefics3"))
def test_a_second_question_decodes_processes_and_encodes_nothing(
    kind: str, calls: Counter[str]
) -> None:
    engine = engine_of(kind, block_size=8)
    calls.clear()  # those of the self-test
    for text in (IT, MANY, "and <image>?"):
        made = asked(engine, text, [FILE])
        assert run(engine, made) == [tiny.expected(kind, text, [ONE])]
        assert (calls["decoded"], calls["processed"], encoder_of(engine).misses) == (1, 1, 1)


def test_the_apis_of_a_server_share_files(calls: Counter[str]) -> None:
    """OpenAI's detail "low" reads the file again, as it may make the picture smaller."""
    source = {"type": "base64", "media_type": "image/png", "data": url(FILE.data)[22:]}
    openai, anthropic = image(FILE.data), {"type": "image", "source": source}
    turns = [(openai, 1), (anthropic, 2), (anthropic, 2), (openai, 2)]
    for llava in served("llava"):
        for number, (part, decoded) in enumerate(turns):
            parts = [part, {"type": "text", "text": f"What is it, {number}?"}]
            if part is openai:
                [choice] = llava.chat(parts).json()["choices"]
                text = choice["message"]["content"]
            else:
                answer = llava.chat(parts, "/v1/messages").json()
                text = answer["content"][0]["text"]
            prompt = f"user: <image>What is it, {number}?\nassistant:"
            assert text
            assert said("llava", prompt, ONE).startswith(text)
            assert calls["decoded"] == decoded


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", kinds(*KINDS))
def test_inputs_are_made_again_without_embeddings(
    kind: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made from the kept pixels. PaliGemma's are made for each prompt, as a whole."""
    monkeypatch.setattr(processor_cache, "_smaller", lambda media: replace(media, inputs={}))
    engine = engine_of(kind, enable_prefix_caching=False)
    text, pictures = "this is <image> and that is <image>, see?", [ONE, WIDE]
    files = [PictureFile(file_of(each), "here") for each in pictures]
    first = asked(engine, text, files)
    run(engine, first)
    drop_embeddings(engine)
    again = asked(engine, text, files)
    assert calls["decoded"] == 2
    assert [each.digest for each in again.media] == [each.digest for each in first.media]
    assert all((each.source is None) == (kind in PREFIX) for each in again.media)
    assert run(engine, again) == [tiny.expected(kind, text, pictures)]
    assert encoder_of(engine).misses == 2 * len(first.media)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma4"])
def test_inputs_made_again_are_the_same(kind: str) -> None:
    engine = engine_of(kind)
    assert engine.vision is not None
    first, second = (asked(engine, IT, [FILE]).media[0] for _ in range(2))
    assert first.source is None
    assert second.source is not None
    assert not second.inputs
    made = engine.vision.processor.inputs(second)
    assert made.keys() == first.inputs.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(array, first.inputs[name])
        assert array.dtype == first.inputs[name].dtype


def test_other_settings_files_owners_and_models_are_read(calls: Counter[str]) -> None:
    engine, other = engine_of(), engine_of("qwen2_5_vl")
    asked(engine, IT, [FILE])
    small = PictureFile(FILE.data, "here", max_side=16)
    pages = [PictureFile(THREE, "here", page=page) for page in (0, 1)]
    changed = PictureFile(FILE.data + b"\0", "here")
    for number, (of, file, owner) in enumerate(
        [
            (engine, small, b""), (engine, pages[0], b""), (engine, pages[1], b""),
            (engine, changed, b""), (engine, FILE, b"a"), (engine, FILE, b"b"), (other, FILE, b""),
        ],
        start=2,
    ):  # fmt: skip
        first, second = (asked(of, IT, [file], owner).media[0] for _ in range(2))
        assert calls["decoded"] == number
        assert first.digest == second.digest
    digests = [asked(engine, IT, [file]).media[0].digest for file in (FILE, small, *pages)]
    assert len(set(digests)) == 4


def test_positions_and_places_are_those_of_each_request() -> None:
    engine = engine_of()
    first = asked(engine, "<image> or <image>?", [FILE, OTHER])
    named = [PictureFile(file.data, name) for file, name in ((OTHER, "one"), (FILE, "two"))]
    second = asked(engine, "ab<image><image>", named)
    assert [each.param for each in second.media] == ["one", "two"]
    assert [each.digest for each in second.media] == [each.digest for each in first.media][::-1]
    for media in second.media:
        placed = tuple(second.prompt_token_ids[media.start : media.stop])
        assert placed == media.token_ids
    expected = [tiny.expected("llava", "ab<image><image>", [TWO, ONE])]
    assert run(engine, second) == expected


def test_tokens_that_depend_on_the_place_are_made_again() -> None:
    """MiniCPM-V numbers pictures; DeepSeek-VL2 has no tiles from the third one on."""
    for kind in ("minicpmv4_6", "deepseek_vl_v2"):
        engine, fresh = engine_of(kind), engine_of(kind)
        for count in (1, 2, 3, 1):
            text = "<image>" * count
            files = [OTHER] * (count - 1) + [PictureFile(file_of(WIDE), "here")]
            cache_of(fresh)._kept.clear()
            found, expected = asked(engine, text, files), asked(fresh, text, files)
            assert found.prompt_token_ids == expected.prompt_token_ids
            assert [m.digest for m in found.media] == [m.digest for m in expected.media]


def test_evicted_files_are_read_again(calls: Counter[str]) -> None:
    engine = engine_of()
    cache = cache_of(engine)
    asked(engine, IT, [FILE])
    cache._max_bytes = cache.nbytes  # each picture is as large, or smaller
    for number, (file, pixels) in enumerate([(OTHER, TWO), (FILE, ONE), (OTHER, TWO)], start=2):
        made = asked(engine, IT, [file])
        assert (calls["decoded"], len(cache._kept)) == (number, 1)
        assert run(engine, made) == [tiny.expected("llava", IT, [pixels])]
        assert 0 < cache.nbytes <= cache._max_bytes


def test_a_wrong_picture_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with one key for all files, each is taken for the same one."""
    engine = engine_of()
    right = [tiny.expected("llava", IT, [each]) for each in (ONE, TWO)]
    assert [run(engine, asked(engine, IT, [each]))[0] for each in (FILE, OTHER)] == right
    find = ProcessorCache.find
    monkeypatch.setattr(
        ProcessorCache, "find", lambda self, key, place: find(self, min(self._kept), place)
    )
    assert [run(engine, asked(engine, IT, [each]))[0] for each in (FILE, OTHER)] != right


def test_threads_at_once(calls: Counter[str]) -> None:
    """They evict each other's pictures, and none gets another one's."""
    engine, other = engine_of(), engine_of()
    files = [PictureFile(file_of(picture(seed)), f"file {seed}") for seed in range(6)]
    digests = [asked(other, IT, [file]).media[0].digest for file in files]
    cache = cache_of(engine)
    cache._max_bytes = cache_of(other).nbytes * 2 // 3

    def ask(number: int) -> bool:
        index = number * 5 % 6
        [media] = asked(engine, IT, [files[index]]).media
        return (media.digest, media.param) == (digests[index], f"file {index}")

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(96)))
    assert calls["decoded"] > 2 * len(files), "some were evicted"
    assert cache.nbytes == sum(each.nbytes for each in cache._kept.values())
    assert 0 < cache.nbytes <= cache._max_bytes


def test_a_bad_file_is_not_kept(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    for number in (1, 2):
        with pytest.raises(RequestError, match="here: the picture is"):
            asked(engine, IT, [PictureFile(FILE.data[:60], "here")])
        assert calls["decoded"] == number
    with monkeypatch.context() as patch:
        patch.setattr(PictureProcessor, "_processed", lambda *_: {})
        with pytest.raises(RequestError, match="30 x 20 pixels cannot be processed"):
            asked(engine, IT, [FILE])
    assert cache_of(engine).nbytes == 0
    assert run(engine, asked(engine, IT, [FILE])) == [tiny.expected("llava", IT, [ONE])]


def test_the_smaller_of_inputs_and_content_is_kept() -> None:
    cache = ProcessorCache(100_000)
    pixels, wide = np.zeros((10, 10, 3), np.uint8), np.zeros((1, 3, 10, 10), np.float32)
    for number, (content, inputs) in enumerate([(pixels, wide), (np.repeat(pixels, 9), wide)]):
        source = MediaSource("picture", content, (0, 1))
        media = Media(0, (1, 2), b"", {"pixel_values": inputs}, source=source)
        cache.keep((b"", b"%d" % number), PlacedFile((1, 2), (media,)))
        found = cache.find((b"", b"%d" % number), Place())
        assert found is not None
        [kept] = found.media
        assert (kept.source is None, not kept.inputs) == ((False, True), (True, False))[number]
        assert kept.nbytes == min(content.nbytes, inputs.nbytes)
    assert cache.nbytes == sum(each.nbytes for each in cache._kept.values())
    before = cache.nbytes
    large = Media(0, (1,), b"", {"pixel_values": np.zeros(100_000, np.uint8)})
    cache.keep((b"", b"large"), PlacedFile((1,), (large,)))
    assert (cache.find((b"", b"large"), Place()), cache.nbytes) == (None, before)
    assert cache.find((b"", b"0"), Place(index=1)) is None, "it was in another place"
    assert cache.find((b"a", b"0"), Place()) is None, "it is another owner's"


def test_requests_hold_less_for_a_file_that_is_kept() -> None:
    engine = engine_of("qwen2_5_vl")
    assert engine.vision is not None
    memory = engine.vision.processor.memory
    first = asked(engine, IT, [FILE])
    size = memory.nbytes
    second = asked(engine, IT, [FILE])
    assert first.media[0].nbytes == size
    assert memory.nbytes == size + ONE.pixels.nbytes
    del first, second
    assert memory.nbytes == 0


class Model:
    """Embeds every token as one number."""

    config = None

    def embed(self, token_ids: mx.array, inputs: object) -> mx.array:
        return mx.ones((token_ids.size, 4))


@pytest.mark.parametrize("error", [None, RequestError("the picture cannot be processed")])
@pytest.mark.parametrize("alone", [False, True])
def test_steps_do_not_wait_for_inputs(alone: bool, error: RequestError | None) -> None:
    """They are made once, in a thread; a sequence that cannot have them fails."""
    go, made = threading.Event(), []

    def inputs(media: Media) -> dict[str, Any]:
        made.append(threading.current_thread().name)
        assert go.wait(60)
        if error is not None:
            raise error
        return {"pixel_values": np.zeros((1, 3, 4, 4), np.float32)}

    encoder = VisionEncoder(Model(), inputs=inputs)  # type: ignore[arg-type]
    user = EngineSequence("r", [1, 2, 3, 4], SamplingParams())
    source = MediaSource("picture", ONE.pixels, (0, 1))
    media = Media(0, (1, 2, 3), b"one", {}, source=source)
    for _ in range(3):
        encoder.begin_step()
        assert not encoder.prepare(user, media, alone=alone)
    assert not encoder.take_failures()
    go.set()
    assert encoder._processing[media].exception(60) is error
    assert encoder.prepare(user, media, alone=alone) == (error is None)
    assert len(made) == 1
    assert made[0].startswith("modelpack-media")
    assert [found for _, found in encoder.take_failures()] == [error] * (error is not None)
    assert not encoder._processing


def test_few_inputs_are_made_before_steps_need_them() -> None:
    """A sequence that is preempted leaves its place to others, which it may wait for."""
    go, made = threading.Semaphore(0), list[bytes]()

    def inputs(media: Media) -> dict[str, Any]:
        made.append(media.digest)
        assert go.acquire(timeout=60)
        return {"pixel_values": np.zeros((1, 3, 4, 4), np.float32)}

    encoder = VisionEncoder(Model(), inputs=inputs)  # type: ignore[arg-type]
    user = EngineSequence("r", [1, 2, 3, 4], SamplingParams())
    source = MediaSource("picture", ONE.pixels, (0, 1))
    one, two, three = (Media(0, (1, 2, 3), b"%d" % n, {}, source=source) for n in range(3))

    def prepare(media: Media) -> bool:
        encoder.begin_step()
        ready = encoder.prepare(user, media, alone=False)
        for future in encoder._processing.values():
            go.release()
            future.result(60)
        assert len(encoder._processing) == (not ready)
        return ready

    assert [prepare(media) for media in (one, two, three, three)] == [False, False, False, True]
    assert [prepare(media) for media in (one, one)] == [False, True]
    assert made == [b"0", b"1", b"2", b"0"]


def test_text_goes_on_while_inputs_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that arrives after the picture's ends before it."""
    engine, go = engine_of(enable_prefix_caching=False), threading.Event()
    run(engine, asked(engine, IT, [FILE]))
    drop_embeddings(engine)
    make = PictureProcessor._processed

    def slow(self: PictureProcessor, source: MediaSource) -> dict[str, Any]:
        assert go.wait(60)
        return make(self, source)

    again = asked(engine, IT, [FILE])
    monkeypatch.setattr(PictureProcessor, "_processed", slow)
    engine.add_request("picture", again)
    for _ in range(3):
        assert not engine.step()
    engine.add_request("text", asked(engine, "hello", []))
    tokens: dict[str, list[int]] = {"text": [], "picture": []}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
        if len(tokens["text"]) == 8:
            go.set()
        else:
            assert not tokens["picture"]
    assert tokens["picture"] == tiny.expected("llava", IT, [ONE])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("no memory"), "here: the picture cannot be processed: no memory"),
        (OSError("of a library"), "here: the file cannot be processed: OSError"),
    ],
)
def test_inputs_that_cannot_be_made_again_fail_their_request_alone(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(enable_prefix_caching=False)
    run(engine, asked(engine, IT, [FILE]))
    drop_embeddings(engine)
    good, bad = asked(engine, IT, [OTHER]), asked(engine, MANY, [FILE])

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(PictureProcessor, "_processed", fail)
    engine.add_request("good", good)
    engine.add_request("bad", bad)
    tokens, errors = list[int](), list[Any]()
    while engine.has_work:
        for event in engine.step():
            tokens += event.token_ids
            errors += [(event.request_id, event.error)] * bool(event.error)
    assert errors == [("bad", message)]
    assert tokens == tiny.expected("llava", IT, [TWO])


def test_inputs_are_made_here_if_no_thread_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(enable_prefix_caching=False)
    run(engine, asked(engine, IT, [FILE]))
    drop_embeddings(engine)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(encoder_of(engine)._threads, "submit", refuse)
    assert run(engine, asked(engine, IT, [FILE])) == [tiny.expected("llava", IT, [ONE])]


def test_a_second_question_about_a_sound(calls: Counter[str]) -> None:
    kind = "qwen3_omni_moe"
    engine = hearing.engine_of(kind, max_num_batched_tokens=256, enable_prefix_caching=False)
    file = SoundFile(wav(tone(16_000, 0.5)), "here")

    def prompt_of(text: str) -> str:
        return text.replace("<audio>", hearing.PLACEHOLDERS[kind])

    found = []
    for text, misses in (("<audio>What is said?", 1), ("Who says <audio>?", 1), ("<audio>", 2)):
        if misses == 2:
            drop_embeddings(engine)
        made = asked(engine, text, [file], prompt_of=prompt_of)
        found.append(made.media[0])
        run(engine, made)
        assert (calls["decoded"], encoder_of(engine).misses) == (1, misses)
    assert len({media.digest for media in found}) == 1
    assert engine.vision is not None
    for name, array in engine.vision.processor.inputs(found[2]).items():
        np.testing.assert_array_equal(array, found[0].inputs[name])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "gemma4"])
def test_a_second_question_about_a_video(kind: str, calls: Counter[str]) -> None:
    engine = engine_of(kind, enable_prefix_caching=False)
    file = VideoFile(written(frames(20)), "here")
    tokens, groups = [], 0
    for number in range(3):
        if number == 2:
            drop_embeddings(engine)
        made = asked(
            engine, "<video>What?", [file], prompt_of=lambda t: watching.prompt_of(kind, t)
        )
        groups = groups or len({media.digest for media in made.media})
        tokens.append(run(engine, made))
        misses = groups * (2 if number == 2 else 1)
        assert (calls["decoded"], encoder_of(engine).misses) == (1, misses)
    assert tokens[0] == tokens[1] == tokens[2]
    assert groups > 1
