"""Write loaders/config_fields.json from the fixtures.

    python -m tests.engine.oracle.make_fields [another-fixture.json.gz...]

For each model type, the file has the fields of transformers' config class that mlx-lm's class does
not follow: a change of such a field alters transformers' logits, and ours are not the same. `only`
has the values for which they agree, `never` numbers for which they do not, `ropes` types of
rotations by the type of layer, `window` is there if only mlx-lm's class has no sliding window.
Where the model itself does not agree yet, names and switches that are not read keep their value.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modelpack_engine.models import config_guard
from modelpack_engine.models.model_config import without_tags
from modelpack_engine.patches.corrections import TEXT_PARTS
from tests.engine.oracle.answers import FIXTURES, Case, answer, cases_of, cosine, fixture

PATH = Path(config_guard.__file__).with_name("config_fields.json")
#: Fields of every config of transformers that no forward pass of a decoder reads.
ALWAYS_INERT = """
    architectures transformers_version _name_or_path auto_map id2label label2id problem_type
    return_dict output_hidden_states output_attentions torchscript pruned_heads use_bfloat16
    chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size
    add_cross_attention tie_encoder_decoder finetuning_task task_specific_params tokenizer_class
    prefix bos_token_id pad_token_id eos_token_id sep_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id unk_token_id mask_token_id begin_suppress_tokens
    suppress_tokens max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate exponential_decay_length_penalty remove_invalid_values
    tf_legacy_loss use_cache cache_implementation attn_implementation _attn_implementation
    initializer_range initializer_factor init_std init_device init_config attention_dropout
    attn_dropout attn_pdrop embd_pdrop resid_pdrop emb_pdrop hidden_dropout classifier_dropout
    attention_probs_dropout_prob hidden_dropout_prob summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout num_labels
    router_aux_loss_coef router_jitter_noise output_router_logits aux_loss_alpha seq_aux
    load_balance_coeff router_z_loss_coef pretraining_tp ep_size unsloth_fixed unsloth_version
    vision_config audio_config vision_feature_layer vision_feature_select_strategy
    image_token_id image_token_index video_token_id audio_token_id vision_start_token_id
    vision_end_token_id vision_token_id boi_token_id eoi_token_id boi_token_index eoi_token_index
    image_seq_length mm_tokens_per_image projector_hidden_act multimodal_projector_bias
    spatial_merge_size num_nextn_predict_layers mtp_num_hidden_layers
    max_position_embeddings model_max_length seq_length n_positions n_ctx max_sequence_length
    max_seq_len tokenizer_version mlx_version is_llama_config use_return_dict gradient_checkpointing
    use_flash_attn use_flash_attention flash_attn use_cache_quantization use_cache_kernel
    softmax_in_fp32 fp16 bf16 fp32 use_dynamic_ntk use_logn_attn neftune_noise_alpha name vocab
    rope_theta rope_scaling partial_rotary_factor rotary_emb_base rotary_pct rope_local_base_freq
    local_rope_theta swa_rope_theta rope_base rope_pct time_step_init_scheme use_mambapy
    use_falcon_mambapy use_mamba_kernels mamba_ssm_cache_dtype use_associative_scan
    embedding_dropout residual_dropout ffn_dropout reorder_and_upcast_attn
    attention_softmax_in_fp32 scale_attention_softmax_in_fp32 time_step_floor time_step_max
    residual_in_fp32 rescale_prenorm_residual
