"""Train an EAGLE-3 head for SmolLM2-135M on its own outputs, and measure it.

    python benchmarks/eagle.py train HEAD --seconds 200    write HEAD/model.safetensors
    python benchmarks/eagle.py measure HEAD                tokens/s with and without it

The training text is what the model answers to questions: a half is made from templates, and a half
are questions that the model itself writes in place of the user (arXiv:2406.08464). Those of the
measurement are from the templates and have other subjects. The head is trained as in EAGLE-3
(arXiv:2503.01840): it predicts the model's distribution from its hidden states, then from its own,
for `--unrolled` tokens ahead.
Its layer starts as the model's last layer. `chat` answers questions, and `edit` repeats a Python
file that the prompt has; both greedily.
"""

# ruff: noqa: E402 (MLX is imported after its BLAS is chosen)

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from modelpack_engine.platform import blas

blas.prepare()  # before MLX is imported

# isort: split
import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from measuring import host_ms, print_machine
from mlx.utils import tree_flatten, tree_map

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel, ModelFiles, load
from modelpack_engine.models.eagle import EagleHead, HeadConfig, load_head
from modelpack_engine.patches.lora import dense_weight
from modelpack_engine.platform.device import total_memory
from modelpack_engine.request import EngineRequest, SamplingParams

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
REQUESTS = (
    """
What is {}?|Explain {} to a child.|Write a short story about {}.|List five facts about {}.
Why is {} important?|Give me advice on {}.|What are the advantages and disadvantages of {}?
Write a poem about {}.|Summarize the history of {}.|How does {} work?|Write an email about {}.
Compare {} with something similar.|What are common mistakes with {}?|Describe {} in detail.
How do I get started with {}?|Write a dialogue between two friends about {}.
What is the future of {}?|Write a Python function that has to do with {}.
Give an example of {} from everyday life.|Write an essay on {}.
Who should know about {}, and why?|Write a blog post about {}.|What should I know about {}?
What questions do people ask about {}?|Make a plan to learn about {}.|Write a speech about {}.
Give three reasons to care about {}.|Tell me a joke about {}.|What is your opinion on {}?
Describe a day that has to do with {}.|How has {} changed over time?|Write a letter about {}.
Explain the basic ideas behind {}.|What problems come with {}?|Introduce {} to beginners.
What are the most important facts about {}?|Write a product description related to {}.
Suggest a title and an outline for a talk on {}.|How can I teach {} to a class?
Write a news report about {}.
""".strip()
    .replace("\n", "|")
    .split("|")
)
SUBJECTS = (
    """
photosynthesis|the moon|bicycles|cooking rice|machine learning|the Roman Empire|rain|chess|coffee
volcanoes|learning a language|the human heart|electric cars|gardening|jazz|black holes|money|sleep
friendship|the internet|bread|swimming|democracy|dogs|mathematics|the ocean|robots|climate change
painting|football|airplanes|the brain|vaccines|libraries|trees|public speaking|databases|the sun
mountains|tea|running|a lost key|time travel|a lighthouse|bees|bridges|sorting a list|job interviews
gravity|music theory|healthy food|the French Revolution|saving energy|a small village|writing
computers|stress|elections|dinosaurs|earthquakes|fashion|trains|insurance|the stock market|birds
recursion|a dragon|school|photography|marketing|rivers|cats|vitamins|water|the printing press
teamwork|desert animals|Mars|knitting|encryption|a haunted house|parenting|honesty|the piano|maps
glaciers|the wheel|hiking|pasta|neural networks|the Vikings|snow|poker|chocolate|tornadoes|grammar
the lungs|buses|farming|opera|galaxies|taxes|dreams|neighbours|email|pizza|cycling|voting|horses
geometry|coral reefs|drones|forests|sculpture|tennis|helicopters|memory|antibiotics|museums|roses
negotiation|spreadsheets|stars|canyons|wine|rock climbing|a stolen ring|parallel worlds|a castle
ants|tunnels|binary search|a first day at work|magnets|rhythm|breakfast|the Industrial Revolution
insulation|a fishing town|poetry|smartphones|anxiety|parliament|fossils|floods|shoes|ships|pensions
inflation|owls|graphs|a wizard|university|film|waterfalls|rabbits|protein|soap|the telegraph
conflict at work|whales|Jupiter|sewing|passwords|a ghost ship|adoption|courage|the guitar|compasses
algebra|the Aztecs|batteries|camping|cloud computing|crime novels|customer service|dance|debt
deserts|diplomacy|drawing|ecosystems|electricity|energy drinks|ethics|evolution|fire|fishing|flutes
fractions|garlic|genes|glass|gold|habits|hospitals|houses|humour|ice cream|immigration|insects
islands|jealousy|journalism|justice|kites|lakes|lawyers|lenses|light|lions|logic|loneliness
medicine|meteors|mice|milk|mirrors|monkeys|motivation|mushrooms|myths|nutrition|oil
online shopping|oxygen|paper|patience|pets|philosophy|planets|plastic|plumbing|pottery|probability
psychology|puzzles|radio|rainbows|reading|refrigerators|religion|restaurants|rice farming|rockets
roads|salt|satellites|savings|science fiction|seasons|sharks|silence|singing|skiing|soil|sound
spices|spiders|statistics|steel|storms|sugar|surgery|surprise|teachers|telescopes|television
the alphabet|the calendar|the Cold War|the desert|the eye|the Great Wall|the immune system
the kitchen|the law|the moon landing|the Olympics|the periodic table|the Renaissance|the sky
the skin|theatre|thunder|tigers|time management|tomatoes|tourism|toys|traffic|translation|trust
turtles|typewriters|umbrellas|unit tests|video games|violence|viruses|volunteering|walking
wallpaper|war|web pages|weddings|weeds|wheat|wind|windows|wolves|woodwork|work from home|zoos
""".strip()
    .replace("\n", "|")
    .split("|")
)
UNSEEN = (
    """
lightning|sailing|the violin|compilers|a winter festival|recycling|penguins|the Silk Road|yoga
leadership|a clock maker|solar panels|cheese|basketball|ancient Egypt|prime numbers
""".strip()
    .replace("\n", "|")
    .split("|")
)
SOURCES = Path(__file__).parent.parent / "engine" / "modelpack_engine"


