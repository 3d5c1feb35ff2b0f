"""The model types of mlx-vlm in docs/models.md: which read pictures here, and why others do not."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version

from mlx_lm.utils import MODEL_REMAPPING

from modelpack_engine.embedding.encoder_checkpoint import is_encoder
from modelpack_engine.models.multimodal import TEXT_TYPES
from modelpack_engine.vision.models import CLASSES
from modelpack_engine.vision.sounds import SOUND_CLASSES
from modelpack_engine.vision.videos import VIDEO_CLASSES
from tests.engine.vision.tiny import FALLBACK
from tests.engine.zoo.excluded import EXCLUDED

HEAD = """
## Model types of mlx-vlm

Support for the model types of mlx-vlm {version}. Those that read pictures, sounds or
videos are compared with its single-request path ([how](pictures.md)); "text" are those that run
with mlx-lm's class, without their pictures or sound if they have a tower; "embeddings" have a class
of our own. Models that read pictures run in the paged tier, unless another one is named in
brackets; the first table has the tiers of models of text.

| model type | here | |
|---|---|---|
"""

#: Packages of mlx_vlm.models that are parts of others.
PARTS = frozenset({"bonsai", "mistral4"})

#: Fields of config.json with another model type than the name of mlx-vlm's package.
_TYPES: Mapping[str, str] = {
    "klear": "Klear",
    "lille_130m": "lille-130m",
    "lfm2_vl": "lfm2-vl",
    "nemotron_nas": "nemotron-nas",
}

_PICTURES = "pictures are not read yet"
_NO_TOKEN = "their place in a prompt has no token"
_MAKES = "makes pictures"
_SEES = "detects, segments or measures; it writes no text"
_ENCODES = "an encoder or a classifier that has no class here"
_DIFFUSION = "writes by diffusion, not token by token"
_SOUND = "sound is not read yet"
_VIDEOS = "videos are not read yet"
_NO_EMBEDDINGS = "mlx-lm's class of its language model takes no embeddings"


def _each(why: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


#: Why pictures are not read, or a model does not load, if it is not just a model of text.
REASONS: Mapping[str, str] = {
    **_each(
        _MAKES,
        """ernie_image flux2 flux3 ideogram4 llada_image mage_flow ming_image moss_image qwen_image
        z_image""",
    ),
    **_each(
        _SEES,
        """dinov2 falcon_perception moge3 pp_doclayout_v3 rfdetr rt_detr_v2 sam3 sam3_1 sam3d_body
        sam3d_objects sapiens2 siglip video_depth_anything yolo11""",
    ),
    **_each(
        _ENCODES,
        """bert clef colidefics3 colqwen2_5 d1 d1_omni decider2 embedding_gemma2 gemma3_embedding
        gliner2_5 laya lfm2_colbert lfm2_embedding lfm2_encoder llama_bidirec
        llama_nemotron_vl_embedding ministral3_embedding modernbert openai_privacy_filter
        qwen3_embedding qwen3_vl_embedding xlm_roberta""",
    ),
    **_each(_DIFFUSION, "diffusion_gemma llada2_moe nemotron_labs_diffusion"),
    **_each(f"{_PICTURES}: {_NO_TOKEN}", "llava_bunny moondream2 moondream3 phi4_siglip"),
    **_each(f"{_PICTURES}: within one, tokens attend to later ones", "deepseek_v4"),
    **_each(f"{_PICTURES}: its processor is Python code", "llmjpvl youtu_vl"),
    "cohere_compass": f"{_PICTURES}: three positions a token, and DeepStack, in mlx-vlm's class",
    "falcon_ocr": f"{_PICTURES}: no tower; patches attend to each other in the language model",
    "glm5_next": f"{_PICTURES}: an indexer and linear attention in mlx-vlm's class",
    "indic_ocr": f"{_PICTURES}: a pipeline of two models",
    "kimi_k3": f"{_PICTURES}: its chat format is Python code",
    "locateanything": f"{_PICTURES}: boxes are written in parallel, not token by token",
    "molmo2": f"{_PICTURES}: within one, tokens attend to later ones, but not in mlx-vlm's class",
    "molmo_point": f"{_PICTURES}: points are chosen among patches, not written as text",
    "qwen4_exp": f"{_PICTURES}: sparse attention with a cache of mlx-vlm's",
    "unlimited_ocr": f"{_PICTURES}: keys of new tokens are in a ring after those of the prompt",
    "zaya1_vl": f"{_PICTURES}: their tokens have weights of their own (LoRA)",
    "deepseek_v41": f"{_PICTURES}: biases of their own route their tokens to experts, and"
    " mlx-lm's class takes no embeddings",
    "deepseekocr_2": f"{_PICTURES}: its tower is a decoder with learned queries, and layers of"
    " DeepSeek-V2 have Llama's attention",
    "jina_vlm": f"{_PICTURES}: rows of overlapping crops are added to the embeddings of tokens",
    "minimax_m3_vl": f"{_PICTURES}: {_NO_EMBEDDINGS}",
    "plamo2vl": f"{_PICTURES}: its tokenizer is Python code",
    "step3p7": f"{_PICTURES}: a view and windows of another size, cut by Python code;"
    f" {_NO_EMBEDDINGS} (step3p5)",
    "deepseekocr": f"{_PICTURES}: published files name the type deepseek_vl_v2, with another tower",
    "ernie4_5_moe_vl": f"{_PICTURES}: their tokens have experts of their own",
    "fastvlm": f"{_PICTURES}: its tokenizer has no token for them",
    "got": f"{_PICTURES}: its tokenizer is Python code",
    "hunyuan_vl": f"{_PICTURES}: four positions a token (XD-RoPE)",
    "florence2": "an encoder and a decoder",
    "inkling": f"{_SOUND}: its language model, with convolutions in all layers, is mlx-vlm's",
    "minicpmv4_7": f"{_PICTURES}: positions on a canvas",
    "mimo_v2": f"{_PICTURES}: {_NO_EMBEDDINGS} (mimo_v2_flash);"
    f" {_SOUND}: a codec with weights of its own encodes it",
    "minimax_h3": "makes videos",
    "multi_modality": f"{_PICTURES}: mlx-vlm's package needs OpenCV",
    "nemotron_h_nano_omni": f"{_PICTURES}: {_NO_EMBEDDINGS} (nemotron_h); {_SOUND}: likewise",
    "nemotron_parse": "an encoder and a decoder",
    "nemotron_voicechat": f"{_SOUND}: it listens and speaks at the same time, in a session",
}  # fmt: skip

#: What types that read pictures or sounds do not read, and why.
PARTLY: Mapping[str, str] = {
    **_each(
        f"{_VIDEOS}: mlx-vlm's processor takes none",
        "glm4v glm4v_moe internvl internvl_chat kimi_k25 kimi_vl",
    ),
    "minicpmv4_6": f"{_VIDEOS}: frames are cut into slices",
    "smolvlm": f"{_VIDEOS}: mlx-vlm tiles frames and omits their times, unlike transformers",
    "phi4mm": f"{_PICTURES}: mlx-vlm's processor cuts them into no tiles, as the model's does",
    "minicpmo": f"{_SOUND}: mlx-vlm's encoder attends to all of it, the model's to parts of 1 s",
}


def names() -> list[str]:
    """Return the packages of mlx-vlm that are models."""
    spec = importlib.util.find_spec("mlx_vlm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = f"{next(iter(spec.submodule_search_locations))}/models"
    return sorted({m.name for m in pkgutil.iter_modules([root]) if m.ispkg} - PARTS)


def outcome(name: str) -> tuple[str, str]:
    """Return what becomes of a model type, and the reason if it is not all that mlx-vlm does."""
    kind = _TYPES.get(name, name)
    if kind in CLASSES:
        more = {"sounds": SOUND_CLASSES, "videos": VIDEO_CLASSES}
        shown = ["pictures"] * CLASSES[kind].pictures
        *first, last = [*shown, *(name for name in more if kind in more[name])]
        read = f"{', '.join(first)} and {last}" if first else last
        tier = " (fallback)" if kind in FALLBACK else ""
        return f"{read}{tier}", PARTLY.get(name, "")
    if is_encoder({"model_type": kind}):
        return "embeddings", ""
    if kind in TEXT_TYPES:
        return "text", ""
    text = importlib.util.find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}") is not None
    if text and name not in EXCLUDED:
        return "text", REASONS.get(name, "")
    if text:
        return "text, not tested", EXCLUDED[name]
    no_class = "mlx-lm has no class for it"
    why = REASONS.get(name, no_class)
    return "does not load", f"{why}; {no_class}" if _PICTURES in why or _SOUND in why else why


def table() -> str:
    """Return the section of docs/models.md about mlx-vlm."""
    return HEAD.format(version=version("mlx-vlm")) + "".join(rows())


def rows() -> Iterator[str]:
    """Yield the line of each model type."""
    for name in names():
        here, why = outcome(name)
        yield f"| {_TYPES.get(name, name)} | {here} | {why} |\n"
