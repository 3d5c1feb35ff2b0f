"""What takes bytes from strangers, each as a function of bytes that raises nothing but our errors.

Corpus files are read from `corpus/TARGET/` and from `fixtures`.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tokenizers

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.manifest import Manifest, parse_manifest_or_index
from modelpack.artifacts.paths import checked_path
from modelpack.artifacts.reference import Reference
from modelpack.builder.files import LayerMetadata
from modelpack.bundles.tar import TarLimits
from modelpack.errors import InvalidReferenceError, ModelpackError, UnsafePathError
from modelpack.formats.dduf import read_dduf_header
from modelpack.formats.gguf import read_gguf_header
from modelpack.formats.projector import projector_type
from modelpack.formats.safetensors import read_safetensors_header
from modelpack.formats.statistics import gguf_statistics
from modelpack.operations.archives import import_archive
from modelpack.registry.auth import parse_challenges, parse_scopes
from modelpack.registry_server.blob_fetch import UnsatisfiableRange, chunk_range, requested_range
from modelpack.storage import watching
from modelpack.store.filesystem import bytes_used
from modelpack.store.index import IndexDocument
from modelpack.store.layout import LayoutStore
from modelpack_engine.errors import RequestError
from modelpack_engine.models.gguf_projector import PROJECTORS, GGUFProjector
from modelpack_engine.models.json_tokenizer import begin_check
from modelpack_engine.models.load_budget import TensorBounds
from modelpack_engine.models.model_config import normalised
from modelpack_engine.models.precision import evaluate
from modelpack_engine.templates import budget
from modelpack_engine.templates.environment import Renderer, TemplateFailedError
from modelpack_engine.templates.go_template import GoSyntaxError, as_jinja
from modelpack_engine.vision.encoder import open_vision
from modelpack_engine.vision.processor import Picture
from modelpack_engine.worker.document import MAX_PAGE_SIDE
from modelpack_engine.worker.picture import MAX_PIXELS, BadPictureError, decode
from modelpack_engine.worker.video import Sampling
from modelpack_engine.worker.workers import shared_workers
from modelpack_server.conversation.pictures import PictureFile
from modelpack_server.conversation.sounds import decode_sound
from modelpack_server.conversation.videos import VideoFile
from modelpack_server.gateway import json_bodies
from modelpack_server.gateway.bodies import look_into
from tests.engine.vision import tiny
from tests.formats.builders import as_file
from tests.unpacking.archived import GZIP, TAR, ZSTD, bundle_of
from tests.unpacking.stored import Stored, everything

HERE = Path(__file__).parent
FIXTURES = HERE.parents[2] / "fixtures"
_MIB = 1024 * 1024
# What the projectors in the corpus read of a language model.
_TEXT = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "rope_scaling": {"type": "default", "mrope_section": [2, 2, 4]},
}


def manifest(raw: bytes) -> None:
    document = parse_manifest_or_index(raw, "the manifest")
    assert document.raw == raw
    if isinstance(document, Manifest):
        for blob in document.blobs:
            with suppress(UnsafePathError):
                assert not Path(checked_path(blob.filepath or "")).is_absolute()


def config(raw: bytes) -> None:
    for media_type in media_types.MODEL_CONFIG_TYPES:
        with suppress(ModelpackError):
            parsed = ModelConfig.parse(raw, media_type)
            again = ModelConfig.parse(parsed.encode(), media_type)
            assert again.encode() == parsed.encode()


def reference(raw: bytes) -> None:
    with suppress(InvalidReferenceError):
        parsed = Reference.parse(raw.decode("utf-8", "surrogateescape"))
        if parsed.registry != "hf.co":  # `HF.co` stays that, as Docker has it, and becomes another
            assert Reference.parse(str(parsed)) == parsed


def annotations(raw: bytes) -> None:
    """The annotations of a layer: its path, and what CNCF says about its file."""
    text = raw.decode("utf-8", "surrogateescape")
    for value in (text, text.upper()):
        with suppress(ModelpackError):
            LayerMetadata.parse(value)
        with suppress(UnsafePathError):
            path = Path("/target", checked_path(value))
            assert Path("/target") in path.parents
            assert ".." not in path.parts
    with suppress(ValueError, RecursionError):
        found = {media_types.FILEPATH: json.loads(raw), "a": text}
        Descriptor.parse({"annotations": found}, "it")


def index(raw: bytes) -> None:
    document = IndexDocument.parse(raw, "index.json")
    for entry in document.entries:
        with suppress(ModelpackError):
            document.find(str(entry.digest))
        if entry.name:
            with suppress(ModelpackError):
                document.find(entry.name)
    assert IndexDocument.parse(document.encoded(), "again").encoded() == document.encoded()


def gguf(raw: bytes) -> None:
    header = read_gguf_header(as_file(raw))
    assert all(header.data_offset + t.offset + t.size <= len(raw) for t in header.tensors if t.size)
    for exact in (False, True):
        gguf_statistics([header], exact=exact)


def safetensors(raw: bytes) -> None:
    header = read_safetensors_header(as_file(raw))
    assert sum(tensor.size for tensor in header.tensors) <= len(raw)


def dduf(raw: bytes) -> None:
    read_dduf_header(as_file(raw))


def tar(raw: bytes) -> None:
    """The first byte chooses how it is packed; whatever comes out stays in the target."""
    form = {0: TAR, 1: GZIP, 2: ZSTD}[raw[0] % 3] if raw else TAR
    limits = TarLimits(max_bytes=_MIB, free_bytes=_MIB, ratio=1000, max_entries=100)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        stored = Stored(root / "store")
        inside = root / "target"
        try:
            bundle_of(stored, inside / "bundle", [(form, raw[1:])], limits=limits)
        finally:
            seen = everything(root)
            assert {path.split("/")[0] for path in seen} <= {"store", "target"}
            assert not [path for path, (kind, *_) in seen.items() if kind == "link"]
            assert sum(len(content) for _, _, content in seen.values()) < 4 * _MIB


def archive(raw: bytes) -> None:
    """A failed import leaves nothing; what is imported is sound, and no larger than it came."""
    with tempfile.TemporaryDirectory() as name:
        store = LayoutStore(Path(name) / "store")
        before = bytes_used(store.root)
        try:
            import_archive(store, io.BytesIO(raw), watching(None))
        except ModelpackError:
            assert bytes_used(store.root) - before < 100  # the process id in the lock
            assert not [*store.root.glob("blobs/*/*")]
            raise
        assert store.fsck(watch=watching(None)).ok
        assert bytes_used(store.root / "blobs") <= len(raw)


def body(raw: bytes) -> None:
    """The gateway reads of a body what Python's parser, behind it, reads of it."""
    try:
        text = json.dumps(json.loads(raw.decode(), parse_constant=_no_json), ensure_ascii=False)
        expected = repr(json.loads(text.encode(errors="replace")))  # ? for half of a surrogate pair
    except (ValueError, RecursionError):
        expected = None
    with suppress(json_bodies.ComplexityError):
        parsed, asked = look_into(raw)
        assert asked.prompt_tokens >= 0
        assert asked.answer_tokens >= 0
        assert (None if parsed is None else repr(parsed.value)) == expected
    with suppress(json_bodies.BodyError):
        assert repr(json_bodies._Reader(raw).document()) == expected


