"""Packaged context size, template and defaults apply under vLLM, however it is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.reference import Reference
from modelpack.deploy import vllm_plugin
from modelpack.deploy.kserve import inference_service
from modelpack.deploy.kubernetes import Workload, deployment
from modelpack.deploy.vllm import VllmSettings, open_model
from modelpack.errors import UnsupportedError
from modelpack.operations.resolve import kept_bundle
from modelpack.store.layout import LayoutStore
from tests.deployment.test_vllm import Arguments, arg_utils, program, serve
from tests.models import package, tiny_gguf, tiny_safetensors
from tests.registry.faulty import FaultyRegistry

__all__ = ["arg_utils", "program"]
PARAMETERS = {
    "temperature": 0.25, "top_k": 7, "repeat_penalty": 1.1, "num_predict": 50, "min_p": True,
    "stop": ["END"], "num_gpu": 1,
}  # fmt: skip
GENERATION = {"max_new_tokens": 50, "repetition_penalty": 1.1, "temperature": 0.25, "top_k": 7}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LayoutStore:
    """A store with team/set, packaged with all settings, and team/plain, packaged without."""
    made = LayoutStore(tmp_path / "store")
    monkeypatch.setenv("MODELPACK_STORE", str(made.root))
    files = tiny_safetensors(tmp_path)
    (files / "config.json").write_text('{"max_position_embeddings": 4096}')
    (files / "tokenizer_config.json").write_text('{"chat_template": "inline"}')
    package("team/plain", files, made)
    template = tmp_path / "mine.jinja"
    template.write_text("packaged {{ messages }}")
    defaults = json.dumps({"parameters": PARAMETERS, "system": "Be brief."})
    annotations = {media_types.DEFAULTS: defaults}
    package(
        "team/set", files, made, chat_template=template, context_size=1024, annotations=annotations
    )
    return made


def flags(arguments: list[str]) -> dict[str, str]:
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def test_serve_hands_them_to_vllm(store: LayoutStore, program: Path) -> None:
    done = serve(program, "team/set", "--backend", "vllm")
    assert done.returncode == 0, done.stderr
    _, directory, *rest = done.stdout.splitlines()
    given = flags(rest)
    assert given["--max-model-len"] == "1024"
    assert Path(given["--chat-template"]) == Path(directory, "chat_template.jinja")
    assert Path(given["--chat-template"]).read_text() == "packaged {{ messages }}"
    assert json.loads(given["--override-generation-config"]) == GENERATION
    assert "no option for the packaged system prompt" in done.stderr
    assert "no default for stop" in done.stderr


def test_what_the_user_says_wins(store: LayoutStore, program: Path) -> None:
    done = serve(program, "team/set", "--backend", "vllm", "--max-model-len", "256")
    assert flags(done.stdout.splitlines()[2:])["--max-model-len"] == "256"


def test_a_model_without_settings_gets_no_options(store: LayoutStore, program: Path) -> None:
    done = serve(program, "team/plain", "--backend", "vllm")
    assert flags(done.stdout.splitlines()[2:]).keys() == {
        "--served-model-name",
        "--host",
        "--port",
    }
    assert "warning" not in done.stderr


class WithSettings(Arguments):
    """A fake `EngineArgs` with the fields of vLLM's."""

    max_model_len: int | None = None

    def __post_init__(self) -> None:
        self.override_generation_config: dict[str, Any] = {"temperature": 0.5}


