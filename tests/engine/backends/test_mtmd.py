"""Pictures by llama.cpp's mtmd: the trained model's answers are those of our encoder."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import requests

from fixtures.pictures import model as trained
from fixtures.pictures import samples
from modelpack import package
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import Backend, EngineConfig
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.errors import (
    EngineError,
    LoadCancelledError,
    ModelLoadError,
    QueueFullError,
    RequestError,
)
from modelpack_engine.llama_cpp import mtmd
from modelpack_engine.llama_cpp.engine import LlamaCppEngine
from modelpack_engine.llama_cpp.library import choose_backend, may_run_mtmd
from modelpack_engine.llama_cpp.model import LlamaModel
from modelpack_engine.llama_cpp.mtmd import MtmdProcessor
from modelpack_engine.models import gguf_projector, load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.loader import gguf_tokenizer_of
from modelpack_engine.process_engine import ProcessEngine
from modelpack_engine.request import EngineRequest, Media, SamplingParams
from modelpack_engine.runner.base_engine import BaseEngine
from modelpack_engine.vision.processor import Picture
from modelpack_engine.vision.processor_cache import ProcessorCache
from modelpack_engine.worker import process
from modelpack_engine.worker.process import WorkerTimeoutError
from modelpack_engine.worker.threads import Cancellation, current_cancellation
from modelpack_engine.worker.workers import shared_workers
from modelpack_server import stored_models
from modelpack_server.api.app import ModelServer
from modelpack_server.conversation.pictures import PictureFile, place_pictures
from modelpack_server.conversation.served_model import RequestContext, request_context
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.stored_models import Opened, open_model
from tests.engine.vision import projectors, tiny
from tests.engine.vision.media import file_of, url
from tests.engine.worker.test_workers import until

pytest.importorskip("mlx_vlm")
pytestmark = [pytest.mark.long, pytest.mark.weights, pytest.mark.usefixtures("llama_cpp")]

GREEDY = SamplingParams(max_tokens=12, temperature=0)
DIGIT, SHAPE = samples.held_out(1, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    path = tmp_path_factory.mktemp("trained")
    text, eyes = projectors.write_trained(path)
    return ModelFiles((text,), "gguf", projector=eyes)


def written(path: Path, longest_edge: int = 64, **fields: Any) -> Path:
    """Write the trained projector with other metadata; tiles have edges of 64 pixels."""
    weights = projectors.weights_of(trained.TOWER)
    settings = {**trained.PREPROCESSOR, "size": {"longest_edge": longest_edge}}
    projectors.write_projector(path, "idefics3", trained.CONFIG, settings, weights, **fields)
    return path


def tiny_files(kind: str, directory: Path) -> ModelFiles:
    """Write the tiny model with an embedding of each token, as llama.cpp wants it."""
    settings, config = tiny.settings_of(kind), tiny.config_of(kind)
    weights = projectors.weights_of(tiny.directory(kind) / "model.safetensors")
    num_tokens = max(tiny.VOCABULARY, 256 + len(tiny.SPECIAL))
    for name, value in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = np.pad(value, ((0, num_tokens - len(value)), (0, 0)))
    part = {**config.get("text_config", config), "vocab_size": num_tokens}
    config = {**config, "text_config": part} if "text_config" in config else part
    text, eyes = directory / "text.gguf", directory / "eyes.gguf"
    projectors.write_text(text, kind, config, weights)
    projectors.write_projector(eyes, kind, config, settings, weights)
    return ModelFiles((text,), "gguf", projector=eyes)


def opened(files: ModelFiles, path: Path) -> Opened:
    store = LayoutStore(path / "store")
    request = PackageRequest(gguf=files.weights[0], mmproj=files.projector)
    made = package("reader", request, store=store)
    return open_model(str(made.digest), store=store, pull=False)


@pytest.fixture(scope="module")
def stored(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(files, tmp_path_factory.mktemp("stored"))


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(device="cpu", max_num_seqs=4, max_model_len=1024, **fields)


@pytest.fixture(scope="module")
def ours(stored: Opened) -> Engine:
    made = stored.engine(config())
    assert isinstance(made, Engine)
    assert made.vision is not None, "a projector that our encoder runs stays with it"
    return made


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Have llama.cpp compute by one thread: beside other tests, several wait for each other."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[os.getpid() % len(before)]})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def engine(stored: Opened) -> Iterator[LlamaCppEngine]:
    made = stored.engine(config(backend="llama.cpp"))
    assert isinstance(made, LlamaCppEngine)
    yield made
    made.close()


@pytest.fixture
def whole(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> LlamaCppEngine:
    """The engine with one view of each picture, as in the training.

    mtmd puts the only tile of a small Idefics 3 picture before the view of the whole, and an empty
    line between them.
    """
    processor = processor_of(engine)
    answered = processor._answer

    def cut(picture: Picture) -> dict[str, Any]:
        answer = answered(picture)
        _, tile, between, view, after = answer["parts"]
        assert tile == view == trained.TOKENS_PER_PICTURE
        return {
            "parts": [between[1:], view, after],
            "raw": answer["raw"][len(answer["raw"]) // 2 :],
        }

    monkeypatch.setattr(processor, "_answer", cut)
    return engine


def engine_of(files: ModelFiles, processor: MtmdProcessor) -> LlamaCppEngine:
    """An engine of files that no store has, for three sequences."""
    made = EngineConfig(device="cpu", max_num_seqs=3)
    tokenizer = gguf_tokenizer_of(files)
    return LlamaCppEngine(LlamaModel(files.weights), tokenizer, made, pictures=processor)


def processor_of(engine: BaseEngine) -> MtmdProcessor:
    assert isinstance(engine.picture_processor, MtmdProcessor), engine.no_vision
    return engine.picture_processor


def asked(engine: BaseEngine, text: str, *pictures: Picture) -> EngineRequest:
    text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

    def encode(part: str) -> list[int]:
        return engine.tokenizer.encode(part, add_special_tokens=False)

    if not pictures:
        return EngineRequest(encode(text), GREEDY)
    processor = engine.picture_processor
    assert processor is not None
    ids = processor.token_ids(text.replace("<image>", processor.image_token), encode)
    ids, media = processor.place(ids, pictures)
    return EngineRequest(ids, GREEDY, media=media)


def answers(engine: BaseEngine, *requests: EngineRequest) -> list[str]:
    """Run requests in one batch; return their texts."""
    found = {str(index): "" for index in range(len(requests))}
    for index, each in enumerate(requests):
        engine.add_request(str(index), each)
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            found[event.request_id] += event.text
    return list(found.values())


def one_picture(engine: BaseEngine, sample: samples.Sample, question: str) -> EngineRequest:
    return asked(engine, f"<image>{question}", Picture(sample.pixels))


def test_answers_are_those_of_our_encoder(ours: Engine, whole: LlamaCppEngine) -> None:
    """Of 60 digits and shapes that it was not trained on, as many are right."""
    held = [
        (sample, list(sample.answers)[index % len(sample.answers)])
        for index, sample in enumerate(samples.held_out(40, 20))
    ]
    found: list[list[str]] = []
    for made in (ours, whole):
        found.append([])
        for at in range(0, len(held), 4):
            found[-1] += answers(made, *(one_picture(made, *each) for each in held[at : at + 4]))
    expected = [sample.answers[question] for sample, question in held]
    right = [sum(map(str.__eq__, texts, expected)) for texts in found]
    same = sum(map(str.__eq__, *found))
    print(f"of {len(held)}: ours {right[0]}, mtmd {right[1]}, {same} the same")
    assert min(right) >= 0.95 * len(held)
    assert abs(right[0] - right[1]) <= 1


def test_embeddings_are_those_of_our_encoder(ours: Engine, whole: LlamaCppEngine) -> None:
    assert ours.vision is not None
    for sample in (DIGIT, SHAPE):
        one, two = (one_picture(made, sample, samples.WHAT) for made in (ours, whole))
        token = ours.vision.processor.image_token_id
        unread = whole.vocab_size - 1
        assert [unread if t == token else t for t in one.prompt_token_ids] == two.prompt_token_ids
        [mine], [theirs] = one.media, two.media
        made = np.array(tiny.embeddings(ours.vision.encoder, mine))
        rows = made[[at for at, t in enumerate(mine.token_ids) if t == token]]
        assert np.abs(rows - theirs.inputs["rows"]).max() < 1e-3 * np.abs(rows).max()


def test_text_beside_pictures(ours: Engine, whole: LlamaCppEngine) -> None:
    """A batch of text, one picture and two: the answers are ours, and those of each alone."""
    text = "What is the capital of France?"
    two = Picture(DIGIT.pixels), Picture(SHAPE.pixels)

    def requests(made: BaseEngine) -> list[EngineRequest]:
        return [
            asked(made, text),
            one_picture(made, DIGIT, samples.WHAT),
            asked(made, f"<image><image>{samples.WHAT}", *two),
        ]

    found = answers(whole, *requests(whole))
    assert "Paris" in found[0]
    assert found[1] == DIGIT.answers[samples.WHAT]
    assert found == [answers(whole, each)[0] for each in requests(whole)]
    assert found == answers(ours, *requests(ours))


def test_pictures_share_no_prefix(whole: LlamaCppEngine) -> None:
    """After the same picture, its cells are reused; after another one, only the text before it."""
    requests = {sample: one_picture(whole, sample, samples.WHAT) for sample in (DIGIT, SHAPE)}

    def cached(sample: samples.Sample) -> int:
        each = requests[sample]
        ids, media = list(each.prompt_token_ids), each.media
        return whole._slots.num_cached_tokens(Sequence("r", ids, GREEDY, media=media))

    whole._slots.forget_content()
    assert answers(whole, requests[DIGIT]) == [DIGIT.answers[samples.WHAT]]
    assert cached(DIGIT) == len(requests[DIGIT].prompt_token_ids) - 1
    assert cached(SHAPE) <= requests[SHAPE].media[0].start
    for sample in (SHAPE, DIGIT):
        assert answers(whole, requests[sample]) == [sample.answers[samples.WHAT]]


def test_tokens_of_tiles_are_ours(files: ModelFiles, tmp_path: Path) -> None:
    assert files.projector is not None
    eyes = written(tmp_path / "tiles.gguf", longest_edge=128)
    model = load(replace(files, projector=eyes), device="cpu")
    assert model.vision is not None
    processor = model.vision.processor
    ids, _ = processor.place([processor.image_token_id], [Picture(SHAPE.pixels)])
    made = MtmdProcessor(files.weights, eyes)
    found, media = made.place([made.image_token_id], [Picture(SHAPE.pixels)])
    made.close()
    assert len(media) == 5
    assert found == [49151 if each == processor.image_token_id else each for each in ids]


def test_a_copy_has_a_process_of_its_own(engine: LlamaCppEngine) -> None:
    processor = processor_of(engine)
    ids, media = processor.place([-1], [Picture(DIGIT.pixels)])
    copy = pickle.loads(pickle.dumps(processor))
    try:
        again, others = copy.place([-1], [Picture(DIGIT.pixels)])
    finally:
        copy.close()
    assert again == ids
    for one, two in zip(media, others, strict=True):
        assert np.array_equal(one.inputs["rows"], two.inputs["rows"])


def test_a_picture_that_takes_too_long(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request fails; the next one gets another process."""
    processor = processor_of(engine)
    processor.place([-1], [Picture(DIGIT.pixels)])
    monkeypatch.setattr(processor._worker, "call", Mock(side_effect=WorkerTimeoutError))
    with pytest.raises(RequestError, match=r"64 x 64 pixels .* took longer than 300 s"):
        processor.place([-1], [Picture(DIGIT.pixels)])
    processor.place([-1], [Picture(DIGIT.pixels)])


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda pid, _: os.kill(pid, signal.SIGKILL), "cannot be encoded: llama.cpp ended its pro"),
        (lambda _, cancellation: cancellation.set(), "the request was cancelled"),
    ],
    ids=["died", "cancelled"],
)
def test_a_process_that_ends_while_it_encodes(
    end: Callable[[int, Cancellation], None], says: str, engine: LlamaCppEngine
) -> None:
    """Its request fails alone: text is generated, and the next picture gets another process."""
    processor, cancellation = processor_of(engine), Cancellation()
    processor.place([-1], [Picture(DIGIT.pixels)])
    worker = processor._worker
    assert worker is not None

    def place() -> object:
        current_cancellation.set(cancellation)
        return processor.place([-1], [Picture(DIGIT.pixels)])

    os.kill(worker.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        failed = threads.submit(place)
        until(lambda: cancellation._end is not None)
        assert "Paris" in answers(engine, asked(engine, "What is the capital of France?"))[0]
        end(worker.pid, cancellation)
        with pytest.raises(RequestError, match=says):
            failed.result(60)
    assert not worker.is_usable
    processor.place([-1], [Picture(DIGIT.pixels)])


def test_mtmd_ends_with_the_process_of_its_engine(stored: Opened) -> None:
    engine = ProcessEngine(partial(replace(stored, store=None).engine, config(backend="llama.cpp")))
    try:
        engine.wait_until_ready()
        processor = engine.picture_processor
        assert processor is not None
        assert processor.place([-1], [Picture(DIGIT.pixels)])
    finally:
        engine.close()
    with pytest.raises(EngineError, match="the engine is stopped"):
        processor.place([-1], [Picture(DIGIT.pixels)])


def test_few_pictures_wait(engine: LlamaCppEngine) -> None:
    """Others get a 429, one whose client left is skipped, and closing fails those that wait."""
    processor = pickle.loads(pickle.dumps(processor_of(engine)))
    cancellation = Cancellation()
    cancellation.set()

    def place(cancelled: bool) -> object:
        current_cancellation.set(cancellation if cancelled else None)
        return processor.place([-1], [Picture(DIGIT.pixels)])

    with ThreadPoolExecutor(1 + mtmd._MAX_WAITING) as threads:
        with processor._lock:
            waiting = [threads.submit(place, index == 3) for index in range(threads._max_workers)]
            until(lambda: processor._places.total() == 1 + mtmd._MAX_WAITING)
            with pytest.raises(QueueFullError, match="16 pictures wait to be encoded"):
                place(False)
            waiting.pop(3)
            closing = Mock(side_effect=processor.close)
            with ThreadPoolExecutor(1) as other:
                closed = other.submit(closing)
                until(lambda: processor._closed)
                processor._lock.release()
                closed.result(60)
                processor._lock.acquire()
        for each in waiting:
            with pytest.raises(EngineError, match="the engine is stopped") as caught:
                each.result(60)
            assert not isinstance(caught.value, RequestError)
    assert processor._worker is None


def test_an_owner_takes_half_of_the_waiting_places(engine: LlamaCppEngine) -> None:
    """One picture of it may be encoded beside; requests without an owner are of any."""
    processor = pickle.loads(pickle.dumps(processor_of(engine)))
    picture, most = Picture(DIGIT.pixels), 1 + mtmd._MAX_WAITING_OF_OWNER

    def place(owner: bytes) -> object:
        return processor.place([-1], [picture], owner=owner)

    try:
        with ThreadPoolExecutor(1 + mtmd._MAX_WAITING) as threads:
            with processor._lock:
                waiting = [threads.submit(place, b"first") for _ in range(most)]
                until(lambda: processor._places == {b"first": most})
                with pytest.raises(QueueFullError, match="8 pictures of the API key wait"):
                    place(b"first")
                waiting += [threads.submit(place, owner) for owner in (b"second", *[b""] * 7)]
                until(lambda: processor._places.total() == 1 + mtmd._MAX_WAITING)
                with pytest.raises(QueueFullError, match="16 pictures wait to be encoded"):
                    place(b"third")
            assert all(each.result(60) for each in waiting)
            assert not processor._places
        with processor._turn("here", b"first"):
            assert processor._places == {b"first": 1}
        with ThreadPoolExecutor(most + 1) as threads:
            with processor._lock:
                waiting = [threads.submit(place, b"") for _ in range(most + 1)]
                until(lambda: processor._places == {b"": most + 1})
            assert all(each.result(60) for each in waiting)
    finally:
        processor.close()


def test_a_cancelled_request_starts_no_encoding(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, cancellation = processor_of(engine), Cancellation()
    cancellation.set()

    def place() -> object:
        current_cancellation.set(cancellation)
        return processor.place([-1], [Picture(DIGIT.pixels)])

    encode = Mock()
    monkeypatch.setattr(processor, "_answer", encode)
    with (
        ThreadPoolExecutor(1) as threads,
        pytest.raises(RequestError, match="messages: the request was cancelled"),
    ):
        threads.submit(place).result(60)
    encode.assert_not_called()


def test_no_worker_is_reserved_while_a_picture_is_encoded(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it takes a place of the request's owner."""
    processor, busy, owners = processor_of(engine), list[str](), list[bytes]()
    answer = processor._answer

    def watched(picture: Picture) -> dict[str, Any]:
        busy.extend(shared_workers("media")._busy)
        owners.extend(processor._places)
        return answer(picture)

    monkeypatch.setattr(processor, "_answer", watched)
    files = [PictureFile(file_of(Picture(each.pixels)), "here") for each in (DIGIT, SHAPE)]
    context = copy_context()
    context.run(request_context.set, RequestContext(b"owner"))
    _, media = context.run(place_pictures, Mock(pictures=processor), [-1, -1], files)
    assert media
    assert not busy
    assert owners == [b"owner"] * 2


def test_a_second_question_about_a_file_encodes_nothing(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, encoded = processor_of(engine), list[Picture]()
    answer = processor._answer

    def counted(picture: Picture) -> dict[str, Any]:
        encoded.append(picture)
        return answer(picture)

    monkeypatch.setattr(processor, "_answer", counted)
    monkeypatch.setattr(processor, "cache", ProcessorCache())  # without files of other tests
    files = [PictureFile(file_of(Picture(each.pixels)), "here") for each in (DIGIT, SHAPE)]
    found = [
        place_pictures(Mock(pictures=processor), [5, -1, 6, -1], [files[first], files[1 - first]])
        for first in (0, 1)
    ]
    assert len(encoded) == 2
    [one, two] = ({each.digest: each.inputs["rows"] for each in media} for _, media in found)
    assert one.keys() == two.keys()
    assert len({rows.tobytes() for rows in one.values()}) > 1
    for digest, rows in one.items():
        assert np.array_equal(rows, two[digest])
    for ids, media in found:
        assert all(tuple(ids[each.start : each.stop]) == each.token_ids for each in media)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
def test_the_process_is_the_first_to_go_without_memory(engine: LlamaCppEngine) -> None:
    processor = processor_of(engine)
    processor.place([-1], [Picture(DIGIT.pixels)])
    assert processor._worker is not None
    adjustment = Path(f"/proc/{processor._worker.pid}/oom_score_adj")
    assert adjustment.read_text().strip() == "1000"


@pytest.mark.parametrize("error", [OSError, RuntimeError, ImportError])
def test_clients_see_no_error_of_the_system(
    error: type[Exception],
    engine: LlamaCppEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = io.BytesIO()
    source = io.BytesIO(process.encoded({"files": ["weights", "projector"]}))
    with monkeypatch.context() as patch:
        patch.setattr(mtmd, "_set_up_process", lambda: None)
        patch.setattr(process, "pipes", lambda: (source, target))
        patch.setattr(mtmd, "_Projector", Mock(side_effect=error("/secret/path")))
        mtmd.main()
    target.seek(0)
    process.read(target)  # that it is ready
    answer = process.read(target)
    assert answer is not None
    processor = processor_of(engine)
    processor.place([-1], [Picture(DIGIT.pixels)])
    monkeypatch.setattr(processor._worker, "call", lambda *_: process.encoded(answer)[4:])
    with (
        caplog.at_level(logging.DEBUG, mtmd.__name__),
        pytest.raises(RequestError, match=r"cannot be encoded: the process of llama.cpp failed$"),
    ):
        processor.place([-1], [Picture(DIGIT.pixels)])
    assert "mtmd: /secret/path" in caplog.text


def test_errors_are_those_of_one_picture() -> None:
    projector = object.__new__(mtmd._Projector)
    projector._path, projector._errors, projector._pointer = (
        "eyes.gguf",
        ["of an earlier picture"],
        None,
    )
    projector._mtmd = Mock()
    projector._mtmd.mtmd_bitmap_init.return_value = None
    projector._mtmd.mtmd_input_text.return_value = ctypes.c_int()
    with pytest.raises(EngineError, match=r"^mtmd cannot cut it into tokens$"):
        projector.encode(1, 1, bytes(3))


def test_no_picture_has_a_larger_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that depend on the size of a picture; one step must have room for all of them."""
    monkeypatch.setattr(mtmd, "_PROGRAM", "tests.engine.backends.joint_mtmd")
    files = tiny_files("pixtral", tmp_path)
    assert files.projector is not None
    processor = MtmdProcessor(files.weights, files.projector)
    try:
        longest = []
        for height, width in ((64, 96), (500, 500), (300, 900), (2000, 90), (640, 480), (90, 1000)):
            _, media = processor.place([-1], [tiny.picture(1, height, width)])
            longest.append(max(each.stop - each.start for each in media))
    finally:
        processor.close()
    assert longest[0] < max(longest) <= processor.largest_span


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"clip__projector_type": "no-such"}, "mtmd cannot open it: .*no-such"),
        ({"clip__projector_type": "deepseek4v"}, "no projectors of the type 'deepseek4v'"),
        ({"clip__has_vision_encoder": False}, "of sound alone"),
        # GGML_ASSERT: llama.cpp reads this number as unsigned.
        ({"clip__vision__preproc_image_size": 64}, "by llama.cpp: llama.cpp ended its process"),
    ],
)
def test_projectors_that_do_not_run(
    fields: dict[str, Any], says: str, files: ModelFiles, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=says):
        MtmdProcessor(files.weights, written(tmp_path / "p.gguf", **fields))


def test_models_with_positions_of_three_parts(tmp_path: Path) -> None:
    files = tiny_files("qwen2_vl", tmp_path)
    assert files.projector is not None
    with pytest.raises(ModelLoadError, match="the model's tokens have M-RoPE positions"):
        MtmdProcessor(files.weights, files.projector)


def test_a_type_that_does_not_run_is_no_capability(files: ModelFiles, tmp_path: Path) -> None:
    for kind, runs in (("idefics3", True), ("deepseek4v", False)):
        eyes = written(tmp_path / f"{kind}.gguf", clip__projector_type=kind)
        assert may_run_mtmd(replace(files, projector=eyes), config(), "cpu") == runs


def test_a_projector_of_another_width(files: ModelFiles, tmp_path: Path) -> None:
    """With --backend llama.cpp the model reads text, and its note says why."""
    other = projectors.files("idefics3").projector
    assert other is not None
    made = Opened(opened(files, tmp_path).model, replace(files, projector=other))
    engine = made.engine(config(backend="llama.cpp"))
    assert "mismatch between text model (n_embd = 576) and mmproj (n_embd = 64)" in engine.no_vision
    assert f"pictures are not read: {engine.no_vision}" in engine.notes
    assert "Paris" in answers(engine, asked(engine, "What is the capital of France?"))[0]
    with pytest.raises(RequestError, match="reads no pictures"):
        engine.add_request("r", EngineRequest([1], GREEDY, media=(Media(0, (1,), b"", {}),)))
    engine.close()


def test_without_pictures_the_backend_is_the_usual_one(files: ModelFiles, tmp_path: Path) -> None:
    """llama.cpp is chosen for a projector that only it may know, and left if it does not."""
    eyes = written(tmp_path / "p.gguf", clip__projector_type="no-such")
    strange = replace(files, projector=eyes)
    assert choose_backend(strange, config(), "cpu") == "llama.cpp"
    engine = Opened(opened(files, tmp_path).model, strange).engine(config())
    assert isinstance(engine, Engine)
    assert "'no-such' is not supported" in engine.no_vision


def test_settings_that_llama_cpp_refuses(stored: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for CPUs run the model with them, and its memory is planned for both."""
    monkeypatch.setattr(gguf_projector, "runs", lambda path: False)
    many = replace(config(), max_num_seqs=300)
    assert choose_backend(stored.files, many, "cpu") == "llama.cpp"
    assert isinstance(stored.engine(many), Engine)
    with pytest.raises(EngineError, match="max_num_seqs is 300"):
        stored.engine(replace(many, backend="llama.cpp"))
    assert stored.store is not None
    assert stored.files.projector is not None
    size = sum(path.stat().st_size for path in (*stored.files.weights, stored.files.projector))
    found = StoreCatalogue(stored.store, many)._loaded_bytes(stored.store, stored.model, many)
    assert found == size + size // 8
    cancelled = Mock(side_effect=LoadCancelledError("the load was cancelled"))
    monkeypatch.setattr(stored_models, "_load_llama_cpp", cancelled)
    with pytest.raises(LoadCancelledError):
        stored.engine(many)


@pytest.mark.parametrize(("backend", "engine_process"), [("auto", False), ("llama.cpp", True)])
def test_served(
    backend: Backend,
    engine_process: bool,
    files: ModelFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through the APIs, as if our encoder did not run the projector."""
    monkeypatch.setattr(gguf_projector, "runs", lambda path: False)
    opened(files, tmp_path)
    catalogue = StoreCatalogue(
        LayoutStore(tmp_path / "store"), config(backend=backend), engine_process=engine_process
    )
    content = [
        {"type": "image_url", "image_url": {"url": url(file_of(Picture(DIGIT.pixels)))}},
        {"type": "text", "text": samples.WHAT},
    ]
    body = {"model": "reader", "messages": [{"role": "user", "content": content}],
            "max_tokens": 12, "temperature": 0}  # fmt: skip
    with ModelServer(lambda: ModelPool(catalogue), address="127.0.0.1:0") as server:
        listed = requests.get(f"{server.url}/v1/models", timeout=60).json()["data"]
        shown = requests.post(f"{server.url}/api/show", json={"model": "reader"}, timeout=60)
        answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
        content[1]["text"] = f"{mtmd._MARKER}{samples.WHAT}"
        refused = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
    assert "vision" in listed[0]["capabilities"]
    assert "vision" in shown.json()["capabilities"]
    assert answer.json()["choices"][0]["message"]["content"] == DIGIT.answers[samples.WHAT]
    assert answer.json()["usage"]["prompt_tokens"] > 2 * trained.TOKENS_PER_PICTURE
    assert refused.status_code == 400
    assert "2 placeholders <__media__> for 1 picture." in refused.json()["error"]["message"]


def test_pictures_in_both_directions(tmp_path: Path) -> None:
    """Gemma 3's: one step decodes all of a picture, whose rows then see later ones."""
    files = tiny_files("gemma3", tmp_path)
    assert files.projector is not None
    processor = MtmdProcessor(files.weights, files.projector)
    text = tiny.config_of("gemma3")["text_config"]
    assert processor.largest_span == text["mm_tokens_per_image"]
    ids, media = processor.place([5, -1, 6], [tiny.picture(1, 40, 60)])
    found = {}
    for joint in (True, False):
        changed = media if joint else tuple(replace(m, bidirectional=()) for m in media)
        engine = engine_of(files, processor)
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        engine.add_request("r", EngineRequest(ids, params, media=changed))
        entries: Any = ()
        while engine.has_work:
            for event in engine.step():
                assert event.error is None, event.error
                entries = event.prompt_logprobs or entries
        found[joint] = [entry.logprob for entry in entries if entry is not None]
        engine.close()
    assert len(found[True]) == len(ids) - 1
    assert np.abs(np.subtract(found[True], found[False])).max() > 1e-3


def test_a_type_that_only_mtmd_runs(tmp_path: Path) -> None:
    """Janus-Pro's: SigLIP, and two matrices for each patch; expected by mlx-vlm's tower.

    Prompts with three pictures in one batch are answered as each alone.
    """
    random = np.random.default_rng(7)
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "1.weight": (64, 64), "1.bias": (64,)}
    matrices = {
        f"mm.{name}": random.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    siglip = tiny.tiny_loaded("gemma3")
    projectors.write_projector(
        eyes := tmp_path / "janus.gguf", "gemma3", tiny.config_of("gemma3"),
        tiny.settings_of("gemma3"),
        projectors.weights_of(tiny.directory("gemma3") / "model.safetensors"),
        matrices=matrices, clip__projector_type="janus_pro",
    )  # fmt: skip
    files = replace(tiny_files("llava", tmp_path), projector=eyes)
    assert not gguf_projector.runs(eyes)
    assert choose_backend(files, config(), "cpu") == "llama.cpp"

    processor = MtmdProcessor(files.weights, eyes)
    assert siglip.vision is not None
    tower: Any = siglip.vision.encoder._model
    first, second = (
        (mx.array(matrices[f"mm.{i}.weight"]).T, matrices[f"mm.{i}.bias"]) for i in "01"
    )
    placed = []
    for seed in range(3):
        shown = tiny.picture(seed, 32, 32)
        placed.append(processor.place([5, -1, 6], [shown]))
        (media,) = placed[-1][1]
        hidden, *_ = tower.vision_tower(mx.array(shown.pixels[None].astype(np.float32) / 127.5 - 1))
        wanted = nn.gelu_approx(hidden[0] @ first[0] + first[1]) @ second[0] + second[1]
        rows = media.inputs["rows"]
        assert rows.shape == wanted.shape == (64, 64)
        assert np.abs(rows - np.array(wanted)).max() < 2e-3 * np.abs(rows).max()

    engine = engine_of(files, processor)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    requests = [EngineRequest(ids, params, media=media) for ids, media in placed]
    found = answers(engine, *requests)
    assert found == [answers(engine, each)[0] for each in requests]
    assert len(set(found)) == 3
    engine.close()
