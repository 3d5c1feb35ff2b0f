"""Statistics of GGUF files: exact ones, and Modelpack's improvements."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.errors import PackagingError, WeightFormatError
from modelpack.formats.gguf import ValueType
from modelpack.formats.statistics import gguf_statistics
from tests.formats.builders import GGUF, Pair, Tensor, array_pair, text_pair
from tests.formats.vectors import TINY_GGUF, VECTOR_A, as_config, put

V = ValueType
BOTH = pytest.mark.parametrize("exact", [False, True])


class TestGGUFMap:
    def map(self, tmp_path: Path, *pairs: Pair) -> dict[str, str]:
        path = put(tmp_path, "m.gguf", GGUF(pairs, [Tensor("x")]).build())
        maps = [gguf_statistics([path], exact=exact).gguf for exact in (False, True)]
        assert maps[0] == maps[1]
        assert maps[0] is not None
        return dict(maps[0])

    def test_values(self, tmp_path: Path) -> None:
        pairs = [
            Pair("i", V.INT8, -3),
            Pair("u", V.UINT64, 2**64 - 1),
            Pair("f", V.FLOAT32, 1e-5),
            Pair("d", V.FLOAT64, float("inf")),
            Pair("b", V.BOOL, True),
            text_pair(" s\u00a0", "\u2003text <&>\n"),
            array_pair("ai", V.INT32, [1, -2, 3]),
            array_pair("as", V.STRING, [" a", "b, c "]),
            array_pair("ab", V.BOOL, [True, False]),
            array_pair("empty", V.UINT8, []),
            array_pair("nested", V.ARRAY, [(V.UINT8, [1])]),
            array_pair("fifty", V.UINT8, [1] * 50),
            array_pair("more", V.UINT8, [1] * 51),
            array_pair("many nested", V.ARRAY, [(V.UINT8, [1])] * 51),
        ]
        assert self.map(tmp_path, *pairs) == {
            "ab": "true, false",
            "ai": "1, -2, 3",
            "as": "a, b, c",
            "b": "true",
            "d": "+Inf",
            "empty": "",
            "f": "0.000010",
            "fifty": ", ".join(["1"] * 50),
            "i": "-3",
            "nested": "",
            "s": "text <&>",
            "u": "18446744073709551615",
        }

    def test_sorted_by_bytes(self, tmp_path: Path) -> None:
        keys = ["b", "B", "ä", "😀", "\uffee", "a.b"]
        found = self.map(tmp_path, *(text_pair(key, "x") for key in keys))
        assert list(found) == ["B", "a.b", "b", "ä", "\uffee", "😀"]


def test_shards_are_one_model(tmp_path: Path) -> None:
    shards = [
        GGUF(
            [
                text_pair("general.architecture", "qwen2"),
                Pair("general.file_type", V.UINT32, 15),
                text_pair("both", "first"),
                Pair("split.no", V.UINT16, 0),
                Pair("split.count", V.UINT16, 2),
            ],
            [Tensor("n", (3,)), Tensor("a", (256, 2), 12)],
        ),
        GGUF(
            [
                text_pair("both", "second"),
                Pair("general.file_type", V.UINT32, 2),
                Pair("split.no", V.UINT16, 1),
                Pair("split.count", V.UINT16, 2),
                Pair("qwen2.context_length", V.UINT64, 32768),
            ],
            [Tensor("b", (256, 4), 12)],
        ),
    ]
    paths = [
        put(tmp_path, f"m-{at:05d}-of-00002.gguf", shard.build())
        for at, shard in enumerate(shards, 1)
    ]
    for exact in (False, True):
        statistics = gguf_statistics(paths[::-1], exact=exact)
        assert statistics.gguf == {
            "both": "second",
            "general.architecture": "qwen2",
            "general.file_type": "2",
            "qwen2.context_length": "32768",
            "split.count": "2",
        }
        assert statistics.quantization == "MOSTLY_Q4_K_M"
        assert (statistics.architecture, statistics.context_size) == ("qwen2", 32768)
        assert statistics.parameters == "1.54K"
    assert statistics.size == "896B"  # with the 20 bytes of padding behind `n`
    assert gguf_statistics(paths).size == "876B"
    with pytest.raises(PackagingError, match=r"missing m-00002-of-00002\.gguf"):
        gguf_statistics(paths[:1])


def test_a_lone_shard_under_another_name(tmp_path: Path) -> None:
    raw = GGUF([Pair("split.count", V.UINT16, 3)], [Tensor("x")]).build()
    path = put(tmp_path, "model.gguf", raw)
    with pytest.raises(WeightFormatError, match=r"split\.count expects 3 shards, found 1"):
        gguf_statistics([path])
    # llama-gguf-split leaves a zero in a merged file.
    raw = GGUF([Pair("split.count", V.UINT16, 0)], [Tensor("x")]).build()
    gguf_statistics([put(tmp_path, "model.gguf", raw)])


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ([Pair("split.no", V.UINT16, 0), Pair("split.count", V.UINT16, 2)], "split.no is 0, as in"),
        ([Pair("split.no", V.UINT16, 2), Pair("split.count", V.UINT16, 2)], "split.no is 2 of 2"),
        ([text_pair("general.name", "another model")], "split.count is missing"),
        ([Pair("split.count", V.UINT16, 3)], "split.count expects 3 shards, found 2"),
    ],
)
def test_another_file_in_the_place_of_a_shard(
    tmp_path: Path, second: list[Pair], problem: str
) -> None:
    first = [Pair("split.no", V.UINT16, 0), Pair("split.count", V.UINT16, 2)]
    paths = [
        put(tmp_path, f"m-{at:05d}-of-00002.gguf", GGUF(pairs, [Tensor(f"t{at}")]).build())
        for at, pairs in enumerate((first, second), 1)
    ]
    with pytest.raises(WeightFormatError, match=problem):
        gguf_statistics(paths)


ARCHITECTURES = [
    ({}, "x.weight", "llama", 7),
    ({"general.architecture": " mamba "}, "x.weight", "mamba", 9),
    ({"general.architecture": "sd3"}, "x.weight", "llama", None),
    ({"general.architecture": "sd3"}, "double_blocks.0.weight", "diffusion", None),
    ({}, "decoder.x", "diffusion", None),
    ({"general.architecture": "mamba"}, "decoder.x", "mamba", None),
    ({"general.type": "imatrix"}, "x", "imatrix", None),
    ({"general.type": "adapter", "general.architecture": "mamba"}, "x", "mamba", None),
    ({"general.architecture": "clip"}, "x", "clip", None),
    ({"general.architecture": "controlvector", "controlvector.model_hint": "qwen2"}, "x",
     "qwen2", None),
]  # fmt: skip


@BOTH
@pytest.mark.parametrize(("texts", "tensor", "architecture", "context"), ARCHITECTURES)
def test_architecture_and_context(
    tmp_path: Path,
    texts: dict[str, str],
    tensor: str,
    architecture: str,
    context: int | None,
    exact: bool,
) -> None:
    pairs = [text_pair(key, value) for key, value in texts.items()]
    pairs += [
        Pair("llama.context_length", V.UINT32, 7),
        Pair("mamba.context_length", V.FLOAT32, 9.9),
        Pair("clip.context_length", V.UINT32, 8),
        Pair("controlvector.context_length", V.UINT32, 8),
    ]
    path = put(tmp_path, "m.gguf", GGUF(pairs, [Tensor(tensor)]).build())
    statistics = gguf_statistics([path], exact=exact)
    assert (statistics.architecture, statistics.context_size) == (architecture, context)


@BOTH
@pytest.mark.parametrize("size", [0, 2**31, 2**63, -1])
def test_context_sizes_out_of_range(tmp_path: Path, size: int, exact: bool) -> None:
    kind = V.INT32 if size < 0 else V.UINT64
    raw = GGUF([Pair("llama.context_length", kind, size)], [Tensor("x")]).build()
    path = put(tmp_path, "m.gguf", raw)
    assert gguf_statistics([path], exact=exact).context_size is None


@BOTH
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair("general.architecture", V.UINT32, 1), "is of type UINT32, expected a string"),
        (text_pair("general.file_type", "Q4_0"), "is of type STRING, expected a number"),
        (Pair("llama.context_length", V.BOOL, True), "is of type BOOL, expected a number"),
        (array_pair("llama.context_length", V.UINT8, [1]), "of type ARRAY, expected a number"),
    ],
)
def test_metadata_of_the_wrong_type(tmp_path: Path, pair: Pair, message: str, exact: bool) -> None:
    path = put(tmp_path, "m.gguf", GGUF([pair], [Tensor("x")]).build())
    with pytest.raises(WeightFormatError, match=message) as caught:
        gguf_statistics([path], exact=exact)
    assert caught.value.path == str(path)
    assert caught.value.offset == 24 + 8 + len(pair.key) + 4


# general.file_type, exact quantization, Modelpack's quantization.
FILE_TYPES = [
    (0, "MOSTLY_F32", "MOSTLY_F32"),
    (1, "MOSTLY_F16", "MOSTLY_F16"),
    (4, "MOSTLY_Q4_1_SOME_F16", "MOSTLY_Q4_1_SOME_F16"),
    (15, "MOSTLY_Q4_K_M", "MOSTLY_Q4_K_M"),
    (32, "MOSTLY_BF16", "MOSTLY_BF16"),
    (38, "MOSTLY_MXFP4", "MOSTLY_MXFP4"),
    (39, "MOSTLY_Q8_0", "MOSTLY_NVFP4"),
    (40, "GGUFFileType(40)", "MOSTLY_Q1_0"),
    (41, "GGUFFileType(41)", "GGUFFileType(41)"),
    (1024, "GGUFFileType(1024)", "MOSTLY_Q8_0"),
    (1024 + 7, "GGUFFileType(1031)", "MOSTLY_Q8_0"),
    (2**32 + 2, "MOSTLY_Q4_0", "MOSTLY_Q4_0"),
]


@pytest.mark.parametrize(("number", "exact", "ours"), FILE_TYPES)
def test_file_types(tmp_path: Path, number: int, exact: str, ours: str) -> None:
    pairs = [Pair("general.file_type", V.UINT64, number)]
    raw = GGUF(pairs, [Tensor("blk.0.weight", (32,), 8)]).build()
    path = put(tmp_path, "m.gguf", raw)
    assert gguf_statistics([path], exact=True).quantization == exact
    assert gguf_statistics([path]).quantization == ours


F32, F16, Q4_0, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K = 0, 1, 2, 8, 10, 11, 12, 13, 14
IQ2_XS, IQ3_XXS, IQ3_S, IQ2_S, IQ4_XS, I8 = 17, 18, 21, 22, 23, 24

GUESSES = [
    ([], "Unknown"),
    ([F32] * 3, "MOSTLY_F32"),
    ([F32] * 3 + [F16], "MOSTLY_F16"),
    ([Q4_0, Q4_0, F16], "MOSTLY_Q4_0"),
    ([I8], "Unknown"),
    ([Q2K] * 3 + [Q3K] * 2, "MOSTLY_Q2_K"),
    ([Q2K] * 3 + [Q3K] * 2 + [Q5K], "MOSTLY_Q2_K_S"),
    ([Q3K] * 3, "MOSTLY_Q3_K_S"),
    ([Q3K] * 3 + [Q4K] * 2, "MOSTLY_Q3_K_M"),
    ([Q3K] * 3 + [Q5K] * 2, "MOSTLY_Q3_K_L"),
    ([Q3K] * 4 + [Q5K] * 2 + [Q4K], "MOSTLY_Q3_K_S"),
    ([Q3K] * 3 + [Q8_0], "MOSTLY_Q3_K_L"),
    ([Q4K] * 3 + [Q6K], "MOSTLY_Q4_K_S"),
    ([Q4K] * 3 + [Q6K] * 2, "MOSTLY_Q4_K_M"),
    ([Q4K] * 3 + [Q3K] * 2, "MOSTLY_Q3_K_M"),
    ([Q5K] * 3, "MOSTLY_Q5_K_S"),
    ([Q5K] * 3 + [Q6K] * 2, "MOSTLY_Q5_K_M"),
    ([Q6K], "MOSTLY_Q6_K"),
    ([IQ2_XS] * 3, "MOSTLY_IQ2_XS"),
    ([IQ2_XS] * 3 + [IQ4_XS] * 2, "MOSTLY_IQ2_S"),
    ([IQ2_S], "MOSTLY_IQ2_M"),
    ([IQ3_S] * 3, "MOSTLY_IQ3_S"),
    ([IQ3_S] * 3 + [IQ3_XXS] * 2, "MOSTLY_IQ3_XS"),
]


@BOTH
@pytest.mark.parametrize(("types", "expected"), GUESSES)
def test_guesses(tmp_path: Path, types: list[int], expected: str, exact: bool) -> None:
    tensors = [Tensor(f"blk.{at}.w", (256,), kind) for at, kind in enumerate(types)]
    # Names that do not count for the quantization.
    tensors += [Tensor(f"rope_freqs.{at}", (256,), 30) for at in range(9)]
    path = put(tmp_path, "m.gguf", GGUF([], tensors).build())
    assert gguf_statistics([path], exact=exact).quantization == expected


@BOTH
def test_guesses_for_diffusion_models(tmp_path: Path, exact: bool) -> None:
    tensors = [Tensor("decoder.a.weight"), Tensor("blk.0.b", (8,), 1), Tensor("c_norm", (8,), 1)]
    path = put(tmp_path, "m.gguf", GGUF([], tensors).build())
    assert gguf_statistics([path], exact=exact).quantization == "MOSTLY_F32"


UNREADABLE = [
    ("big endian", GGUF([text_pair("k", "v" * 99)], [Tensor("x")], order=">")),
    ("a new tensor type", GGUF([text_pair("k", "v" * 99)], [Tensor("x", (64,), 40)])),
    ("an empty string", GGUF([text_pair("k", "")], [Tensor("x", (999,))])),
    ("an empty token", GGUF([array_pair("k", V.STRING, ["a", ""] * 200)], [Tensor("x")])),
    ("short pairs", GGUF([Pair(str(at), V.UINT8, 1) for at in range(50)])),
]


@pytest.mark.parametrize("file", [row[1] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
def test_what_the_reference_cannot_read(tmp_path: Path, file: GGUF) -> None:
    path = put(tmp_path, "m.gguf", file.build())
    statistics = gguf_statistics([path], exact=True)
    assert as_config(statistics) == '{"format":"gguf"}'
    assert statistics.notes == (
        f"Docker Model Runner cannot read {path}: the config holds the format only",
    )
    assert gguf_statistics([path]).parameters


def test_the_old_big_endian_magic_is_exact(tmp_path: Path) -> None:
    file = GGUF([text_pair("k", "v" * 99)], [Tensor("x")], order=">", magic=b"FUGG")
    path = put(tmp_path, "m.gguf", file.build())
    assert as_config(gguf_statistics([path], exact=True)) == as_config(gguf_statistics([path]))


def test_sizes_that_wrap(tmp_path: Path) -> None:
    path = put(tmp_path, "m.gguf", GGUF([text_pair("k", "v" * 50)], data=False).build())
    assert gguf_statistics([path], exact=True).size == "16384PiB"
    assert gguf_statistics([path]).size == "0B"


def test_a_projector_beside_the_model(tmp_path: Path) -> None:
    projector = GGUF([text_pair("general.architecture", "clip")], [Tensor("v", (99,))])
    paths = [
        put(tmp_path, "a-mmproj.gguf", projector.build()),
        put(tmp_path, "model.gguf", TINY_GGUF),
    ]
    assert as_config(gguf_statistics(paths)) == VECTOR_A
    assert gguf_statistics(paths, exact=True).architecture == "clip"
    assert gguf_statistics(paths[:1]).architecture == "clip"


def test_long_texts_are_left_out_and_said_so(tmp_path: Path) -> None:
    pairs = [text_pair("tokenizer.huggingface.json", "x" * 70_000), text_pair("k", "v")]
    path = put(tmp_path, "m.gguf", GGUF(pairs, [Tensor("x")]).build())
    statistics = gguf_statistics([path])
    assert statistics.gguf == {"k": "v"}
    assert statistics.notes == (
        "tokenizer.huggingface.json of 70000 characters is left out of the config",
    )
    exact = gguf_statistics([path], exact=True)
    assert exact.gguf
    assert len(exact.gguf["tokenizer.huggingface.json"]) == 70_000