""".split()  # noqa: SIM905 - as in `sizes.py`

WINDOWS = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")
ROPES = ("rope_parameters", "rope_scaling")


def main() -> None:
    config_guard._types = dict  # type: ignore[assignment]
    fields = Fields()
    versions = []
    for path in [*FIXTURES.values(), *map(Path, sys.argv[1:])]:
        content = fixture(path)
        versions.append(content["transformers"])
        for kind, model in content["models"].items():
            fields.add(kind, model)
    data = {"transformers": sorted(set(versions)), "types": without_tags(fields.types())}
    PATH.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


class Fields:
    """What the cases say of each field, by model type."""

    def __init__(self) -> None:
        self.allowed: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        self.wrong: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        self.unsure: dict[str, set[str]] = defaultdict(set)
        self.known: dict[str, dict[str, Any]] = defaultdict(dict)
        self.read: dict[str, frozenset[str]] = {}
        self.good_ropes: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.bad_ropes: dict[str, set[tuple[str, str]]] = defaultdict(set)

    def add(self, kind: str, model: dict[str, Any]) -> None:
        base, *cases = cases_of(kind, model)
        trusted = judge(base) is True
        read = read_by(kind)
        for place, config in parts(base.config):
            name = config_guard.rules_key(base.config, place)
            prefix = f"{place}." if place else ""
            self.read[name] = read
            measured = {field.removeprefix(prefix) for field in model["inert"]}
            for field, value in config.items():
                self.known[name].setdefault(field, value)
                if value is not None:
                    self.allowed[name][field].append(value)
            for case in cases:
                if case.field.rpartition(".")[0] == place:
                    field = case.field.rpartition(".")[2]
                    measured.add(field)
                    self._add_case(name, field, config, case, place, trusted)
            self.unsure[name] |= {
                field
                for field, value in config.items()
                if field not in measured | read and isinstance(value, bool | str)
            }

    def _add_case(
        self, name: str, field: str, base: dict[str, Any], case: Case, place: str, trusted: bool
    ) -> None:
        part = case.config[place] if place else case.config
        value = part.get(field)
        if trusted:
            good = judge(case)
        elif field in self.read[name] or field in ROPES:
            return
        elif isinstance(base.get(field), bool | str | None) and not case.tensors_changed:
            good = False
        else:
            return
        if good is None:
            return  # it is refused because of its tensors
        if field in ROPES:
            for key in changed_ropes(base.get(field), value):
                (self.good_ropes if good else self.bad_ropes)[name].add(key)
        elif value is not None:
            (self.allowed if good else self.wrong)[name][field].append(value)

    def types(self) -> dict[str, Any]:
        found = {name: self._rules(name) for name in self.known}
        return {name: rules for name, rules in found.items() if rules}

    def _rules(self, name: str) -> dict[str, Any]:
        known, wrong, read = self.known[name], self.wrong[name], self.read[name]
        rules: dict[str, Any] = {}
        if self._lacks_window(name):
            rules["window"] = {
                "used": bool(known.get("use_sliding_window", True)),
                "later": "max_window_layers" in known,
            }
        only, never = {}, {}
        for field in {*wrong, *self.unsure[name]} - set(ALWAYS_INERT) - LOADER:
            if field.startswith("_") or ("window" in rules and field in WINDOWS):
                continue
            allowed = unique(self.allowed[name][field])
            numbers = [v for v in wrong[field] if isinstance(v, int) and not isinstance(v, bool)]
            if field in read and numbers and known.get(field) is not None:
                never[field] = unique(v for v in numbers if v not in allowed)
            elif not {True, False} <= {v for v in allowed if isinstance(v, bool)}:
                only[field] = allowed
            if not wrong[field]:
                print(name, field, allowed, "was not measured", file=sys.stderr)
        only |= BY_HAND.get(name, {})
        if only:
            rules["only"] = only
        if any(never.values()):
            rules["never"] = never
        ropes: dict[str, list[str]] = defaultdict(list)
        wrong_ropes = self.bad_ropes[name] - self.good_ropes[name]
        for layer, kind in sorted(wrong_ropes | ROPES_BY_HAND.get(name, set())):
            ropes[layer].append(kind)
        if ropes:
            rules["ropes"] = dict(ropes)
        return rules

    def _lacks_window(self, name: str) -> bool:
        """Whether transformers has a window of attention here, and mlx-lm's class has not."""
        known, read = self.known[name], self.read[name]
        if "sliding_window" in self.wrong[name]:
            return True
        if any("window" in field for field in read):
            return False
        kinds = known.get("layer_types") or ["full_attention"]
        # Without either, transformers reads `sliding_window` nowhere, or it would be in `wrong`.
        switched = "layer_types" in known or "use_sliding_window" in self.wrong[name]
        return (
            "sliding_window" in known
            and switched
            and "layer_types" not in read
            and set(kinds) == {"full_attention"}
        )


#: What the cases cannot say: they make one value of a text part, and count rotations by type.
BY_HAND = {
    "gemma3/gemma3_text": {"use_bidirectional_attention": [False]},
    "recurrent_gemma": {"partial_rotary_factor": [0.5]},
    # Its other value counts for images only.
    "gemma4_unified/gemma4_unified_text": {"use_bidirectional_attention": ["vision", False]},
    "llama4/llama4_text": {"num_experts_per_tok": [1]},  # mlx-lm asserts it without its name
}
#: Rotations of layers that mlx-lm's class does not compute and that the cases do not show.
ROPES_BY_HAND = {
    "glm": {("", "longrope")},
    "glm4": {("", "longrope")},
    "gpt_oss": {("", "dynamic"), ("", "longrope")},
}
#: What the loader reads, whatever the class.
LOADER = {"model_type", "architectures", "dtype", "torch_dtype", *ROPES, *TEXT_PARTS}


def parts(config: Any) -> Iterator[tuple[str, Any]]:
    yield "", config
    for part in TEXT_PARTS:
        if isinstance(config.get(part), dict):
            yield part, config[part]


def changed_ropes(base: Any, rope: Any) -> Iterator[tuple[str, str]]:
    """Return the type of layer and of rotation of what was changed, if its type makes the case."""
    if not isinstance(rope, dict):
        return
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    for key, value in (nested or {"": rope}).items():
        before = base.get(key) if nested and isinstance(base, dict) else base
        kind = str(value.get("rope_type", "default"))
        if value == before or "attention_factor" in value or "mscale" in value:
            continue
        if kind == "longrope" and value.get("original_max_position_embeddings") == 64:
            continue  # the factors of short contexts, which mlx-lm uses nowhere
        yield key, kind


def unique(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if not any(value == other and type(value) is type(other) for other in found):
            found.append(value)
    return found


def read_by(kind: str) -> frozenset[str]:
    from mlx_lm.utils import _get_classes

    for name in (kind, kind.removesuffix("_text")):
        try:
            _, arguments = _get_classes({"model_type": name})
        except (ValueError, SystemExit):
            continue
        importlib.import_module(arguments.__module__)
        return config_guard.names_read(arguments.__module__)
    return frozenset()


def judge(case: Case) -> bool | None:
    """Whether we answer as transformers does; None if the model is refused."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            got, _ = answer(case, Path(directory))
        except Exception:
            return None
    return cosine(got, case.logits) >= 0.9999


if __name__ == "__main__":
    main()
