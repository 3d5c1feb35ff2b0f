"""LoRA adapters: read, compared with their base, packaged, pulled with it, and refused by name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.model import Role
from modelpack.errors import ModelpackError, NotFoundError
from modelpack.formats.adapter import AdapterError, canonical, check_base, read_adapter
from modelpack.formats.tensors import TensorInfo
from modelpack.operations.adapters import package_adapter, stored_adapter
from modelpack.testing import registry
from tests.adapters import TARGETS, tiny_base, write_gguf, write_mlx, write_peft
from tests.cli.running import modelpack as run
from tests.cli.running import succeed

MODULE = "model.layers.0.self_attn.q_proj"


def test_peft(tmp_path: Path) -> None:
    adapter = read_adapter(write_peft(tmp_path))
    assert (adapter.format, adapter.rank, adapter.kind, adapter.base) == (
        "peft", 2, "lora", "team/base"
    )  # fmt: skip
    assert adapter.modules == ("down_proj", "q_proj")
    target = next(target for target in adapter.targets if target.module == MODULE)
    assert (target.inputs, target.outputs, target.scale) == (4, 8, 2.0)
    assert target.a.endswith("lora_A.weight")
    assert not target.transposed


def test_scales(tmp_path: Path) -> None:
    rslora = read_adapter(write_peft(tmp_path / "rs", use_rslora=True))
    assert rslora.targets[0].scale == pytest.approx(4 / math.sqrt(2))
    pattern = read_adapter(write_peft(tmp_path / "alpha", alpha_pattern={"q_proj": 16}))
    assert {target.module: target.scale for target in pattern.targets} == {
        MODULE: 8.0,
        "model.layers.0.mlp.down_proj": 2.0,
    }
    assert read_adapter(write_mlx(tmp_path / "mlx", scale=20.0)).targets[0].scale == 20.0
    file = write_gguf(tmp_path / "lora.gguf", {"blk.0.attn_q": (8, 4)}, alpha=6.0)
    assert read_adapter(file).targets[0].scale == 3.0


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("pattern", ["q_proj", "self_attn.q_proj", MODULE, f"^{MODULE}"])
def test_patterns(pattern: str, tmp_path: Path) -> None:
    """A module's own rank divides its own alpha; others keep the rank and alpha of all."""
    wide = _tensor(f"{MODULE}.lora_A.weight", 6, 4) | _tensor(f"{MODULE}.lora_B.weight", 8, 6)
    path = write_peft(tmp_path, extra=wide, rank_pattern={pattern: 6}, alpha_pattern={pattern: 3.0})
    adapter = read_adapter(path)
    found = {target.module: (target.rank, target.scale) for target in adapter.targets}
    assert found == {MODULE: (6, 0.5), DOWN: (2, 2.0)}
    assert adapter.rank == 6
    rslora = read_adapter(
        write_peft(
            tmp_path, extra=wide, rank_pattern={pattern: 6}, alpha_pattern={pattern: 3.0},
            use_rslora=True,
        )
    )  # fmt: skip
    scales = {target.module: target.scale for target in rslora.targets}
    assert scales == {
        MODULE: pytest.approx(3 / math.sqrt(6)),
        DOWN: pytest.approx(4 / math.sqrt(2)),
    }


@pytest.mark.parametrize("pattern", ["proj", "v_proj", "^q_proj", "0.mlp.q_proj"])
def test_patterns_of_other_modules(pattern: str, tmp_path: Path) -> None:
    adapter = read_adapter(write_peft(tmp_path, alpha_pattern={pattern: 100.0}))
    assert {target.scale for target in adapter.targets} == {2.0}


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({"q_proj": 4, "self_attn.q_proj": 8}, 4),
        ({"self_attn.q_proj": 8, "q_proj": 4}, 8),
        ({".*\\.q_proj": 4, "q_proj": 8}, 4),
        ({"q_proj": 8, ".*\\.q_proj": 4}, 8),
        ({"^q_proj": 4, f"^{MODULE}": 8}, 8),
    ],
)
def test_the_first_pattern_counts(patterns: dict[str, int], alpha: int, tmp_path: Path) -> None:
    adapter = read_adapter(write_peft(tmp_path, alpha_pattern=patterns))
    scales = {target.module: target.scale for target in adapter.targets}
    assert scales[MODULE] == alpha / 2


