"""Both backends over one small GGUF model, with random weights."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from modelpack.artifacts.model import Model
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.runner.base_engine import BaseEngine
from modelpack_server.stored_models import Opened, open_model
from tests.engine.loaders.llama_cpp_peer import python_with_llama_cpp
from tests.engine.loaders.tiny_models import TINY_MODELS
from tests.peers import missing

#: Makes an engine of the small model; arguments are EngineConfig's.
MakeEngine = Callable[..., BaseEngine]
_SITES = "import json, site; print(json.dumps(site.getsitepackages()))"


@pytest.fixture(scope="package")
def llama_cpp() -> Iterator[None]:
    """Make llama-cpp-python importable, possibly from a separate environment.

    The import path is restored afterwards: other tests with the backend `auto` expect MLX.
    """
    python = python_with_llama_cpp()
    if python is None:
        missing("llama-cpp-python is not installed (see MODELPACK_LLAMA_CPP_PYTHON)")
    assert python is not None
    sites = json.loads(
        subprocess.run([python, "-c", _SITES], capture_output=True, check=True).stdout
    )
    added = [site for site in sites if site not in sys.path]
    sys.path += added  # at the end, so that our own packages take precedence
    importlib.invalidate_caches()
    yield
    for site in added:
        sys.path.remove(site)
    for name in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture(scope="package")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The small model, in a store."""
    directory = tmp_path_factory.mktemp("small")
    mx.random.seed(3)
    file = TINY_MODELS["llama"].write(directory / "small.gguf")
    store = LayoutStore(directory / "store")
    import modelpack

    made: Model = modelpack.package("team/small", PackageRequest(gguf=file), store=store)
    return open_model(str(made.digest), store=store, pull=False)


@pytest.fixture(scope="package", params=["mlx", "llama.cpp"])
def make_engine(request: pytest.FixtureRequest, opened: Opened) -> MakeEngine:
    """Makes engines of one backend or the other."""
    if request.param == "llama.cpp":
        request.getfixturevalue("llama_cpp")

    def make(**settings: object) -> BaseEngine:
        given = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "backend": request.param}
        return opened.engine(EngineConfig(device="cpu", **{**given, **settings}))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="package")
def gguf_file(opened: Opened) -> Path:
    [path] = opened.files.weights
    return path