def test_the_plugin_sets_them(
    store: LayoutStore, arg_utils: Any, caplog: pytest.LogCaptureFixture
) -> None:
    arg_utils.EngineArgs = type("EngineArgs", (WithSettings,), dict(WithSettings.__dict__))
    earlier = arg_utils.EngineArgs("modelpack://team/set")  # created before the plugins are loaded
    vllm_plugin.register()
    directory = Path(earlier.create_engine_config())
    assert (directory / "chat_template.jinja").read_text() == "packaged {{ messages }}"
    assert earlier.max_model_len == 1024
    assert earlier.override_generation_config == {**GENERATION, "temperature": 0.5}
    assert "system prompt" in caplog.text
    offline = arg_utils.EngineArgs("team/other")
    offline.model = arg_utils.get_model_path("modelpack://team/set")  # as vLLM does offline
    offline.create_engine_config()
    assert offline.max_model_len == 1024
    chosen = arg_utils.EngineArgs("team/other")
    chosen.model, chosen.max_model_len = "modelpack://team/set", 99
    chosen.create_engine_config()
    assert chosen.max_model_len == 99
    plain = arg_utils.EngineArgs("team/other")
    plain.model = "modelpack://team/plain"
    plain.create_engine_config()
    assert (plain.max_model_len, plain.override_generation_config) == (None, {"temperature": 0.5})


@pytest.mark.parametrize(
    ("image", "template"),
    [
        (None, "/model/bundle/model/chat_template.jinja"),
        ("registry.example/m:img", "/model/models/mine.jinja"),
    ],
)
def test_pods_get_them(store: LayoutStore, image: str | None, template: str) -> None:
    made = Workload(
        modelpack.inspect("team/set", store=store), Reference.parse("team/set"), "m", "vllm",
        "vllm/vllm-openai", "modelpack", 1, "set", model_image=image,
    )  # fmt: skip
    [container] = deployment(made)[0]["spec"]["template"]["spec"]["containers"]
    wanted = [
        "--max-model-len=1024", f"--chat-template={template}",
        f"--override-generation-config={json.dumps(GENERATION)}",
    ]  # fmt: skip
    assert container["command"][-3:] == wanted
    if image:
        predictor = inference_service(made)[0]["spec"]["predictor"]
        assert "--max-model-len=1024" in predictor["model"]["args"]
        assert "--chat-template=/mnt/models/mine.jinja" in predictor["model"]["args"]
        [runtime, _] = inference_service(made, own_runtime=True)
        [container] = runtime["spec"]["containers"]
        changed = [word.replace("/model/models/", "/mnt/models/") for word in wanted]
        assert container["command"][-3:] == changed


def test_a_model_that_vllm_cannot_read_is_not_pulled(tmp_path: Path) -> None:
    source = LayoutStore(tmp_path / "source")
    with FaultyRegistry() as registry:
        name = f"{registry.host}/team/gguf:v1"
        made = package(name, tiny_gguf(tmp_path), source, push=True)
        registry.requests.clear()
        store = LayoutStore(tmp_path / "store")
        with pytest.raises(UnsupportedError, match="with vLLM: expected safetensors") as caught:
            open_model(name, store=store)
        assert "llama.cpp" in str(caught.value.hint)
        for layer in made.manifest.layers:
            assert registry.count("GET", f"/blobs/{layer.digest}") == 0
    assert list(store.models()) == []


@pytest.mark.parametrize(
    "defaults",
    ["", "no json", "[]", '{"parameters": []}', '{"parameters": {"temperature": "hot"}}', "null"],
)
def test_defaults_that_make_no_sense_are_left_out(store: LayoutStore, defaults: str) -> None:
    model = modelpack.inspect("team/set", store=store)
    model.manifest.annotations[media_types.DEFAULTS] = defaults  # type: ignore[index]
    assert VllmSettings.of(model).generation == {}


def test_a_greedy_default_is_said_vllms_way(store: LayoutStore) -> None:
    model = modelpack.inspect("team/set", store=store)
    said = json.dumps({"parameters": {"top_p": 0, "num_predict": -1}})
    model.manifest.annotations[media_types.DEFAULTS] = said  # type: ignore[index]
    assert VllmSettings.of(model).generation == {"top_k": 1, "top_p": 1.0}


def test_the_bundle_has_the_template(store: LayoutStore) -> None:
    _, directory = kept_bundle("team/set", store=store)
    assert (directory / "chat_template.jinja").read_text() == "packaged {{ messages }}"