@pytest.mark.parametrize("field", ["target_parameters", "alpha_pattern", "rank_pattern"])
def test_many_names_of_many_modules(field: str, tmp_path: Path) -> None:
    """Each module is looked up by its own names, not compared with each of the configuration."""
    shapes = {f"model.layers.{number}.mlp.up_proj": (4, 4) for number in range(100)}

    def calls(count: int) -> int:
        names = {f"n{number}.weight": 2 for number in range(count)}
        value = list(names) if field == "target_parameters" else names
        path = write_peft(tmp_path, shapes, **{field: value})
        found = 0

        def trace(_frame: object, event: str, _arg: object) -> None:
            nonlocal found
            found += event == "c_call"

        sys.setprofile(trace)
        try:
            read_adapter(path)
        finally:
            sys.setprofile(None)
        return found

    assert calls(1010) - calls(10) < 20 * 1000


def test_peft_embeddings(tmp_path: Path) -> None:
    """PEFT saves the base's weight with the adapter of an embedding, which is not a target."""
    copy = _tensor("model.embed_tokens.base_layer.weight", 10, 4)
    adapter = read_adapter(write_peft(tmp_path, {"model.embed_tokens": (4, 10)}, extra=copy))
    (target,) = adapter.targets
    assert (target.module, target.embedding, target.rank) == ("model.embed_tokens", True, 2)
    assert (target.inputs, target.outputs) == (10, 4)
    assert target.a.endswith("lora_embedding_A")
    assert target.b.endswith("lora_embedding_B")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens", "model.embed_tokens_per_layer", "transformer.wte", "transformer.wpe",
        "transformer.token_embeddings", "model.embedding", "model.embed", "backbone.embeddings",
    ],
)  # fmt: skip
def test_mlx_embeddings(name: str, tmp_path: Path) -> None:
    """mlx-lm marks no embeddings: their names in its classes do. DoRA scales each token's row."""
    magnitudes = {f"{name}.m": np.ones(10, np.float32)}
    (target,) = read_adapter(write_mlx(tmp_path, {name: (4, 10)}, extra=magnitudes)).targets
    assert (target.embedding, target.inputs, target.outputs) == (True, 10, 4)


def test_linear_layers_that_are_named_after_embeddings(tmp_path: Path) -> None:
    """`lora_embedding_A` makes a target an embedding, not the module's own name."""
    name = "model.ngram_embeddings.post_projs.0"
    (target,) = read_adapter(write_peft(tmp_path, {name: (8, 4)})).targets
    assert (target.embedding, target.inputs, target.outputs) == (False, 4, 8)


def test_dora(tmp_path: Path) -> None:
    vectors = {
        f"base_model.model.{name}.lora_magnitude_vector": np.ones(shape[0], np.float32)
        for name, shape in TARGETS.items()
    }
    adapter = read_adapter(write_peft(tmp_path, use_dora=True, extra=vectors))
    assert adapter.kind == "dora"
    assert all(target.magnitude for target in adapter.targets)


def test_mlx_is_transposed(tmp_path: Path) -> None:
    adapter = read_adapter(write_mlx(tmp_path, rank=3))
    target = next(target for target in adapter.targets if target.module == MODULE)
    assert (adapter.format, target.rank, target.inputs, target.outputs) == ("mlx", 3, 4, 8)
    assert target.transposed


