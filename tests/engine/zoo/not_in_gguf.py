"""Classes of mlx-lm with which no GGUF architecture runs, and why."""

from __future__ import annotations

from collections.abc import Mapping

NOT_IN_LLAMA_CPP = "llama.cpp has no architecture of this kind"
HAS_NO_ROW = "llama.cpp has one, which does not load here yet: load the model from safetensors"
RUNS_OTHERWISE = "files of these models name this architecture, which runs with another class"

#: Classes for which llama.cpp has an architecture that has no row here.
NAMED: Mapping[str, str] = {
    "afmoe": "afmoe",
    "apertus": "apertus",
    "dbrx": "dbrx",
    "deepseek": "deepseek",
    "exaone_moe": "exaone-moe",
    "glm": "chatglm",
    "glm_moe_dsa": "glm-dsa",
    "gpt_bigcode": "starcoder",
    "gptj": "gptj",
    "hunyuan": "hunyuan-moe",
    "kimi_linear": "kimi-linear",
    "mimo_v2_flash": "mimo2",
    "minicpm3": "minicpm3",
    "mistral4": "mistral4",
    "nemotron-nas": "deci",
    "openelm": "openelm",
    "phimoe": "phimoe",
    "plamo": "plamo",
    "plamo2": "plamo2",
    "plamo3": "plamo3",
    "qwen": "qwen",
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
