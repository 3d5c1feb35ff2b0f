"""Write the golden files of this directory: small vocabularies, and llama.cpp's results.

    MODELPACK_LLAMA_CPP_PYTHON=… python -m tests.engine.loaders.golden.make [PART]…

PART is `vocabularies`, `tokens`, `logits` or `predictions`; without, tokens and logits are written.

The vocabularies are trained on the corpus and on the license, with `vocabularies` as argument. They
are made only once, because another version of the trainer may choose other merges.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from modelpack.testing.weights import smollm2_gguf
from tests.engine.loaders.corpus import PROMPTS, TEXTS
from tests.engine.loaders.llama_cpp_peer import ask
from tests.engine.loaders.tiny_models import PREDICTING, PROMPT, TINY_MODELS
from tests.engine.loaders.vocabularies import (
    BYTE,
    CONTROL,
    GOLDEN,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    write_vocabulary,
)

ROOT = Path(__file__).parents[4]

#: The pre-tokenisers to compare: one of each kind, and some that share a kind.
PRE_TOKENIZERS = (
    *("default", "gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "deepseek-llm"),
    *("deepseek-coder", "deepseek-v3", "falcon", "starcoder", "dbrx", "glm4", "command-r"),
    *("tekken", "gpt-4o", "seed-coder", "bailingmoe2", "afmoe", "exaone-moe", "minimax-m2"),
    *("kimi-k2", "youtu", "joyai-llm", "tiny_aya", "midm-2.0", "kormo", "f2llmv2", "minicpm5"),
    *("ufakzeka", "viking", "roberta-bpe"),
)
_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_DEFINED = ["<tool>", "</tool>"]


def _train(vocabulary_size: int, **options: Any) -> dict[str, Any]:
    plain = [text for text in TEXTS if "<|" not in text and "<t" not in text]
    text = [*plain, *(ROOT / "LICENSE").read_text().splitlines(), *map(str, range(200))]
    tokenizer = Tokenizer(models.BPE())
    for name, value in options.items():
        setattr(tokenizer, name, value)
    initial = pre_tokenizers.ByteLevel.alphabet() if "normalizer" not in options else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=initial, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def make_bpe(size: int, *, whole_text: bool = False) -> dict[str, Any]:
    """Return a vocabulary with merges, as in GPT-2.

    With `whole_text`, merges cross the ends of words, so that ids show where a text was split.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole_text)
    model = _train(size, pre_tokenizer=split)
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = [*_CONTROL, *_DEFINED]
    return {
        "model": "gpt2",
        "tokens": [*special, *tokens],
        "types": [CONTROL] * len(_CONTROL)
        + [USER_DEFINED] * len(_DEFINED)
        + [NORMAL] * len(tokens),
        "merges": [" ".join(merge) for merge in model["merges"]],
    }


def make_spm() -> dict[str, Any]:
    """Return a vocabulary with scores, as in SentencePiece: bytes, pieces, then characters."""
    model = _train(600, normalizer=normalizers.Replace(" ", "▁"))
    known = model["vocab"]
    pieces = ["".join(merge) for merge in model["merges"]]
    pieces = [piece for piece in pieces if piece not in ("<s>", "</s>", *_DEFINED)]
    # llama.cpp reads a token as a C string, which ends at NUL.
    letters = sorted(token for token in known if len(token) == 1 and token != "\0")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *dict.fromkeys(pieces), *letters, *_DEFINED]
    pieces_count = len(tokens) - 3 - 256 - len(_DEFINED)
    return {
        "model": "llama",
        "tokens": tokens,
        "types": [UNKNOWN, CONTROL, CONTROL]
        + [BYTE] * 256
        + [NORMAL] * pieces_count
        + [USER_DEFINED] * len(_DEFINED),
        "scores": [0.0] * 259
        + [-float(at) for at in range(pieces_count)]
        + [-1000.0] * len(_DEFINED),
    }


def write(name: str, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    (GOLDEN / f"{name}.json").write_text(
        text.replace('],"', '],\n"').replace("],[", "],\n[") + "\n"
    )


def make_tokens(work: Path) -> None:
    texts = list(TEXTS)
    uncut, spm = Vocabulary.read("uncut"), Vocabulary.read("spm")
    files = {pre: write_vocabulary(work / f"{pre}.gguf", uncut, pre=pre) for pre in PRE_TOKENIZERS}
    files["spm"] = write_vocabulary(work / "spm.gguf", spm, pre="default")
    files["spm-no-prefix"] = write_vocabulary(
        work / "spm2.gguf", spm, pre="default", add_space_prefix=False, add_bos_token=False
    )
    files["gemma4"] = write_vocabulary(
        work / "gemma4.gguf", spm.with_merges("gemma4"), pre="gemma4"
    )
    files["sarvam-moe"] = write_vocabulary(
        work / "sarvam.gguf", spm.with_merges("gpt2"), pre="sarvam-moe"
    )
    files["smollm2"] = smollm2_gguf()
    tasks = [{"task": "tokenize", "model": str(path), "texts": texts} for path in files.values()]
    write("tokens", dict(zip(files, ask(tasks, work), strict=True)))


def make_logits(work: Path) -> None:
    models_ = {name: model.write(work / f"{name}.gguf") for name, model in TINY_MODELS.items()}
    tasks = [
        {"task": "logits", "model": str(path), "prompts": [PROMPT]} for path in models_.values()
    ]
    answers = ask(tasks, work)
    write("logits", {n: a["logits"][0] for n, a in zip(models_, answers, strict=True)})

    tokens = ask([{"task": "tokenize", "model": str(smollm2_gguf()), "texts": list(PROMPTS)}], work)
    (smollm2,) = ask(
        [
            {
                "task": "logits",
                "model": str(smollm2_gguf()),
                "prompts": tokens[0]["ids"],
                "every": 32,
                "greedy": 8,
            }
        ],
        work,
    )
    smollm2["logits"] = [[round(value, 2) for value in row] for row in smollm2["logits"]]
    write("smollm2", {"prompts": tokens[0]["ids"], **smollm2})


def make_predictions(work: Path) -> None:
    paths = [TINY_MODELS[name].write_predicting(work / f"{name}.gguf") for name in PREDICTING]
    tasks = [{"task": "predict", "model": str(path), "prompt": PROMPT} for path in paths]
    answers = ask(tasks, work)
    write("predictions", {n: a["logits"] for n, a in zip(PREDICTING, answers, strict=True)})


def main(wanted: set[str]) -> None:
    if "vocabularies" in wanted:
        write("bpe", make_bpe(430))
        write("uncut", make_bpe(1800, whole_text=True))
        write("spm", make_spm())
    with tempfile.TemporaryDirectory() as work:
        if "tokens" in wanted:
            make_tokens(Path(work))
        if "logits" in wanted:
            make_logits(Path(work))
        if "predictions" in wanted:
            make_predictions(Path(work))


if __name__ == "__main__":
    main(set(sys.argv[1:]) or {"tokens", "logits"})