def _tensor(name: str, *shape: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {f"base_model.model.{name}": np.zeros(shape, dtype)}


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "rank 0": (lambda at: write_peft(at, r=0), "r is 0, expected 1 to 4096"),
    "rank too large": (lambda at: write_peft(at, r=10**9), "expected 1 to 4096"),
    "rank is text": (lambda at: write_peft(at, r="8"), "r is 8, expected 1 to 4096"),
    "other rank": (lambda at: write_peft(at, r=4), "the rank is 2, expected 4"),
    "NaN alpha": (lambda at: write_peft(at, lora_alpha=math.nan), "NaN"),
    "infinite alpha": (lambda at: write_peft(at, lora_alpha=1e300), "expected a finite number"),
    "IA3": (lambda at: write_peft(at, peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
    "biases": (lambda at: write_peft(at, bias="all"), "bias is 'all', expected 'none'"),
    "modules to save": (
        lambda at: write_peft(at, modules_to_save=["lm_head"]),
        "modules_to_save is set, which is not supported",
    ),
    "unknown tensor": (
        lambda at: write_peft(at, extra=_tensor("lm_head.weight", 4, 4)),
        "unknown tensor 'base_model.model.lm_head.weight'",
    ),
    "long name": (
        lambda at: write_mlx(at, {"a." * 128 + "b": (4, 4)}),
        "a.a.a.: the name of a tensor has 264 characters, expected up to 256",
    ),
    "resized embedding": (
        lambda at: write_peft(
            at,
            {"model.embed_tokens": (4, 10)},
            extra=_tensor("model.embed_tokens.base_layer.weight", 12, 4),
        ),
        "embed_tokens.base_layer.weight has shape [12, 4], expected [10, 4]",
    ),
    "weight of the base alone": (
        lambda at: write_peft(at, extra=_tensor("lm_head.base_layer.weight", 10, 4)),
        "lm_head: has no LoRA A matrix",
    ),
    "expression as alpha_pattern": (
        lambda at: write_peft(at, alpha_pattern={".*q_proj": 16}),
        "alpha_pattern has the expression '.*q_proj', expected names of modules",
    ),
    "expression as rank_pattern": (
        lambda at: write_peft(at, rank_pattern={"layers.[01].q_proj": 2}),
        "rank_pattern has the expression 'layers.[01].q_proj'",
    ),
    "alpha of 400 digits": (
        lambda at: write_peft(at, lora_alpha=10**400),
        "lora_alpha is 1000000",
    ),
    "version of 5000 digits": (
        lambda at: write_peft(at, peft_version="9" * 5000 + ".1.1"),
        "peft_version is '9999999",
    ),
    "initialisation that changes the base": (
        lambda at: write_peft(at, init_lora_weights="pissa_niter_16"),
        "init_lora_weights is 'pissa_niter_16', which changes the base too",
    ),
    "no B": (
        lambda at: write_peft(at, extra=_tensor("x.lora_A.weight", 2, 4)),
        "x: has no LoRA B matrix",
    ),
    "A and B differ": (
        lambda at: write_peft(
            at, extra=_tensor("x.lora_A.weight", 2, 4) | _tensor("x.lora_B.weight", 4, 3)
        ),
        "x: A has shape [2, 4] and B [4, 3]",
    ),
    "integers": (
        lambda at: write_peft(at, extra=_tensor("x.lora_A.weight", 2, 4, dtype=np.int32)),
        "is I32, expected F16, BF16 or F32",
    ),
    "DoRA without magnitudes": (
        lambda at: write_peft(at, use_dora=True),
        "use_dora is set, but it has no magnitude",
    ),
    "DoRA of an embedding by token in PEFT": (
        lambda at: write_peft(
            at,
            {"model.embed_tokens": (4, 10)},
            extra=_tensor("model.embed_tokens.lora_magnitude_vector", 10),
        ),
        "model.embed_tokens: the magnitude has shape [10], expected [4]",
    ),
    "DoRA of an embedding by output in mlx-lm": (
        lambda at: write_mlx(
            at,
            {"model.embed_tokens": (4, 10)},
            extra={"model.embed_tokens.m": np.ones(4, np.float32)},
        ),
        "model.embed_tokens: the magnitude has shape [4], expected [10]",
    ),
    "DoRA of experts": (
        lambda at: write_mlx(
            at,
            {"x.switch_mlp.up_proj": (3, 4, 10)},
            extra={"x.switch_mlp.up_proj.m": np.ones(4, np.float32)},
        ),
        "x.switch_mlp.up_proj: DoRA of experts is not supported",
    ),
    "mlx rank": (
        lambda at: write_mlx(at, lora_parameters={"rank": 7, "scale": 1.0}),
        "expected the rank 7",
    ),
    "mlx full": (lambda at: write_mlx(at, fine_tune_type="full"), "fine_tune_type is 'full'"),
    "mlx scale": (
        lambda at: write_mlx(at, lora_parameters={"rank": 2, "scale": None}),
        "lora_parameters.scale is None",
    ),
    "gguf NaN alpha": (
        lambda at: write_gguf(at.with_suffix(".gguf"), {"blk.0.attn_q": (8, 4)}, alpha=math.nan),
        "adapter.lora.alpha is nan",
    ),
    "gguf other type": (
        lambda at: write_gguf(at.with_suffix(".gguf"), {"blk.0.attn_q": (8, 4)}, kind="alora"),
        "not a LoRA adapter",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_refused_by_name(case: str, tmp_path: Path) -> None:
    write, message = BAD[case]
    with pytest.raises(AdapterError) as raised:
        read_adapter(write(tmp_path / "adapter"))
    assert message in str(raised.value)


def test_truncated_weights(tmp_path: Path) -> None:
    file = write_peft(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(modelpack.errors.WeightFormatError, match="truncated"):
        read_adapter(tmp_path)


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("language_model.model.layers.11.a", "layers.11.a"),
        ("transformer.h.3.attn.c_attn", "h.3.attn.c_attn"),
        ("model.embed_tokens", "embed_tokens"),
    ],
)
def test_names_of_modules(name: str, found: str) -> None:
    assert canonical(name) == found


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    store = modelpack.Store(tmp_path / "store")
    request = modelpack.PackageRequest(safetensors_dir=tiny_base(tmp_path / "base"))
    modelpack.package("team/base:v1", request, store=store)
    return store


def test_package(store: modelpack.Store, tmp_path: Path) -> None:
    path = write_peft(tmp_path / "adapter")
    (path / "training_args.bin").write_bytes(b"\x80\x02}q\x00.")
    (path / "README.md").write_text("# Adapter")
    made = package_adapter("team/adapter:v1", path, "team/base:v1", store=store)
    assert made.manifest.artifact_type == media_types.ADAPTER
    base = modelpack.inspect("team/base:v1", store=store)
    assert dict(made.manifest.annotations) == {
        media_types.BASE_DIGEST: str(base.digest),
        media_types.BASE_NAME: "docker.io/team/base:v1",
        media_types.ADAPTER_KIND: "lora",
        media_types.ADAPTER_RANK: "2",
        media_types.ADAPTER_TARGETS: "down_proj,q_proj",
    }
    assert [one.path for one in made.skipped] == ["training_args.bin"]
    model = modelpack.inspect("team/adapter:v1", store=store)
    assert model.is_adapter
    assert not base.is_adapter
    assert {file.filepath: file.role for file in model.files()} == {
        "adapter_model.safetensors": Role.ADAPTER,
        "adapter_config.json": Role.CONFIG,
        "README.md": Role.DOC,
    }
    assert stored_adapter(model, store).targets == read_adapter(path).targets
    again = package_adapter("team/other:v1", path, "team/base:v1", store=store, dry_run=True)
    assert again.digest == made.digest


def test_resolved_by_type(store: modelpack.Store, tmp_path: Path) -> None:
    package_adapter("team/a:v1", write_mlx(tmp_path / "a"), "team/base:v1", store=store)
    (found,) = modelpack.resolve("team/a:v1", media_types=["adapter"], store=store).files
    assert found.path.read_bytes() == (tmp_path / "a" / "adapters.safetensors").read_bytes()
    (found,) = modelpack.resolve(
        "team/a:v1", media_types=[media_types.ADAPTER_SAFETENSORS], store=store
    ).files
    assert found.file.format == "safetensors"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"model.layers.0.self_attn.o_proj": (4, 4)}, "the base has no module"),
        ({MODULE: (8, 5)}, r"a weight of shape \[8, 5\], but the base has \[8, 4\]"),
        ({"model.layers.7.self_attn.q_proj": (8, 4)}, "the base has no module"),
    ],
)
def test_wrong_base(
    targets: dict[str, tuple[int, int]], message: str, store: modelpack.Store, tmp_path: Path
) -> None:
    path = write_peft(tmp_path / "adapter", targets)
    with pytest.raises(AdapterError, match=message):
        package_adapter("team/adapter:v1", path, "team/base:v1", store=store)
    with pytest.raises(NotFoundError):
        modelpack.inspect("team/adapter:v1", store=store)