def _no_json(constant: str) -> None:
    raise ValueError(constant)


def challenge(raw: bytes) -> None:
    for one in parse_challenges(raw.decode("latin-1")):
        assert one.scheme == one.scheme.lower()
        parse_scopes(one.parameters.get("scope", ""))


def byte_range(raw: bytes) -> None:
    text = raw.decode("latin-1")
    claimed = chunk_range(text)
    assert claimed is None or claimed.length > 0
    for size in (0, 1, 1000, 2**62):
        with suppress(UnsatisfiableRange):
            part = requested_range(text, size)
            assert part is None or 0 <= part.start <= part.last < size


def template(raw: bytes) -> None:
    """A chat template, with a small budget: it ends, and writes no more than it may."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    small = {"MAX_STEPS": 2000, "MAX_VOLUME": 4 * _MIB, "MAX_SECONDS": 5.0}
    text = raw.decode("utf-8", "replace")
    with patch.multiple(budget, **small):
        for make in (str, as_jinja):
            with suppress(TemplateFailedError, GoSyntaxError, RecursionError):
                written = Renderer().render(make(text), {"messages": messages, "tools": None})
                assert len(written) <= budget.MAX_TEXT


def model_config(raw: bytes) -> None:
    """A model's config.json: brought to one spelling, which stays, and held to its tensors."""
    with suppress(ValueError, RecursionError):
        document = json.loads(raw.decode())
        if isinstance(document, dict):
            config = normalised(document)
            assert normalised(config) == config
            TensorBounds(layers=2, tensors=20, largest=256).check(config)


