"""Write peft.json: the logits of PEFT and transformers for tiny models with adapters.

    python tests/engine/adapters/golden/make.py

It needs a virtual environment of its own, with peft, transformers and torch; the file names the
versions. With an older PEFT, it adds the cases in `OLD`. `values` draws all weights by their names,
so that a test can draw them again.
"""

from __future__ import annotations

import json
import math
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("peft.json")
TOKENS = [3, 17, 29, 8, 8, 30, 1]
_LLAMA = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
_QWEN = {
    "model_type": "qwen3_moe", "moe_intermediate_size": 12, "intermediate_size": 24,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], **_LLAMA, **_EXPERTS,
}  # fmt: skip
_GPT_OSS = {
    "model_type": "gpt_oss", "intermediate_size": 12, "sliding_window": 32, **_LLAMA, **_EXPERTS,
    "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
}  # fmt: skip
_MIXTRAL = {"model_type": "mixtral", "intermediate_size": 12, **_LLAMA, **_EXPERTS}
_GPT2 = {
    "model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2,
    "n_positions": 64, "n_ctx": 64, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
_BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_OF_LINEARS = ["q_proj", "o_proj"]
#: A model and an adapter by the name of a case.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": (_QWEN, {"target_parameters": _BOTH, "target_modules": _OF_LINEARS}),
    "qwen3_moe patterns": (
        _QWEN,
        {
            "target_parameters": [*_BOTH, "mlp.gate.weight"], "use_rslora": True,
            "rank_pattern": {"experts.gate_up_proj": 2, "gate.weight": 1},
            "alpha_pattern": {"down_proj": 5.0, ".*\\.gate_up_proj": 7.0},
        },
    ),
    "qwen3_moe down": (_QWEN, {"target_parameters": _BOTH[1:]}),
    "qwen3_moe square": (
        {**_QWEN, "moe_intermediate_size": 8}, {"target_parameters": ["gate_up_proj"]}
    ),
    "mixtral": ({**_MIXTRAL}, {"target_parameters": _BOTH}),
    "gpt_oss": (_GPT_OSS, {"target_parameters": _BOTH}),
    "gpt_oss square": ({**_GPT_OSS, "intermediate_size": 16}, {"target_parameters": _BOTH}),
    "gpt_oss square down": (
        {**_GPT_OSS, "intermediate_size": 16}, {"target_parameters": _BOTH[1:]}
    ),
    "gpt2": (_GPT2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 DoRA": (
        _GPT2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}
    ),
    "DoRA of embeddings": (
        {"model_type": "llama", "intermediate_size": 24, **_LLAMA},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
}  # fmt: skip
#: Cases whose matrices PEFT before 0.19.1 stored differently.
OLD = ("qwen3_moe", "qwen3_moe square", "mixtral", "gpt_oss", "gpt_oss square")


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the weights of a name, float32; norms and magnitudes are near 1."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    near_one = ("norm" in name or "ln_" in name) and name.endswith("weight")
    scaled = 1 + 0.2 * draw if near_one or "magnitude" in name else 0.3 * draw
    return scaled.astype(np.float32)


def _case(config: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval().float()
    base = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        value.data = torch.from_numpy(values(name, tuple(value.shape)))
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        plain = model(ids).logits[0]
        peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, **adapter)).eval()
        for name, value in peft.named_parameters():
            if "lora_" in name:
                saved = name.replace(".default", "")
                value.data = torch.from_numpy(values(saved, tuple(value.shape)))
        changed = peft(ids).logits[0]
        with tempfile.TemporaryDirectory() as path:
            peft.save_pretrained(path, save_embedding_layers=False)
            fields = json.loads((Path(path) / "adapter_config.json").read_text())
            saved_tensors = load_file(Path(path) / "adapter_model.safetensors")
        merged = peft.merge_and_unload()(ids).logits[0]
    assert torch.allclose(changed, merged, atol=1e-4)
    assert not torch.allclose(changed, plain, atol=1e-2)
    for name, array in saved_tensors.items():
        drawn = name if "magnitude" not in name else f"{name}.weight"
        assert np.array_equal(array, values(drawn, array.shape)), name
    rounded = [[round(value, 5) for value in row] for row in plain.tolist()]
    return {
        "config": config, "base": base, "logits": rounded,
        "adapter": {key: value for key, value in fields.items() if value not in (None, {}, [])},
        "tensors": {name: list(array.shape) for name, array in saved_tensors.items()},
        "adapted": [[round(value, 5) for value in row] for row in merged.tolist()],
    }  # fmt: skip


def main() -> None:
    """Write the file, of all cases."""
    versions = {name: version(name) for name in ("peft", "transformers", "torch")}
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    is_old = tuple(map(int, versions["peft"].split("."))) < (0, 19, 1)
    for name, (config, adapter) in CASES.items():
        if is_old and name not in OLD:
            continue
        made = {"versions": versions, **_case(config, adapter)}
        assert all(math.isfinite(value) for row in made["adapted"] for value in row)
        found[f"{name}, PEFT {versions['peft']}" if is_old else name] = made
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