def test_base_of_conv1d(tmp_path: Path) -> None:
    """GPT-2's weights are stored as [inputs, outputs]; PEFT says so by `fan_in_fan_out`."""
    store = modelpack.Store(tmp_path / "store")
    base = tiny_base(tmp_path / "base", {name: shape[::-1] for name, shape in TARGETS.items()})
    modelpack.package("team/base:v1", modelpack.PackageRequest(safetensors_dir=base), store=store)
    for number, fields in enumerate(({"fan_in_fan_out": True}, {})):
        path = write_peft(tmp_path / str(number), **fields)
        if fields:
            package_adapter("team/adapter:v1", path, "team/base:v1", store=store)
            continue
        with pytest.raises(AdapterError, match="but the base has"):
            package_adapter("team/other:v1", path, "team/base:v1", store=store)
    wrong = write_peft(tmp_path / "wrong", {MODULE: (8, 5)}, fan_in_fan_out=True)
    with pytest.raises(AdapterError, match="but the base has"):
        package_adapter("team/other:v1", wrong, "team/base:v1", store=store)


def test_embeddings_are_not_conv1d(tmp_path: Path) -> None:
    """PEFT's `fan_in_fan_out` is one for the whole adapter, but embeddings are not transposed."""
    name = "model.embed_tokens"
    path = write_peft(tmp_path, {name: (4, 10), **TARGETS}, fan_in_fan_out=True)
    adapter = read_adapter(path)
    assert {target.module: target.conv1d for target in adapter.targets} == {
        name: False, **dict.fromkeys(TARGETS, True),
    }  # fmt: skip
    tensors = [
        TensorInfo(f"{module}.weight", "F32", shape[::-1], 0, 0)
        for module, shape in TARGETS.items()
    ]
    check_base(
        adapter,
        [*tensors, TensorInfo(f"{name}.weight", "F32", (10, 4), 0, 0)],
        format="safetensors",
    )
    with pytest.raises(AdapterError, match=r"shape \[10, 4\], but the base has \[4, 10\]"):
        check_base(
            adapter,
            [*tensors, TensorInfo(f"{name}.weight", "F32", (4, 10), 0, 0)],
            format="safetensors",
        )