def tokenizer(raw: bytes) -> None:
    """A tokenizer.json that passes its check, in a process, loads and encodes here."""
    text = raw.decode("utf-8", "surrogateescape")
    begin_check(text).result()
    loaded = tokenizers.Tokenizer.from_str(text)
    for prompt in ("", "a b", "\U0001f600 <eos>\n" * 50):
        ids = loaded.encode(prompt).ids
        loaded.decode(ids, skip_special_tokens=False)


def picture(raw: bytes) -> None:
    """A picture: pixels of its size, within the limits, or one kind of error."""
    with suppress(BadPictureError):
        width, height, pixels = decode(raw)
        assert 0 < width * height <= MAX_PIXELS
        assert len(pixels) == 3 * width * height


def document(raw: bytes) -> None:
    """A PDF, in a process: it counts and draws the first page, or ends, and another goes on."""
    file = PictureFile(raw, "it", page=0)
    with shared_workers("media").reserved("fuzz") as run, suppress(RequestError):
        height, width, _ = file.decode(run, 10.0).pixels.shape
        assert 0 < max(height, width) <= MAX_PAGE_SIDE


def video(raw: bytes) -> None:
    """A video, in a process: frames of the right size, or an error, or it ends."""
    sampling = Sampling(2.0, 4, 16, 1024, 2048, 8)
    with shared_workers("video").reserved("fuzz") as run, suppress(RequestError):
        found = VideoFile(raw or b"0", "it").decode(run, sampling, 10.0)
        count, height, width, _ = found.frames.shape
        assert (height, width) == (height // 8 * 8, width // 8 * 8)
        assert count == len(found.times) <= 16


def sound(raw: bytes) -> None:
    """A sound, in a process: finite samples, or an error, or it ends, and another goes on."""
    with suppress(RequestError):
        assert np.isfinite(decode_sound(raw, "it", 16_000, owner=b"fuzz")).all()


@cache
def _table_of_tokens() -> nn.Module:
    """Return what a tower takes of a language model."""
    model = nn.Module()
    model.embed_tokens = nn.Embedding(256, _TEXT["hidden_size"])
    return model


def projector(raw: bytes) -> None:
    """A GGUF projector: refused, or it has encoded pictures of noise, and one more."""
    tokens: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        pieces = re.findall(r"<[^<>]+>|\[\w+\]|.", text, re.DOTALL)
        return [tokens.setdefault(piece, len(tokens)) for piece in pieces]

    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "p.gguf")
        path.write_bytes(raw)
        row = PROJECTORS.get(projector_type(read_gguf_header(path)) or "")
        kinds = row.text_types if row is not None and row.text_types else ("llama",)
        opened = GGUFProjector(path, {**_TEXT, "model_type": kinds[0]}, encode)
        tower = opened.tower(_table_of_tokens(), mx.float32)
        evaluate(tower)
        vision = open_vision(tower, opened.config, opened.settings, encode)
        prompt = [vision.processor.image_token_id]
        _, (media,) = vision.processor.place(prompt, [Picture(np.zeros((8, 8, 3), np.uint8))])
        rows = tiny.embeddings(vision.encoder, media)
        assert rows.shape[-1] == _TEXT["hidden_size"]
        assert mx.isfinite(rows).all()


@dataclass(frozen=True)
class Target:
    """A function of bytes, where else its corpus is, and what its inputs are made of."""

    run: Callable[[bytes], None]
    fixtures: tuple[str, ...] = ()
    words: tuple[bytes, ...] = ()

    def __call__(self, raw: bytes) -> None:
        """Run; our own errors are what is wanted."""
        with suppress(ModelpackError):
            self.run(raw)


