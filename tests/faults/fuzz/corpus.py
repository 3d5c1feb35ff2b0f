"""Make the corpus files that no fixture gives: `python -m tests.faults.fuzz.corpus`.

What a fuzzer finds is added by hand, under a name that says what it is.
"""

from __future__ import annotations

from pathlib import Path

from tests.unpacking.tars import END, file, folder, gnu_name, gzipped, header, pax, zstandard_of

HERE = Path(__file__).parent / "corpus"
_DIGEST = b"sha256:" + b"0" * 64
_TAR = folder(b"d") + file(b"d/a", b"xyz") + END
FILES: dict[str, dict[str, bytes]] = {
    "reference": {
        "bare": b"smol",
        "tag": b"ai/smol:135M-Q4_K_M",
        "host": b"registry.example:5000/a/b/c:v1@" + _DIGEST,
        "ipv6": b"[::1]:5000/a:b",
        "digest": b"a/b@" + _DIGEST,
        "huggingface": b"hf.co/Org/Model-GGUF:Q8_0",
        "id": b"0123456789ab",
    },
    "tar": {
        "plain": b"\0" + _TAR,
        "gzip": b"\1" + gzipped(_TAR),
        "zstd": b"\2" + zstandard_of(_TAR),
        "pax": b"\0" + pax({b"path": b"p" * 120, b"size": b"3"}) + file(b"a", b"xyz") + END,
        "gnu": b"\0" + gnu_name(b"q" * 200) + file(b"b", b"y" * 600) + END,
        "link": b"\0" + header(b"a", kind=b"2", link=b"..") + file(b"a/x", b"out") + END,
        "hard-link": b"\0" + header(b"a", kind=b"1", link=b"../../x") + END,
        "climbs": b"\0" + file(b"../../x", b"out") + END,
        "device": b"\0" + header(b"a", kind=b"3") + END,
    },
    "challenge": {
        "bearer": b'Bearer realm="https://auth.example/token",service="r",scope="repository:a/b:pull"',
        "two": b'Basic realm="a, b", Bearer realm="x",error="insufficient_scope"',
        "token68": b"Negotiate abc==, Basic",
        "quotes": b'Digest a="\\"\\\\",b=c,,',
    },
    "byte_range": {
        "first": b"bytes=0-499",
        "last": b"bytes=-500",
        "open": b"bytes=500-",
        "chunk": b"0-1023",
        "several": b"bytes=0-1,3-4",
        "huge": b"bytes=0-99999999999999999999",
    },
}  # fmt: skip


def main() -> None:
    """Write the files."""
    for target, files in FILES.items():
        (HERE / target).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (HERE / target / name).write_bytes(content)


if __name__ == "__main__":
    main()
