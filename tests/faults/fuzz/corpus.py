"""Make the corpus files that no fixture gives: `python -m tests.faults.fuzz.corpus`.

What a fuzzer finds is added by hand, under a name that says what it is.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.contract.parts import small_model
from tests.unpacking.tars import (
    END,
    file,
    folder,
    gnu_name,
    gnu_sparse,
    gzipped,
    header,
    pax,
    zstandard_of,
)

HERE = Path(__file__).parent / "corpus"


def _tokenizer(**parts: object) -> bytes:
    """Return a small tokenizer.json of five tokens."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, " ": 3}, "merges": [["a", "b"]]}
    special = {"id": 4, "content": "<eos>", "special": True, "single_word": False,
               "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    document = {"version": "1.0", "added_tokens": [special], "model": model, **parts}
    return json.dumps(document).encode()


_DIGEST = b"sha256:" + b"0" * 64
_MODEL = small_model(b"weights")
_INDEX = b'{"schemaVersion":2,"manifests":[{"mediaType":"%s","digest":"%s","size":%d}]}' % (
    _MODEL.descriptor.media_type.encode(),
    str(_MODEL.digest).encode(),
    _MODEL.descriptor.size,
)
_BLOBS = b"".join(
    file(b"blobs/sha256/" + digest.encoded.encode(), content)
    for digest, content in sorted(_MODEL.contents.items())
)
_MANIFEST = file(b"blobs/sha256/" + _MODEL.digest.encoded.encode(), _MODEL.manifest.raw)
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
    "archive": {
        "docker": _BLOBS + file(b"manifest.json", _MODEL.manifest.raw) + END,
        "layout": _BLOBS + _MANIFEST + file(b"index.json", _INDEX) + END,
        "no-blobs": _MANIFEST + file(b"index.json", _INDEX) + END,
        "sparse": _BLOBS + gnu_sparse(b"manifest.json", 3 << 30) + END,
        "link": _BLOBS + header(b"manifest.json", kind=b"2", link=b"/etc/passwd") + END,
        "sparse-pax": pax({b"GNU.sparse.map": b"0,1", b"GNU.sparse.size": b"9"}) + _BLOBS + END,
    },
    "body": {
        "chat": b'{"model":"a","max_tokens":9,"messages":[{"role":"user","content":"hi \\u00fc"}]}',
        "twice": b'{"model":"a","Model":"b","model":"c"}',
        "ids": b'{"model": "a", "prompt": [1, 2, 3], "n": 1e2, "x": [-0.5, null, true]}',
        "surrogates": b'["\\ud83d\\ude00", "\\ud83d", "\xf0\x9f\x98\x80"]',
    },
    "model_config": {
        "transformers-4": b'{"model_type":"llama","hidden_size":64,"num_hidden_layers":2,'
        b'"rope_theta":1e4,"rope_scaling":{"type":"linear","factor":2.0},"torch_dtype":"float32"}',
        "transformers-5": b'{"model_type":"gemma3_text","dtype":"float32","rope_parameters":'
        b'{"full_attention":{"rope_type":"default","rope_theta":1e6},'
        b'"sliding_attention":{"rope_type":"default","rope_theta":1e4}}}',
        "nested": b'{"model_type":"qwen3_5","text_config":{"vocab_size":99,"rope_parameters":'
        b'{"rope_theta":{"__float__":"Infinity"},"partial_rotary_factor":0.25}}}',
    },
    "tokenizer": {
        "bytes": _tokenizer(),
        "replace": _tokenizer(normalizer={
            "type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"
        }),
        "sequence": _tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True},
        ]}),
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
