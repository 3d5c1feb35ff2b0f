"""vLLM's own source, as much of it as names of models pass through, made to run without torch.

It comes from the wheel, of which two files are kept. `vllm.plugins` is run as it is. Of
`vllm.engine.arg_utils` those statements of EngineArgs are run, word for word, that load plugins or
read the name of the model; what they call beyond that is a stand-in.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.33.0"
RAY_VERSION = "2.60.0"
ROOT = Path(__file__).resolve().parents[2]
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")
_RAY_FILE = "ray/scripts/scripts.py"
_FILES = ("vllm/plugins/__init__.py", "vllm/engine/arg_utils.py")

_STAND_INS = """
import argparse
from types import SimpleNamespace
from vllm import envs
from vllm.plugins import load_general_plugins

asked = []
logger = SimpleNamespace(info=lambda *words: None, warning=lambda *words: None)
huggingface_hub = SimpleNamespace(constants=SimpleNamespace(HF_HUB_OFFLINE=envs.OFFLINE))


def is_cloud_storage(name):
    return name.startswith(("s3://", "gs://", "az://"))


def get_model_path(model, revision=None):
    asked.append(model)
    return model


def maybe_override_with_speculators(model, tokenizer, vllm_speculative_config, **others):
    asked.append(model)
    return model, tokenizer, vllm_speculative_config


ModelConfig = SimpleNamespace
"""


def vllm_source() -> Path:
    """Return the directory with vLLM's files; fetched once, by pip (340 MB)."""
    return _kept("vllm", VERSION, _FILES)


def ray_source() -> str:
    """Return the source of Ray's command line; fetched once, by pip (70 MB)."""
    return (_kept("ray", RAY_VERSION, (_RAY_FILE,)) / _RAY_FILE).read_text()


def _kept(name: str, version: str, files: tuple[str, ...]) -> Path:
    """Return a directory with these files of a wheel; it is fetched once."""
    kept = ROOT / ".cache" / f"{name}-source-{version}"
    if not kept.is_dir():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check",
                 f"{name}=={version}", "--no-deps", "--only-binary", ":all:",
                 *(word for one in _PLATFORMS for word in ("--platform", one)), "-d", scratch],
                check=True,
            )  # fmt: skip
            [wheel] = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for path in files:
                    archive.extract(path, Path(scratch, "files"))
            Path(scratch, "files").rename(kept)
    return kept


def engine_args() -> ast.ClassDef:
    """Return vLLM's EngineArgs."""
    return _class("EngineArgs")


def method(name: str, of: str = "EngineArgs") -> ast.FunctionDef:
    """Return a method of one of vLLM's classes."""
    for node in _class(of).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise AssertionError(f"vLLM {VERSION} has no {of}.{name}")


def write_runnable(directory: Path, *, offline: bool) -> None:
    """Put a package `vllm` into `directory` that does with names what vLLM does."""
    package = directory / "vllm"
    (package / "engine").mkdir(parents=True)
    (package / "plugins").mkdir()
    (package / "__init__.py").touch()
    (package / "engine" / "__init__.py").touch()
    (package / "envs.py").write_text(
        f"VLLM_PLUGINS = None\nVLLM_ENABLE_V1_MULTIPROCESSING = True\nOFFLINE = {offline}\n"
    )
    (package / "plugins" / "__init__.py").write_text((vllm_source() / _FILES[0]).read_text())
    (package / "engine" / "arg_utils.py").write_text(_STAND_INS + _reduced())


def _reduced() -> str:
    post = method("__post_init__")
    post.body = post.body[_first(post.body, "load_general_plugins") :]
    create = method("create_engine_config")
    first = _first(create.body, "maybe_override_with_speculators")
    last = _first(create.body, "create_model_config()")
    create.body = [*create.body[first : last + 1], *ast.parse("return model_config").body]
    create.returns = None
    for argument in create.args.args:
        argument.annotation = None
    config = method("create_model_config")
    config.returns = None
    parse = method("add_cli_args", "AsyncEngineArgs")
    parse.body = [parse.body[_first(parse.body, "load_general_plugins()")]]
    parse.returns = None
    parse.args.args[0].annotation = None
    constructor = ast.parse(
        "def __init__(self, model, tokenizer=None, served_model_name=None):\n"
        "    self.model, self.tokenizer = model, tokenizer\n"
        "    self.served_model_name = served_model_name\n"
        "    self.__post_init__()\n"
        "def __getattr__(self, name):\n"
        "    if name.startswith('_'): raise AttributeError(name)\n"
    )
    arguments = ast.ClassDef("EngineArgs", [], [], [*constructor.body, post, create, config], [])
    parser = ast.ClassDef("AsyncEngineArgs", [ast.Name("EngineArgs", ast.Load())], [], [parse], [])
    return ast.unparse(ast.fix_missing_locations(ast.Module([arguments, parser], [])))


def _first(statements: list[ast.stmt], words: str) -> int:
    for index, statement in enumerate(statements):
        if words in ast.unparse(statement):
            return index
    raise AssertionError(f"vLLM {VERSION}: no statement has {words}")


def _class(name: str) -> ast.ClassDef:
    for node in ast.parse((vllm_source() / _FILES[1]).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise AssertionError(f"vLLM {VERSION} has no {name}")
