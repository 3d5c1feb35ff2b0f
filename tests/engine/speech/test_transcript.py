"""Subtitles: SubRip and WebVTT, read back by readers of the formats' grammar."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.speech.transcript import Segment, as_srt, as_vtt

SEGMENTS = (
    Segment(" Hello.", 0, 1.5),
    Segment(" a ---> b\n\n\nc", 1.5, 3661.0014),
    Segment("  ", 3700, 3701),
    Segment(" <i>R&D</i>", 3700, 3699),
)


def test_srt() -> None:
    assert as_srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello.\n\n"
        "2\n00:00:01,500 --> 01:01:01,001\na -> b c\n\n"
        "3\n01:01:40,000 --> 01:01:40,000\n<i>R&D</i>\n\n"
    )


def test_vtt() -> None:
    assert as_vtt(SEGMENTS) == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.500\nHello.\n\n"
        "00:00:01.500 --> 01:01:01.001\na -&gt; b c\n\n"
        "01:01:40.000 --> 01:01:40.000\n&lt;i&gt;R&amp;D&lt;/i&gt;\n\n"
    )


def test_no_segments() -> None:
    assert as_srt(()) == ""
    assert as_vtt(()) == "WEBVTT\n\n"


@pytest.mark.parametrize("seconds", [0.0009999, 59.9996, 3599.9999])
def test_rounding_carries(seconds: float) -> None:
    [start] = re.findall(r"^(\S+) -->", as_vtt([Segment("x", seconds, seconds)]), re.MULTILINE)
    hours, minutes, rest = start.split(":")
    assert int(minutes) < 60
    assert float(rest) < 60
    assert abs(int(hours) * 3600 + int(minutes) * 60 + float(rest) - seconds) < 0.00051


_SEGMENTS = st.lists(
    st.builds(Segment, st.text(max_size=40), st.floats(0, 1e5, allow_nan=False), st.floats(0, 1e5)),
    max_size=5,
)


@given(_SEGMENTS)
def test_any_text_is_one_cue(segments: list[Segment]) -> None:
    texts = [" ".join(one.text.split()) for one in segments]
    texts = [re.sub("-{2,}>", "->", text) for text in texts if text]
    blocks = as_srt(segments).split("\n\n")[:-1]
    assert [block.split("\n")[0] for block in blocks] == [str(n + 1) for n in range(len(texts))]
    assert [block.split("\n")[2:] for block in blocks] == [[text] for text in texts]
    header, *cues = as_vtt(segments).split("\n\n")[:-1]
    assert header == "WEBVTT"
    for cue, text in zip(cues, texts, strict=True):
        times, line = cue.split("\n")
        assert re.fullmatch(r"\d{2,}:\d\d:\d\d\.\d{3} --> \d{2,}:\d\d:\d\d\.\d{3}", times)
        assert html.unescape(line) == text
        assert "-->" not in line