_JSON = tuple(
    b'{ } [ ] , : null true -1 1e999 0.5 "" "\\ud800" "\\u0000" 18446744073709551616'.split()
)
_OCI = (
    *_JSON, b'"mediaType"', b'"digest"', b'"size"', b'"layers"', b'"manifests"', b'"annotations"',
    b'"Layers"', b'"sha256:../../x"', b'"../../x"', b'"org.cncf.model.filepath"', b'"subject"',
)  # fmt: skip
_HEADER = (
    b'"',
    b"\\",
    b",",
    b"=",
    b" ",
    b"\r\n",
    b"\t",
    b"Bearer ",
    b"Basic ",
    b"realm=",
    b"scope=",
)
TARGETS: dict[str, Target] = {
    "manifest": Target(manifest, ("valid/manifest/*", "invalid/manifest/*"), _OCI),
    "config": Target(config, ("valid/*config*/*", "invalid/*config*/*"), _JSON),
    "reference": Target(reference, words=tuple(b": @ / .. [ ] sha256: \xff".split())),
    "annotations": Target(
        annotations,
        ("valid/layer-metadata/*", "invalid/layer-metadata/*"),
        (*_JSON, b"../", b"/", b"\\", b"C:", b"\0", b"\xff", b".", b"\xc3\xbc"),
    ),
    "index": Target(index, ("valid/index/*", "invalid/index/*"), _OCI),
    "gguf": Target(gguf, ("models/*/*.gguf",), (b"\xff" * 8, bytes(8), b"\1" + bytes(7), b"GGUF")),
    "safetensors": Target(safetensors, ("models/*/*.safetensors",), (b"\xff" * 8, *_JSON)),
    "dduf": Target(dduf, ("models/*/*.dduf",), (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"\xff" * 4)),
    "tar": Target(
        tar, words=(b"ustar\x0000", b"../", b"/etc/passwd", b"0000777\0", b"1", b"2", b"x", b"L")
    ),
    "archive": Target(
        archive, words=(b"ustar\x0000", b"../", b"index.json", b"blobs/sha256/", b"S", b"x", b"2")
    ),
    "body": Target(
        body,
        words=(*_JSON, b'"model"', b'"Model"', b'"messages"', b'"content"', b"\xff", b"\\ud83d"),
    ),
    "challenge": Target(challenge, words=_HEADER),
    "model_config": Target(
        model_config,
        words=(*_JSON, b'"rope_parameters"', b'"rope_scaling"', b'"text_config"', b'"__float__"'),
    ),
    "tokenizer": Target(
        tokenizer,
        words=(*_JSON, b'"Sequence"', b'"Replace"', b'"Regex"', b'"Split"', b'"merges"', b"(.*)*"),
    ),
    "template": Target(
        template,
        words=(b"{{", b"}}", b"{%", b"%}", b"messages", b" | ", b"list", b"(", b"*", b"9999", b"~"),
    ),
    "picture": Target(
        picture,
        words=(b"IDAT", b"IEND", b"iCCP", b"zTXt", b"tEXt", b"acTL", b"fcTL", b"eXIf", b"Exif\0\0",
               b"II*\0", b"\xff\xda", b"\xff\xd8", b"\xff\xe1", b"\x21\xfe", b"\x2c", b"VP8X",
               b"ANIM", b"\xff" * 4, bytes(4)),
    ),
    "document": Target(
        document,
        words=(b"obj", b"endobj", b"stream\n", b"endstream", b"<<", b">>", b"/Kids", b"/Parent",
               b"/MediaBox", b"/Filter", b"/FlateDecode", b"1 0 R", b"2 0 R", b"99999999999", b"-1",
               b" re f ", b" cm ", b"/Type /Page ", b"xref", b"trailer", b"startxref", b"[", b"]"),
    ),
    "sound": Target(
        sound,
        fixtures=("sounds/*.*",),
        words=(b"RIFF", b"WAVE", b"fmt ", b"data", b"fact", b"LIST", b"fLaC", b"OggS",
               b"\x01vorbis", b"\x05vorbis", b"ID3", b"Xing", b"Info", b"\xff\xfb", b"\xff\xf8",
               bytes(4)),
    ),
    "video": Target(
        video,
        words=(b"ftyp", b"moov", b"trak", b"stts", b"stsz", b"stsd", b"avc1", b"avcC", b"elst",
               b"mdat", b"tkhd", b"co64", b"dref", b"url ", b"\x1aE\xdf\xa3", b"\xa3", bytes(4),
               b"\xff" * 4),
    ),
    "projector": Target(
        projector,
        words=(b"clip.vision.", b"clip.projector_type", b"v.blk.0.", b"v.blk.1.", b"mm.", b"\1",
               bytes(4), bytes(8), b"\xff" * 4, b"\xff" * 8, b"\x00\x00\x80\x7f"),
    ),
    "byte_range": Target(byte_range, words=(b"bytes=", b"-", b",", b"9" * 20, b"0", b" ")),
}  # fmt: skip


def seeds(name: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each file of a target's corpus."""
    paths = sorted((HERE / "corpus" / name).glob("*"))
    for pattern in TARGETS[name].fixtures:
        paths += sorted(FIXTURES.glob(pattern))
    for path in paths:
        if path.is_file() and path.stat().st_size <= 64 * 1024:
            yield path.name, path.read_bytes()
