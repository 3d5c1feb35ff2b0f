"""The detokenizer emits whole characters, exactly, up to the first stop string."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from modelpack.testing import weights
from modelpack_engine.core.detokenizer import Detokenizer, StopStrings, ending_token_ids
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.gguf_tokenizer import tokenizer_of
from modelpack_engine.request import SamplingParams


@dataclass
class Pieces:
    """A tokenizer in which token i is the i-th piece."""

    pieces: list[bytes]
    special_token_ids: frozenset[int] = frozenset()
    strips_leading_space: bool = False

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def run(tokenizer: Pieces, params: SamplingParams, **kw: bool) -> tuple[list[str], str | None]:
    """Return the deltas of each token and of the end, and the stop string."""
    detokenizer = Detokenizer(tokenizer, params, **kw)
    deltas = [detokenizer.push([token]) for token in range(len(tokenizer.pieces))]
    return [d.text for d in deltas] + [detokenizer.finish()], deltas[
        -1
    ].stopped_by if deltas else None


def search(text: str, stops: list[str], beginning: int = 0) -> tuple[str, str | None]:
    """Return the text before the stop string that ends first after `beginning`, or the longest."""
    for end in range(beginning + 1, len(text) + 1):
        if found := [s for s in stops if text[:end].endswith(s)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Split `text` at positions modulo its length; some pieces may be empty."""
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


places = st.lists(st.integers(0, 1000), max_size=30)
some_text = st.text(st.sampled_from("ab é漢🙂\n\u0301"), max_size=40)
stops = st.lists(st.text(st.sampled_from("ab é🙂"), min_size=1, max_size=4), max_size=4)


@given(some_text, stops, places)
@example("aab", ["ab"], [1, 2])
@example("aaab", ["aab", "b"], [1, 2, 3])
@example("aab ", ["aabb", "ab"], [1, 2, 3])
def test_any_split_gives_what_searching_the_whole_text_gives(
    text: str, stop: list[str], where: list[int]
) -> None:
    deltas, stopped_by = run(Pieces(cut(text.encode(), where)), SamplingParams(stop=stop))
    assert ("".join(deltas), stopped_by) == search(text, stop)


@given(st.binary(max_size=60), places)
@example(b"\xe2\x82a\xf0\x9f\x99", [1, 2, 3])
def test_any_bytes_decode_as_a_whole(data: bytes, where: list[int]) -> None:
    deltas, stopped_by = run(Pieces(cut(data, where)), SamplingParams())
    assert "".join(deltas) == data.decode("utf-8", "replace")
    assert stopped_by is None


@given(some_text, stops, places, st.integers(0, 12))
@example("ab ab", ["ab"], [1, 2, 3, 4], 9)
def test_no_more_is_held_back_than_may_become_a_stop_string(
    text: str, stop: list[str], where: list[int], min_tokens: int
) -> None:
    pieces = cut(text.encode(), where)
    params = SamplingParams(stop=stop, min_tokens=min_tokens, max_tokens=99)
    deltas, _ = run(Pieces(pieces), params)
    early = len(b"".join(pieces[:min_tokens]).decode("utf-8", "ignore"))
    given_out, data = "", b""
    for delta, piece in zip(deltas, pieces, strict=False):
        given_out, data = given_out + delta, data + piece
        so_far = data.decode("utf-8", "ignore")
        if search(so_far, stop, early)[1] is None:
            held = max(
                (n for s in stop for n in range(1, len(s)) if so_far.endswith(s[:n])), default=0
            )
            assert given_out == so_far[: len(so_far) - held]


@given(some_text, stops, places, st.integers(0, 12))
def test_min_tokens_lets_early_stop_strings_pass(
    text: str, stop: list[str], where: list[int], min_tokens: int
) -> None:
    pieces = cut(text.encode(), where)
    params = SamplingParams(stop=stop, min_tokens=min_tokens, max_tokens=99)
    early = b"".join(pieces[:min_tokens]).decode("utf-8", "ignore")
    deltas, stopped_by = run(Pieces(pieces), params)
    assert ("".join(deltas), stopped_by) == search(text, stop, beginning=len(early))


def test_several_tokens_at_once_are_as_one_by_one() -> None:
    tokenizer = Pieces([b"on", b"e st", b"o", b"p here", b" not this"])
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=["stop"]))
    delta = detokenizer.push(range(5))
    assert (delta.text, delta.stopped_by) == ("one ", "stop")
    assert detokenizer.push([4]).text == ""
    assert detokenizer.finish() == ""


def test_a_character_waits_for_its_last_byte() -> None:
    deltas, _ = run(Pieces([b"\xf0\x9f", b"\x99", b"\x82!", b"\xc3"]), SamplingParams())
    assert deltas == ["", "", "🙂!", "", "\ufffd"]


