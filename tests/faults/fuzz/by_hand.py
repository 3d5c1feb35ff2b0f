#!/usr/bin/env python3
"""Fuzz one target guided by coverage, as long as you like: see README.md.

python -m tests.faults.fuzz.by_hand TARGET [WORK] [-max_total_time=600 ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["modelpack"]):
    from tests.faults.fuzz.targets import TARGETS, seeds


def main() -> None:
    """Copy the corpus into WORK (a temporary directory) and let libFuzzer have it."""
    name, *rest = sys.argv[1:]
    work = Path(rest.pop(0) if rest and rest[0][0] != "-" else tempfile.mkdtemp(prefix="fuzz-"))
    work.mkdir(parents=True, exist_ok=True)
    for file, content in seeds(name):
        (work / file).write_bytes(content)
    dictionary = work.with_name(f"{work.name}.dict")
    words = ("".join(f"\\x{byte:02x}" for byte in word) for word in TARGETS[name].words)
    dictionary.write_text("".join(f'"{word}"\n' for word in words))
    limits = ["-timeout=20", "-rss_limit_mb=1024", "-max_len=65536", f"-dict={dictionary}"]
    atheris.Setup([sys.argv[0], *limits, *rest, str(work)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
