"""Run llama.cpp: read a job from a JSON file, and write the results to another.

    python oracle.py JOB.json ANSWERS.json

It needs only llama-cpp-python and numpy, so it can run in a separate environment.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

F32 = 0


def tokenize(model: str, texts: list[str]) -> dict[str, Any]:
    """Return the ids of each text, with and without special tokens, the end tokens, and a checksum.

    `plain` has, by index, only the texts whose ids differ if `<|im_end|>` is plain text.
    """
    llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    raw = [text.encode() for text in texts]
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    count = llama_cpp.llama_vocab_n_tokens(vocab)
    buffer = ctypes.create_string_buffer(4096)

    def piece(token: int) -> bytes:
        size = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:size]

    special = [llama.tokenize(text, add_bos=False, special=True) for text in raw]
    plain = [llama.tokenize(text, add_bos=False, special=False) for text in raw]
    answer: dict[str, Any] = {
        "ids": special,
        "plain": {at: ids for at, ids in enumerate(plain) if ids != special[at]},
        "prompt": llama.tokenize(raw[-1], add_bos=True, special=True),
        "ends": [at for at in range(count) if llama_cpp.llama_vocab_is_eog(vocab, at)],
        "pieces": sum((at + 1) * sum(piece(at)) for at in range(count)),
    }
    llama.close()
    return answer


def logits(model: str, prompts: list[list[int]], every: int = 1, greedy: int = 0) -> dict[str, Any]:
    """Return a sample of the logits after each prompt, and the greedy tokens."""
    answer: dict[str, Any] = {"logits": [], "greedy": []}
    size = 16 + greedy + max(map(len, prompts))
    llama = llama_cpp.Llama(
        model,
        n_ctx=size,
        n_batch=size,
        n_ubatch=size,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        verbose=False,
    )
    for prompt in prompts:
        llama.reset()
        llama.eval(prompt)
        row = np.array(llama.scores[len(prompt) - 1], np.float32)
        answer["logits"].append([round(float(value), 5) for value in row[::every]])
        tokens: list[int] = []
        while len(tokens) < greedy:
            tokens.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(tokens[-1:])
        answer["greedy"].append(tokens)
    llama.close()
    return answer


def predict(model: str, prompt: list[int]) -> dict[str, Any]:
    """Return the logits of the layer for multi-token prediction after a prompt.

    It reads the state of each token beside the next token.
    """
    from llama_cpp import llama_cpp_ext

    loading = llama_cpp.llama_model_default_params()
    loading.load_mtp = True
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), loading)
    width = llama_cpp.llama_model_n_embd(loaded)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED

    def decode(context: Any, tokens: list[int], states: Any = None) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, at
            batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, 0, 1
        if states is not None:
            batch.embd = states.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        code = llama_cpp.llama_decode(context, batch)
        assert code == 0, f"llama_decode returned {code}"

    target = llama_cpp.llama_init_from_model(loaded, params)
    llama_cpp_ext.llama_set_embeddings_nextn(target, True, False)
    decode(target, prompt)
    found = llama_cpp_ext.llama_get_embeddings_nextn(target)
    states = np.ctypeslib.as_array(found, (len(prompt), width))[:-1].copy()
    params.ctx_type, params.ctx_other = llama_cpp.LLAMA_CONTEXT_TYPE_MTP, target
    drafter = llama_cpp.llama_init_from_model(loaded, params)
    decode(drafter, prompt[1:], states)
    count = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(drafter), (len(states), count))
    return {"logits": [round(float(value), 5) for value in rows[-1]]}


def embed(model: str, texts: list[str]) -> dict[str, Any]:
    """Return the vector of each text, of length 1, pooled as the file says."""
    llama = llama_cpp.Llama(
        model,
        embedding=True,
        n_ctx=128,
        n_batch=128,
        n_ubatch=128,
        n_threads=1,
        n_threads_batch=1,
        flash_attn=False,
        verbose=False,
    )
    answer = {"vectors": [llama.embed(text, normalize=True) for text in texts]}
    llama.close()
    return answer


def quantize(source: str, target: str, type: str, pure: bool = False) -> dict[str, Any]:
    """Write the model in `source` to `target` in another file type, such as Q4_K_M.

    `pure` uses that type for every tensor whose rows it fits, instead of a mixture.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type}")
    params.allow_requantize = True
    params.pure = pure
    params.nthread = 2
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    return {"code": int(code)}


class _TypeTraits(ctypes.Structure):
    # ggml.h: struct ggml_type_traits.
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


def dequantize(source: str, target: str, type: int, count: int) -> dict[str, Any]:
    """Write `count` float32 values to `target`: ggml's dequantisation of the blocks in `source`."""
    library = next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.*"))
    traits_of = ctypes.CDLL(os.fspath(library)).ggml_get_type_traits
    traits_of.restype = ctypes.POINTER(_TypeTraits)
    traits = traits_of(ctypes.c_int(type)).contents
    blocks = np.fromfile(source, np.uint8)
    values = np.empty(count, np.float32)
    traits.to_float(blocks.ctypes.data, values.ctypes.data, count)
    values.tofile(target)
    return {"type": traits.type_name.decode()}


TASKS = {task.__name__: task for task in (tokenize, logits, predict, embed, quantize, dequantize)}


def main() -> None:
    job, answers = map(Path, sys.argv[1:])
    found = [TASKS[task.pop("task")](**task) for task in json.loads(job.read_text())]
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
