"""Classes of mlx-lm with which no GGUF architecture runs, and why."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

NOT_IN_LLAMA_CPP = f"llama.cpp has no architecture of this kind, by gguf {version('gguf')}"
HAS_NO_ROW = (
    "llama.cpp has one, but the engine's table of tensor names has no row for it, and its logits"
    " were not compared with the class's: load the model from safetensors"
)
#: Phi-3.5-MoE: the logits differ from the class's by a cosine of 0.3; they agree if the class does
#: as the reason says. GPT-J: llama-cpp-python 0.3.36 says "unsupported model architecture".
DIFFERS = {
    "gptj": "llama.cpp has the name and no graph: it loads no such file either",
    "phimoe": "llama.cpp has one, with other norms (RMS) and scores (softmax) than the model",
}
RUNS_OTHERWISE = "files of these models name this architecture, which runs with another class"

#: Classes for which llama.cpp has an architecture that has no row here.
NAMED: Mapping[str, str] = {
    "dbrx": "dbrx",
    "glm_moe_dsa": "glm-dsa",
    "mimo_v2_flash": "mimo2",
    "minicpm3": "minicpm3",
    "plamo": "plamo",
    "plamo2": "plamo2",
    "plamo3": "plamo3",
    "rwkv7": "rwkv7",
    "step3p5": "step35",
}

#: Classes whose models llama.cpp's converter writes as an architecture that runs with another.
OTHERWISE: Mapping[str, str] = {
    "exaone": "exaone",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "glm4_moe_lite": "deepseek2",
    "internlm2": "internlm2",
    "internlm3": "llama",
    "kimi_k25": "deepseek2",
    "kimi_vl": "deepseek2",
    "lfm2-vl": "lfm2",
    "llama4_text": "llama4",
    "minicpm": "minicpm",
    "mistral3": "mistral3",
    "pixtral": "llama",
    "solar_open": "glm4moe",
    "youtu_llm": "deepseek2",
}
