"""The fixtures equal the output of their script, and the small models are valid."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
from gguf import GGUFReader

from modelpack.errors import WeightFormatError
from modelpack.formats.gguf import GGUFHeader, read_gguf_header
from modelpack.formats.safetensors import SafetensorsHeader, read_safetensors_header

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
MADE = ("valid", "invalid", "models")


def contents(root: Path) -> dict[str, bytes]:
    paths = [path for folder in MADE for path in (root / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in [*paths, root / "README.md"]}


def test_the_script_makes_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-B", str(FIXTURES / "make.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    made, kept = contents(tmp_path), contents(FIXTURES)
    assert len(made) > 300
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []


# The published size and SHA-256 of the vectors' inputs.
PUBLISHED = """
tiny-gguf/tiny.gguf 256
d1bdb851bdd707d5d2fc1e6dbb3db8a0e4489cdc42616f551c6eb0943e18b14b
tiny-gguf/LICENSE.txt 4
adc37366f403835c1470ab2df93d3837d4719372fc1ef8593d922e06f033f8b2
tiny-safetensors/model.safetensors 172
094524b905dca44dafe85d769ee5cf99f3c3521e1e11c9dde02e698bd9d6a867
tiny-safetensors/LICENSE 4
adc37366f403835c1470ab2df93d3837d4719372fc1ef8593d922e06f033f8b2
tiny-safetensors/chat_template.jinja 15
7f3de14b4a359865a98f84be7a9314754b7e14e8e23524e2553e4effaa9d18e1
tiny-safetensors/config.json 31
9c0705523170235d12708ed1430a19e39cfe8f43668661d278bc224ca8a7c77f
tiny-safetensors/sub/README.md 7
da0f266deed7c2c66f4708aa801d1ecd4aa289d2ee87e9c4525b30c8cba9ac88
"""
ROWS = list(zip(*[iter(PUBLISHED.split())] * 3, strict=True))


@pytest.mark.parametrize(("path", "size", "digest"), ROWS, ids=[row[0] for row in ROWS])
def test_inputs_of_the_published_vectors(path: str, size: str, digest: str) -> None:
    content = (FIXTURES / "models" / path).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (int(size), digest)


def weights(suffix: str, *, broken: bool) -> list[str]:
    models = FIXTURES / "models"
    found = (path.relative_to(models) for path in models.rglob(f"*.{suffix}"))
    return sorted(str(path) for path in found if path.parts[0].startswith("broken-") == broken)


READERS: dict[str, Callable[[Path], GGUFHeader | SafetensorsHeader]] = {
    ".gguf": read_gguf_header,
    ".safetensors": read_safetensors_header,
}
GOOD = weights("gguf", broken=False) + weights("safetensors", broken=False)
BROKEN = weights("gguf", broken=True) + weights("safetensors", broken=True)


@pytest.mark.parametrize("path", GOOD)
def test_our_readers_read_the_good_files(path: str) -> None:
    header = READERS[Path(path).suffix](FIXTURES / "models" / path)
    assert len(header.tensors) >= 1


@pytest.mark.parametrize("path", BROKEN)
def test_our_readers_refuse_the_broken_files(path: str) -> None:
    with pytest.raises(WeightFormatError) as caught:
        READERS[Path(path).suffix](FIXTURES / "models" / path)
    assert path in str(caught.value)


@pytest.mark.parametrize("path", weights("safetensors", broken=False))
def test_the_safetensors_library_reads_the_good_files(path: str) -> None:
    tensors = safetensors.deserialize((FIXTURES / "models" / path).read_bytes())
    assert len(tensors) >= 1


@pytest.mark.parametrize("path", weights("safetensors", broken=True))
def test_the_safetensors_library_refuses_the_broken_files(path: str) -> None:
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize((FIXTURES / "models" / path).read_bytes())


# The gguf library knows neither version 1 nor version 4.
GOOD_GGUF = [path for path in weights("gguf", broken=False) if not path.startswith("gguf-v1/")]


@pytest.mark.parametrize("path", GOOD_GGUF)
def test_the_gguf_library_reads_the_good_files(path: str) -> None:
    reader = GGUFReader(FIXTURES / "models" / path)
    architecture = reader.get_field("general.architecture")
    tensor = reader.tensors[0]
    assert architecture is None or architecture.contents() in ("llama", "clip")
    first = 8.0 * int(match[1]) - 8 if (match := re.search(r"-(\d{5})-of-", path)) else 0.0
    assert tensor.data.flat[0] == first
    assert tensor.data.flat[1] == first + 1


def test_every_weight_of_a_broken_model_is_looked_at_by_somebody() -> None:
    assert len(weights("gguf", broken=True)) >= 8
    assert len(weights("safetensors", broken=True)) >= 8
    assert len(GOOD_GGUF) >= 8