def test_gguf_adapter_of_safetensors(store: modelpack.Store, tmp_path: Path) -> None:
    """Its tensors have names of their own: only layers are compared."""
    file = write_gguf(tmp_path / "lora.gguf", {"blk.0.attn_q": (8, 4)})
    package_adapter("team/adapter:v1", file, "team/base:v1", store=store)
    layers = modelpack.inspect("team/adapter:v1", store=store).manifest.layers
    assert layers[0].media_type == media_types.DOCKER_GGUF_LORA
    file = write_gguf(tmp_path / "deep.gguf", {"blk.7.attn_q": (8, 4)})
    with pytest.raises(AdapterError, match="the base has no layer 7, which blk"):
        package_adapter("team/deep:v1", file, "team/base:v1", store=store)


@pytest.mark.parametrize("write", [write_peft, write_mlx])
def test_adapter_of_a_gguf_base(write: Callable[..., Path], tmp_path: Path) -> None:
    """The base's tensors have names of their own: only layers are compared."""
    store, path = modelpack.Store(tmp_path / "store"), tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    modelpack.package("team/base:v1", modelpack.PackageRequest(gguf=path), store=store)
    package_adapter("team/adapter:v1", write(tmp_path / "a"), "team/base:v1", store=store)
    deep = write(tmp_path / "deep", {"model.layers.1.self_attn.q_proj": (8, 4)})
    with pytest.raises(AdapterError, match=r"the base has no layer 1, which model\.layers\.1"):
        package_adapter("team/deep:v1", deep, "team/base:v1", store=store)