def test_the_beginning_of_a_stop_string_waits() -> None:
    pieces = Pieces([b"Hi\n", b"\nUs", b"er", b" says", b"\nUser:", b"x"])
    deltas, stopped_by = run(pieces, SamplingParams(stop=["\nUser:"]))
    assert deltas == ["Hi", "\n", "", "\nUser says", "", "", ""]
    assert stopped_by == "\nUser:"


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (1, "a"), (2, "a\ufffd")])
def test_the_last_half_character_may_stop_the_text(min_tokens: int, text: str) -> None:
    params = SamplingParams(stop=["\ufffd"], min_tokens=min_tokens)
    assert "".join(run(Pieces([b"a", b"\xe2\x82"]), params)[0]) == text


def test_special_tokens() -> None:
    pieces = Pieces([b"<s>", b"a\xc3", b"<|x|>", b"\xa9b"], special_token_ids=frozenset([0, 2]))
    assert "".join(run(pieces, SamplingParams())[0]) == "aéb"
    shown = SamplingParams(skip_special_tokens=False)
    assert "".join(run(pieces, shown)[0]) == "<s>a\ufffd<|x|>\ufffdb"


def test_a_sentencepiece_text_loses_one_leading_space() -> None:
    pieces = Pieces([b"", b"  Par", b" is"], strips_leading_space=True)
    assert "".join(run(pieces, SamplingParams())[0]) == " Par is"
    assert "".join(run(pieces, SamplingParams(), continues_text=True)[0]) == "  Par is"


BYTE_LETTERS = {
    **{b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))},
    **{b: chr(256 + n) for n, b in enumerate([*range(33), *range(127, 161), 173])},
}


@given(st.lists(st.integers(0, 255), max_size=50))
def test_equal_to_a_byte_level_tokenizer(data: list[int]) -> None:
    """Any byte sequence, valid UTF-8 or not, is decoded as by the tokenizers library."""
    tokenizer = Tokenizer(models.BPE({c: b for b, c in BYTE_LETTERS.items()}, []))
    tokenizer.decoder = decoders.ByteLevel()
    detokenizer = Detokenizer(Pieces([bytes([b]) for b in range(256)]), SamplingParams())
    assert detokenizer.push(data).text + detokenizer.finish() == tokenizer.decode(data)


@given(st.text(st.sampled_from(" aé漢🙂"), max_size=20), st.lists(st.booleans(), min_size=20))
def test_equal_to_a_sentencepiece_tokenizer(text: str, spelled: list[bool]) -> None:
    """Character tokens are mixed with characters made of byte tokens."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {"▁": 256, "a": 257, "é": 258, "漢": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    ids: list[int] = []
    for character, spell in zip(text, spelled, strict=False):
        token = vocab.get(character.replace(" ", "▁"))
        ids += list(character.encode()) if token is None or spell else [token]
    pieces = [*(bytes([b]) for b in range(256)), b" ", b"a", "é".encode(), "漢".encode()]
    detokenizer = Detokenizer(Pieces(pieces, strips_leading_space=True), SamplingParams())
    assert detokenizer.push(ids).text + detokenizer.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["a" * 20_000, "ab" * 10_000, "a" * 999 + "b" + "a" * 19_000])
def test_the_work_grows_with_the_text_alone(text: str) -> None:
    """Long stop strings that almost match everywhere take at most two steps per character."""
    automaton = StopStrings(["a" * 1000 + "c", "a" * 500 + "d"])
    moves = 0

    class Counted(list[int]):
        def __getitem__(self, key: object) -> int:  # type: ignore[override]
            nonlocal moves
            moves += 1
            return super().__getitem__(key)  # type: ignore[index, no-any-return]

    automaton._fall_back = Counted(automaton._fall_back)
    state = 0
    for character in text:
        state = automaton.step(state, character)
    assert moves <= len(text)


def test_ending_tokens() -> None:
    params = SamplingParams(stop_token_ids=[7, 9])
    assert ending_token_ids(params, {2, 9}) == {2, 7, 9}
    assert ending_token_ids(SamplingParams(stop_token_ids=[7], ignore_eos=True), {2}) == {7}


@pytest.mark.sample(1)
@pytest.mark.weights
@pytest.mark.parametrize("skip", [True, False], ids=["without specials", "with specials"])
def test_a_real_vocabulary(skip: bool) -> None:
    """Random tokens of SmolLM2, mostly invalid UTF-8, give the text of decoding all at once."""
    tokenizer = tokenizer_of(GGUFFile.open([weights.smollm2_gguf()]).metadata)
    random = Random(1)
    for _ in range(300):
        ids = [random.randrange(tokenizer.vocab_size) for _ in range(random.randrange(60))]
        ids += tokenizer.encode("naïve 漢字 🙂👩‍👩‍👧<|im_end|>\n")
        detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip))
        text = "".join(detokenizer.push([token]).text for token in ids) + detokenizer.finish()
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)