def turns(question: str | None) -> str:
    """Return a conversation in the model's format that ends in the question; None to begin it."""
    begun = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    return begun if question is None else f"{begun}{question}<|im_end|>\n<|im_start|>assistant\n"


def edits(count: int) -> list[str]:
    """Return prompts whose continuation repeats a file of this repository."""
    files = sorted(SOURCES.glob("*/*.py"), key=lambda path: -path.stat().st_size)[:count]
    texts = [path.read_text()[:1200] for path in files]
    return [f"```python\n{text}\n```\nThe same again:\n```python\n{text[:80]}" for text in texts]


def device() -> Any:
    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"


def target(path: Path | None, *, dense: bool | None = None) -> LoadedModel:
    if path is None:
        from modelpack.testing.weights import smollm2_gguf

        path = smollm2_gguf()
    return load(ModelFiles.from_directory(path), device=device(), dense=dense)


# Training


def outputs(
    loaded: LoadedModel, count: int, tokens: int, until: float
) -> list[tuple[list[int], list[int]]]:
    """Return prompts and what the model answers, some greedily and some sampled, until a time."""
    chooser = random.Random(1)
    pairs = [(request, subject) for request in REQUESTS for subject in SUBJECTS]
    chooser.shuffle(pairs)
    config = EngineConfig(
        device=device(), max_model_len=1024, self_test=False, warm_up=False,
        max_num_seqs=512 if device() == "gpu" else 16, max_waiting=count,
        speculative_method="none",
    )  # fmt: skip
    engine = Engine(loaded, config)
    encode, decode = loaded.tokenizer.encode, loaded.tokenizer.decode

    def answers(requests: list[EngineRequest]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in requests]
        for number, request in enumerate(requests):
            engine.add_request(str(number), request)
        while engine.has_work and time.monotonic() < until:
            for event in engine.step():
                found[int(event.request_id)].extend(event.token_ids)
        for number in range(len(requests)):
            engine.abort(str(number))
        return found

    begun = encode(turns(None))
    written = answers([
        EngineRequest(begun, SamplingParams(max_tokens=64, temperature=1, seed=number))
        for number in range(count // 2)
    ])  # fmt: skip
    asked = [decode(ids).strip() for ids in written]
    asked += [
        request.format(subject)
        for request, subject in (pairs[n % len(pairs)] for n in range(count - len(asked)))
    ]
    chooser.shuffle(asked)
    prompts = [encode(turns(question)) for question in asked]
    found = answers([
        EngineRequest(prompt, SamplingParams(
            max_tokens=tokens, temperature=(0, 0.7, 0, 1)[number % 4], seed=number,
            ignore_eos=number % 8 < 2,  # the measurement goes on after an end
        ))
        for number, prompt in enumerate(prompts)
    ])  # fmt: skip
    engine.close()
    return list(zip(prompts, found, strict=True))


def first_head(loaded: LoadedModel, draft_ids: list[int], width: int) -> EagleHead:
    """Return a head that starts as the model's last layer.

    The units that its MLP of `width` has more than the model's do nothing at first.
    """
    model: Any = loaded.model
    inner, args = model.model, model.args
    size = args.hidden_size
    count = len(inner.layers)
    config = HeadConfig(
        hidden_size=size,
        target_hidden_size=size,
        intermediate_size=max(width, args.intermediate_size),
        num_heads=args.num_attention_heads,
        num_kv_heads=args.num_key_value_heads,
        head_dim=args.head_dim or size // args.num_attention_heads,
        vocab_size=args.vocab_size,
        draft_vocab_size=len(draft_ids),
        rms_norm_eps=args.rms_norm_eps,
        rope_theta=args.rope_theta,
        max_position_embeddings=args.max_position_embeddings,
        layers=(2, count // 2, count - 1),
    )
    head, last = EagleHead(config), inner.layers[-1]
    own = head.midlayer
    zeros = mx.zeros((size, size))
    head.fc.weight = mx.concatenate([zeros, zeros, mx.eye(size)], axis=1)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = dense_weight(last.self_attn[name])
        own.self_attn[name].weight = mx.concatenate([mx.zeros_like(weight), weight], axis=1)
    own.self_attn.o_proj.weight = dense_weight(last.self_attn.o_proj)
    more = config.intermediate_size - args.intermediate_size
    for name in ("gate_proj", "up_proj"):
        weight = dense_weight(last.mlp[name])
        units = 0.02 * mx.random.normal((more, size), key=mx.random.key(len(name)))
        own.mlp[name].weight = mx.concatenate([weight, units.astype(weight.dtype)])
    own.mlp.down_proj.weight = mx.pad(dense_weight(last.mlp.down_proj), [(0, 0), (0, more)])
    own.hidden_norm.weight = last.input_layernorm.weight
    own.post_attention_layernorm.weight = last.post_attention_layernorm.weight
    head.norm.weight = inner.norm.weight
    ids = mx.array(draft_ids)
    head.lm_head.weight = inner.embed_tokens(ids)
    head.d2t = ids.astype(mx.int32) - mx.arange(len(draft_ids))
    head.set_dtype(mx.float32)
    mx.eval(head.parameters())
    return head


def hidden_states(
    loaded: LoadedModel, config: HeadConfig, ids: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the hidden states that the head reads and the last ones [batch, tokens, …]."""
    inner: Any = loaded.model["model"]
    hidden, inputs = inner.embed_tokens(ids), {}
    for number, layer in enumerate(inner.layers):
        inputs[number] = hidden
        hidden = layer(hidden, "causal", None)
    return mx.concatenate([inputs[n] for n in config.layers], axis=-1), inner.norm(hidden)


def shifted(array: mx.array, count: int, axis: int) -> mx.array:
    """Return an array moved by `count` to later positions, with zeros before."""
    if not count:
        return array
    kept = mx.split(array, [array.shape[axis] - count], axis=axis)[0]
    before = list(array.shape)
    before[axis] = count
    return mx.concatenate([mx.zeros(before, array.dtype), kept], axis=axis)


def unrolled_loss(
    head: EagleHead,
    embedded: mx.array,
    states: mx.array,
    wanted: mx.array,
    mask: mx.array,
    steps: int,
) -> tuple[mx.array, mx.array]:
    """Return the loss, and the share of right first tokens after 1, 2, … unrolled tokens.

    Row i of `embedded` is the token after position i; `wanted` [batch, tokens, draft vocabulary]
    are the model's probabilities of the token after that one.
    """  # fmt: skip
    config = head.config
    batch, tokens, _ = embedded.shape
    group = config.num_heads // config.num_kv_heads
    positions = mx.broadcast_to(mx.arange(tokens)[None], (batch, tokens)).reshape(-1)
    hidden = head.fc(states)
    keys, values, total, right = [], [], mx.array(0.0), []
    at = mx.arange(tokens)
    best = mx.argmax(wanted, axis=-1)

    def heads(rows: mx.array, repeat: int) -> mx.array:
        array = rows.reshape(batch, tokens, -1, config.head_dim).transpose(0, 2, 1, 3)
        return mx.repeat(array, repeat, axis=1) if repeat > 1 else array

    for step in range(steps):
        mask = mask * (at >= step)
        rows = hidden.reshape(batch * tokens, -1)
        flat = embedded.reshape(batch * tokens, -1)
        residual, queries, key, value = head.project(rows, flat, positions)
        queries = heads(queries, 1)
        keys.append(heads(key, group))
        values.append(heads(value, group))
        scores = [(queries @ keys[0].swapaxes(-1, -2)) * head.scale]
        causal = at[None] <= at[:, None] - step
        scores[0] = mx.where(causal, scores[0], -1e9)
        for other in range(1, step + 1):
            moved = shifted(keys[other], step - other, 2)
            scores.append((queries * moved).sum(-1, keepdims=True) * head.scale)
        weights = mx.softmax(mx.concatenate(scores, axis=-1).astype(mx.float32), axis=-1)
        weights = weights.astype(queries.dtype)
        attended = weights[..., :tokens] @ values[0]
        for other in range(1, step + 1):
            column = weights[..., tokens + other - 1 : tokens + other]
            attended = attended + column * shifted(values[other], step - other, 2)
        attended = attended.transpose(0, 2, 1, 3).reshape(batch * tokens, -1)
        after = head.finish(residual, attended)
        logits = head.logits(after).reshape(batch, tokens, -1).astype(mx.float32)
        losses = mx.logsumexp(logits, axis=-1) - (wanted * logits).sum(-1)
        total = total + 0.8**step * (losses * mask).sum() / mx.maximum(mask.sum(), 1)
        hits = (mx.argmax(logits, axis=-1) == best) * mask
        right.append(hits.sum() / mx.maximum(mask.sum(), 1))
        hidden = shifted(after.reshape(batch, tokens, -1), 1, 1)
    return total, mx.stack(right)


def train(args: argparse.Namespace) -> None:
    begun = time.monotonic()
    loaded = target(args.model, dense=True)  # large matmuls of packed weights are slow
    pairs = outputs(loaded, args.prompts, args.tokens, begun + args.generation)
    mx.clear_cache()
    if device() == "gpu":
        mx.set_memory_limit(int(0.9 * total_memory()))  # the engine's has no room for the states
    said = sum(len(answer) for _, answer in pairs)
    print(f"{said} tokens generated in {time.monotonic() - begun:.0f} s", flush=True)
    counts = Counter(token for prompt, answer in pairs for token in prompt + answer)
    ids = [token for token, _ in counts.most_common(args.vocabulary)]
    ids += [token for token in range(args.vocabulary) if token not in counts]
    ids = sorted(ids[: args.vocabulary])
    if args.start is None:
        head = first_head(loaded, ids, args.width)
    else:
        head = load_head(ModelFiles.from_directory(args.start))
        head.set_dtype(mx.float32)
        ids = np.array(head.token_ids(mx.arange(head.num_logits))).tolist()
    covered = sum(counts[token] for token in ids) / counts.total()
    kind = mx.bfloat16 if device() == "gpu" else mx.float32
    inner: Any = loaded.model["model"]
    rows = inner.embed_tokens(mx.array(ids)).astype(kind)
    optimizer = optimizers.AdamW(
        learning_rate=args.rate, weight_decay=args.decay, betas=[0.9, 0.95]
    )
    head.freeze(keys=["d2t"], recurse=False)

    def loss(
        weights: Any, tokens: mx.array, states: mx.array, last: mx.array, mask: mx.array
    ) -> Any:
        head.update(tree_map(lambda array: array.astype(kind), weights))
        wanted = mx.softmax((last[:, 1:-1] @ rows.T).astype(mx.float32), axis=-1)
        embedded = inner.embed_tokens(tokens[:, 1:-1]).astype(kind)
        return unrolled_loss(
            head, embedded, states[:, :-2], mx.stop_gradient(wanted), mask[:, 1:-1], args.unrolled
        )

    weights = head.trainable_parameters()
    optimizer.init(weights)
    gradient = mx.value_and_grad(loss)

    @mx.compile
    def step(weights: Any, state: Any, *batch: mx.array) -> Any:
        optimizer.state = state
        (found, right), slopes = gradient(weights, *batch)
        slopes, _ = optimizers.clip_grad_norm(slopes, 1.0)
        weights = optimizer.apply_gradients(slopes, weights)
        return weights, optimizer.state, found, right

    tokens_of, masks = [], []
    for prompt, answer in pairs:
        tokens = (prompt + answer)[: args.length]
        mask = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt) + 1)
        padding = args.length - len(tokens)
        if len(tokens) > len(prompt) + 8:
            tokens_of.append(tokens + [0] * padding)
            masks.append(mask + [0.0] * padding)
    # The model's states do not change: computed once.
    batches: list[tuple[mx.array, ...]] = []
    for at in range(0, len(tokens_of) - args.batch + 1, args.batch):
        part = slice(at, at + args.batch)
        ids_of = mx.array(tokens_of[part], mx.int32)
        states, last = hidden_states(loaded, head.config, ids_of)
        batches.append((ids_of, states.astype(kind), last.astype(kind), mx.array(masks[part])))
        mx.eval(batches[-1])
    if len(batches) < 2:
        raise SystemExit(f"{len(tokens_of)} rows are too few for two batches: generate for longer")
    held = max(1, min(args.held // args.batch, len(batches) // 2))

    def evaluated() -> str:
        """Return the shares of right tokens in rows that are not trained on."""
        parts = []
        for batch in batches[:held]:
            parts.append(loss(weights, *batch)[1])
            mx.eval(parts[-1])
        shares: Any = mx.mean(mx.stack(parts), axis=0).tolist()
        return " ".join(f"{value:.3f}" for value in shares)

    chooser, number = random.Random(2), 0
    started = shown = time.monotonic()
    print(f"{len(tokens_of)} rows, prepared after {started - begun:.0f} s", flush=True)
    left = args.seconds - (started - begun)
    state, found = optimizer.state, mx.array(0.0)
    order: list[int] = []
    while number < args.steps:
        progress = max(number / args.steps, (time.monotonic() - started) / max(left, 1))
        if progress >= 1:
            break
        warm = min(1.0, (number + 1) / 100)
        state["learning_rate"] = mx.array(
            args.rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        )
        order = order or chooser.sample(range(held, len(batches)), len(batches) - held)
        last_loss = found
        weights, state, found, right = step(weights, state, *batches[order.pop()])
        mx.async_eval(weights, state, found, right)
        mx.eval(last_loss)  # at most two steps are on their way
        number += 1
        if number == 1:  # compiling took its time
            mx.eval(found)
            started = time.monotonic()
        if number == 1 or time.monotonic() - shown > 20:
            shown = time.monotonic()
            accurate = " ".join(f"{value:.3f}" for value in right.tolist())
            print(
                f"step {number} {shown - started:.0f} s: loss {found.item():.3f}, "
                f"right {accurate}, others {evaluated()}",
                flush=True,
            )
    print(f"step {number}: others {evaluated()}", flush=True)
    head.update(weights)
    print(f"{number} steps, {covered:.1%} of tokens are in the draft vocabulary", flush=True)
    save(head, args.head, loaded)


def save(head: EagleHead, path: Path, loaded: LoadedModel) -> None:
    """Write a head in the format of published ones."""
    path.mkdir(parents=True, exist_ok=True)
    config = head.config
    flat: Any = tree_flatten(head.parameters())
    arrays = {
        name: array.astype(mx.int32 if name == "d2t" else mx.bfloat16) for name, array in flat
    }
    mx.save_safetensors(str(path / "model.safetensors"), arrays, {"format": "pt"})
    document = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "eagle_aux_hidden_state_layer_ids": list(config.layers),
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(document, indent=2) + "\n")


# Measurement


def timed(engine: Engine, loaded: LoadedModel, prompts: list[str], tokens: int) -> dict[str, Any]:
    """Return the tokens/s after the first token, and the counts of proposals."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    before = engine.stats()
    for number, text in enumerate(prompts):
        engine.add_request(str(number), EngineRequest(loaded.tokenizer.encode(text), params))
    seen, made, begun = set[str](), 0, 0.0
    texts: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            made += len(event.token_ids) if begun else 0
            seen.add(event.request_id)
            texts.setdefault(event.request_id, []).extend(event.token_ids)
        if not begun and len(seen) == len(prompts):
            begun = time.perf_counter()
    seconds = time.perf_counter() - begun
    after = engine.stats()
    proposals = after.num_proposals - before.num_proposals
    accepted = after.accepted_tokens - before.accepted_tokens
    return {
        "rate": made / seconds,
        "times": list(host_ms(before, after).values()),
        "accepted": accepted / proposals if proposals else 0.0,
        "text": [texts[str(number)] for number in range(len(prompts))],
    }


def measure(args: argparse.Namespace) -> None:
    """Print what each way of proposing makes of the speed; rounds have all ways in turn.

    A machine's speed may change by half within minutes, so a round is compared with itself.
    """
    count = max(args.streams) * args.rounds
    asked = [
        REQUESTS[n % len(REQUESTS)].format(UNSEEN[n % len(UNSEEN)]) for n in range(count)
    ]  # all differ, up to 656
    workloads = {"chat": [turns(text) for text in asked], "edit": edits(count)}
    cases: dict[str, tuple[Engine, LoadedModel]] = {}

    def add(name: str, method: str, count: int | None, path: Path | None) -> None:
        loaded = target(args.model)
        head = None if path is None else load_head(ModelFiles.from_directory(path))
        config = EngineConfig(
            device=device(), max_num_seqs=8, max_model_len=2048, self_test=False,
            speculative_method=method, num_speculative_tokens=count,  # type: ignore[arg-type]
            speculative_disable_by_batch_size=8, draft_model=path, backend="mlx",
            enable_prefix_caching=False, kv_cache_bytes=1 << 29,
        )  # fmt: skip
        cases[name] = Engine(loaded, config, draft=head), loaded

    add("none", "none", None, None)
    add("ngram", "ngram", None, None)
    for count in args.num_tokens:
        add(f"eagle3, {count}", "eagle3", count, args.head)
    print(
        "| workload | streams | proposed by | tokens/s | speed-up | accepted | same text "
        "| ms a step to build, launch, wait |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for streams in args.streams:
        for workload in args.workloads:
            prompts = workloads[workload]
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
            for engine, loaded in cases.values():
                timed(engine, loaded, prompts[-streams:], args.tokens)  # shapes
            for at in range(0, args.rounds * streams, streams):
                for name, (engine, loaded) in cases.items():
                    found[name].append(
                        timed(engine, loaded, prompts[at : at + streams], args.tokens)
                    )
            for name, rounds in found.items():
                pairs = list(zip(rounds, found["none"], strict=True))
                gains = [one["rate"] / other["rate"] for one, other in pairs]
                parts = ", ".join(
                    f"{statistics.median(times):.2f}"
                    for times in zip(*(one["times"] for one in rounds), strict=True)
                )
                same = sum(one["text"] == other["text"] for one, other in pairs)
                print(
                    f"| {workload} | {streams} | {name} | "
                    f"{statistics.median(one['rate'] for one in rounds):.0f} | "
                    f"{statistics.median(gains):.2f} ({min(gains):.2f} … {max(gains):.2f}) | "
                    f"{statistics.mean(one['accepted'] for one in rounds):.2f} | "
                    f"{same} of {len(rounds)} | {parts} |",
                    flush=True,
                )
    for engine, _ in cases.values():
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.add_argument("head", type=Path)
    one.add_argument("--start", type=Path, help="a head to train further")
    one.add_argument("--seconds", type=float, default=300)
    one.add_argument(
        "--generation", type=float, default=90, help="seconds of --seconds that generate text"
    )
    one.add_argument("--steps", type=int, default=100_000)
    one.add_argument("--prompts", type=int, default=20_000)
    one.add_argument("--tokens", type=int, default=240)
    one.add_argument("--length", type=int, default=288)
    one.add_argument("--batch", type=int, default=32)
    one.add_argument("--rate", type=float, default=5e-4)
    one.add_argument("--decay", type=float, default=0.01)
    one.add_argument("--held", type=int, default=128, help="rows that are not trained on")
    one.add_argument("--unrolled", type=int, default=4)
    one.add_argument("--vocabulary", type=int, default=8192)
    one.add_argument("--width", type=int, default=0, help="units of the MLP; as the model's")
    one.set_defaults(call=train)
    two = commands.add_parser("measure")
    two.add_argument("head", type=Path)
    two.add_argument("--tokens", type=int, default=160)
    two.add_argument("--rounds", type=int, default=5)
    two.add_argument("--streams", type=int, nargs="+", default=[1])
    two.add_argument("--workloads", nargs="+", default=["chat", "edit"])
    two.add_argument("--num-tokens", type=int, nargs="+", default=[3, 4])
    two.set_defaults(call=measure)
    for command in (one, two):
        command.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    args = parser.parse_args()
    print_machine()
    args.call(args)


if __name__ == "__main__":
    main()
