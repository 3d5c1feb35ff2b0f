"""Importing the engine loads no transformers, and keeps the limit of open files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

LIMITS = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (700, 3000))\n"
ENGINE = "import modelpack_engine.engine, sys\n"


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_engine_loads_no_transformers() -> None:
    found = run(
        ENGINE + "print('transformers' in sys.modules, 'mlx_lm.models.cache' in sys.modules)"
    )
    assert found == "False True"


@pytest.mark.parametrize(
    "use",
    [
        "import mlx_lm; mlx_lm.load",
        "import mlx_lm; assert mlx_lm.__version__",
        "from mlx_lm import stream_generate",
        "import mlx_lm; assert not hasattr(mlx_lm, 'nothing') and mlx_lm.__version__",
    ],
)
def test_the_rest_of_mlx_lm_is_there_for_who_asks(use: str) -> None:
    """Limits that are lower than those that mlx-lm sets are kept."""
    same = "print(resource.getrlimit(resource.RLIMIT_NOFILE), type(sys.modules['mlx_lm']).__name__)"
    assert run(f"{LIMITS}{ENGINE}{use}\n{same}") == "(700, 3000) module"


@pytest.mark.parametrize("name", ["generate", "convert"])
def test_functions_named_as_their_submodules(name: str) -> None:
    use = f"import mlx_lm.{name} as it; from mlx_lm import {name} as same; print(it is same, it)"
    assert run(ENGINE + use).startswith(f"True <function {name} at")


def test_the_loader_of_safetensors_leaves_the_limits_alone() -> None:
    code = (
        "from modelpack_engine.patches.mlx_lm_imports import kept_file_limit\n"
        "with kept_file_limit():\n    import mlx_lm.utils\n"
        "now = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (600, 3000))\n"
        "print(now, resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert run(LIMITS + ENGINE + code) == "(700, 3000) (600, 3000)"


UTILS = ENGINE + "from modelpack_engine.patches.mlx_lm_imports import utils\nused = utils()\n"


def test_the_loader_of_safetensors_needs_no_transformers() -> None:
    names = "print('transformers' in sys.modules, 'mlx_lm.tokenizer_utils' in sys.modules)"
    assert run(UTILS + "assert used.load_model and used is utils()\n" + names) == "False False"


@pytest.mark.parametrize(
    "use",
    [
        "import mlx_lm; mlx_lm.load",
        "import mlx_lm.generate",
        "used.load_tokenizer('nowhere')",
        "from mlx_lm.utils import load_tokenizer; load_tokenizer('nowhere')",
    ],
)
def test_mlx_lms_tokenizers_are_there_for_who_asks(use: str) -> None:
    """A directory that does not exist is looked for by transformers, which is imported then."""
    code = (
        f"try:\n    {use}\nexcept OSError:\n    pass\n"
        "import transformers, mlx_lm.tokenizer_utils as tokenizers\n"
        "assert tokenizers.AutoTokenizer is transformers.AutoTokenizer\n"
        "print(used.TokenizerWrapper is tokenizers.TokenizerWrapper,"
        " used._load_tokenizer is tokenizers.load)"
    )
    assert run(UTILS + code) == "True True"


def test_transformers_that_are_imported_are_used() -> None:
    code = (
        ENGINE + "import mlx_lm.tokenizer_utils as tokenizers\n"
        "from modelpack_engine.patches.mlx_lm_imports import utils\n"
        "print(utils().TokenizerWrapper is tokenizers.TokenizerWrapper)"
    )
    assert run(code) == "True"