def test_numbers_of_layers_that_are_long(tmp_path: Path) -> None:
    """Python converts no text of more than 4,300 digits to a number."""
    adapter = read_adapter(write_gguf(tmp_path / "lora.gguf", {"blk.0.attn_q": (8, 4)}))
    digits = "1" * 5000

    def base(number: str) -> list[TensorInfo]:
        return [TensorInfo(f"model.layers.{number}.mlp.up_proj.weight", "F32", (8, 4), 0, 128)]

    check_base(adapter, base(digits) + base("0"), format="safetensors")
    target = replace(adapter.targets[0], module=f"blk.{digits}.attn_q")
    long = replace(adapter, targets=(target,))
    with pytest.raises(AdapterError, match="the base has no layer 111") as raised:
        check_base(long, base("0"), format="safetensors")
    assert len(str(raised.value)) < 1000


def test_base_is_no_adapter(store: modelpack.Store, tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a")
    package_adapter("team/a:v1", path, "team/base:v1", store=store)
    with pytest.raises(ModelpackError, match="is an adapter itself"):
        package_adapter("team/b:v1", path, "team/a:v1", store=store)


def test_pull_fetches_the_base(tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "adapter")
    with registry() as server:
        base, name = f"{server.host}/team/base:v1", f"{server.host}/team/adapter:v1"
        digest = succeed(
            "package", "--safetensors-dir", tiny_base(tmp_path / "base"), "--push", base
        ).out
        succeed("rm", base)
        # The base is not stored: the adapter is compared with headers read by ranges.
        succeed("package", "--adapter", adapter, "--base", base, "--push", name)
        text = succeed("inspect", name).out
        shown = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        assert shown["Base digest"].strip() == digest
        assert (shown["Base"].strip(), shown["Rank"].strip()) == (base, "2")
        succeed("rm", name)

        succeed("pull", "--no-base", name)
        assert run("inspect", digest).code == 3
        assert "base:" in succeed("pull", name).err
        assert succeed("inspect", "--json", digest).json["digest"] == digest
        assert "blobs fetched" in succeed("pull", name).err

    # The base has no name here, but the adapter needs it as long as it is stored.
    assert succeed("prune", "--json", "-f").json["deleted"] == []
    succeed("rm", name)
    assert succeed("prune", "--json", "-f").json["deleted"] == [digest]


def test_wrong_adapter_of_a_remote_base(tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "adapter", {MODULE: (9, 4)})
    with registry() as server:
        base = f"{server.host}/team/base:v1"
        succeed("package", "--safetensors-dir", tiny_base(tmp_path / "base"), "--push", base)
        succeed("rm", base)
        done = run("package", "--adapter", adapter, "--base", base, "team/adapter:v1")
    assert done.code == 1
    assert "but the base has [8, 4]" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "x"], "--adapter and --base are required together"),
        (["--base", "x"], "--adapter and --base are required together"),
        (["--adapter", "x", "--base", "y", "--gguf", "z"], "cannot be combined"),
        (["--adapter", "x", "--base", "y", "--format", "cncf"], "CNCF ModelPack has no adapters"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    done = run("package", *arguments, "team/a:v1")
    assert done.code == 2
    assert message in done.err
