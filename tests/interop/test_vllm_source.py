"""The plugin, found and run by vLLM's own code."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.deploy.kubernetes import Workload, pod_spec
from modelpack.deploy.vllm import model_directory
from modelpack.store.layout import LayoutStore
from tests.interop.vllm_source import (
    ROOT,
    engine_args,
    method,
    ray_source,
    vllm_source,
    write_runnable,
)
from tests.models import tiny_safetensors

pytestmark = pytest.mark.long  # the wheel is fetched

_RUN = """
import json, sys
from vllm.engine import arg_utils
if sys.argv[1] == "serve":
    arg_utils.AsyncEngineArgs.add_cli_args(None)
made = arg_utils.EngineArgs("modelpack://team/tiny")
config = made.create_engine_config()
print(json.dumps([config.model, made.model, config.served_model_name, arg_utils.asked]))
"""


def write_entry_points(directory: Path) -> None:
    """Put the metadata of an installed modelpack into `directory`, as pyproject.toml says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = directory / "modelpack-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: modelpack\nVersion: 0\n")
    lines = ["[vllm.general_plugins]"]
    lines += [f"{k} = {v}" for k, v in project["entry-points"]["vllm.general_plugins"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
@pytest.mark.parametrize("how", ["serve", "library"])
def test_vllm_opens_the_directory_and_never_sees_the_name(
    tmp_path: Path, how: str, offline: bool
) -> None:
    store = LayoutStore(tmp_path / "store")
    files = tiny_safetensors(tmp_path)
    (files / "config.json").write_text("{}")
    modelpack.package("team/tiny", modelpack.PackageRequest(safetensors_dir=files), store=store)
    write_runnable(tmp_path / "site", offline=offline)
    write_entry_points(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", _RUN, how], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}",
             "MODELPACK_STORE": str(store.root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    directory = str(model_directory("team/tiny", store=store))
    model, kept, served, asked = json.loads(done.stdout)
    assert (model, kept) == (directory, directory)
    if how == "serve":
        assert served == ["modelpack://team/tiny"]
        assert set(asked) == {directory}  # the hub is asked for no name that it does not know
    else:
        assert asked[-1] == directory


def test_the_command_shows_an_error_and_no_traceback(tmp_path: Path) -> None:
    """The plugin resolves names while vLLM's own code runs, in `vllm serve` and in a program."""
    LayoutStore(tmp_path / "store")
    write_runnable(tmp_path / "site", offline=True)
    write_entry_points(tmp_path / "site")
    for name, shown in (("vllm", False), ("program.py", True)):
        script = tmp_path / name
        script.write_text(_RUN.replace("team/tiny", "sha256:" + "0" * 64))
        done = subprocess.run(
            [sys.executable, script, "serve"], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}",
                 "MODELPACK_STORE": str(tmp_path / "store")},
        )  # fmt: skip
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == shown
        assert done.stderr.startswith("error: ") != shown


def commands(program: str) -> list[list[str]]:
    """Return the words of the commands in docs/vllm.md that begin with `program`."""
    text = (ROOT / "docs" / "vllm.md").read_text().replace("\\\n", " ")
    found = re.findall(rf"(?:^|`)((?:~/vllm/bin/)?{program} [^`\n]*)", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def test_vllm_has_the_options_of_the_documented_commands() -> None:
    source = (vllm_source() / "vllm/engine/arg_utils.py").read_text()
    declared = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
    found = [one for one in commands("vllm serve") if any(w.startswith("--") for w in one)]
    assert len(found) == 5
    assert any("ray" in one for one in found)
    for words in found:
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given - declared <= {"--headless"}  # of `vllm serve` itself
    assert 'distributed_executor_backend == "ray"' in source  # a value that it knows


def test_ray_has_the_options_of_the_documented_commands() -> None:
    source = ray_source()
    start = source[: source.index("\ndef start(")].rpartition("@cli.command")[2]
    declared = set(re.findall(r'"(--[\w-]+)"', start))
    given = [word.partition("=")[0] for one in commands("ray start") for word in one[2:]]
    assert sorted(given) == ["--address", "--head"]
    assert {*given} <= declared


def test_the_fields_are_there() -> None:
    fields = {
        node.target.id: ast.unparse(node.annotation)
        for node in engine_args().body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert fields["model"] == "str"
    assert "list[str]" in fields["served_model_name"]
    assert {"tokenizer", "hf_config_path", "speculative_config"} <= fields.keys()
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size",
                 "gpu_memory_utilization", "kv_cache_memory_bytes", "enable_prefix_caching",
                 "pipeline_parallel_size"):  # fmt: skip
        assert name in fields, f"`modelpack serve --backend vllm` hands it {name}"


def test_the_methods_take_what_they_took() -> None:
    def parameters(name: str) -> list[str]:
        return [argument.arg for argument in method(name).args.args]

    assert parameters("__post_init__") == ["self"]
    assert parameters("create_engine_config") == ["self", "usage_context", "headless"]
    assert parameters("create_model_config") == ["self"]


def test_vllm_has_the_options_for_several_nodes(tmp_path: Path) -> None:
    """Those that `modelpack k8s --nodes` prints, besides `--headless` of `vllm serve` itself."""
    store = LayoutStore(tmp_path / "store")
    name = "registry.example/team/tiny:v1"
    request = modelpack.PackageRequest(safetensors_dir=tiny_safetensors(tmp_path))
    modelpack.package(name, request, store=store)
    workload = Workload(
        model=modelpack.inspect(name, store=store), reference=Reference.parse(name), name="tiny",
        engine="vllm",
        engine_image="server", tool_image="modelpack", gpus=2, served_name="tiny", nodes=2,
    )  # fmt: skip
    [server] = pod_spec(workload, is_worker=True)["containers"]
    printed = {w.partition("=")[0] for w in server["command"] if w.startswith("--")}
    source = (vllm_source() / "vllm/engine/arg_utils.py").read_text()
    declared = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
    assert {"--nnodes", "--node-rank", "--master-addr", "--pipeline-parallel-size"} <= printed
    assert printed - declared == {"--port", "--headless"}
