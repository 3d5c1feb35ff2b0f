"""Detection of the format of chat templates."""

from __future__ import annotations

import pytest

from modelpack.errors import UsageError
from modelpack_server.tool_parsers.families import (
    FAMILIES,
    OutputFormat,
    find_format,
    starts_reasoning,
)
from modelpack_server.tool_parsers.parts import (
    GEMMA,
    HARMONY,
    KIMI_K3,
    LONGCAT,
    MISTRAL,
    SEED,
    THINK,
    ReasoningMarkers,
)

# Pieces of templates that render earlier calls, like the real templates.
TEMPLATES: list[tuple[str, str, ReasoningMarkers | None]] = [
    (
        "hermes",
        '{%- for call in message.tool_calls %}{{- \'<tool_call>\\n{"name": "\' + call.name }}'
        '{{- \'", "arguments": \' }}{{- call.arguments | tojson }}{{- "}\\n</tool_call>" }}',
        None,
    ),
    (
        "hermes",
        "{%- if add_generation_prompt %}<|im_start|>assistant\\n<think>\\n{% endif %}"
        "<tool_call>{{ call.arguments }}</tool_call>",
        THINK,
    ),
    (
        "qwen3_coder",
        "{{- '<tool_call>\\n<function=' + f + '>\\n' }}{{- '<parameter=' + n + '>\\n' }}",
        None,
    ),
    (
        "qwen3_coder",
        "<think>{{ reasoning }}</think><tool_call>\n<function=f>\n<parameter=p>",
        THINK,
    ),
    (
        "llama3",
        'Respond in the format {"name": function name, "parameters": dictionary of argument name '
        "and its value}.{{- '<|python_tag|>' + call.name }}",
        None,
    ),
    ("llama4", "{{- '<|python_start|>' }}[func_name1(a=1)]{{- '<|python_end|>' }}", None),
    (
        "mistral",
        '{{- "[TOOL_CALLS] [" }}{{- tool_call.function|tojson }}{{- "]" + eos_token }}'
        '{{- "[/TOOL_RESULTS]" }}',
        None,
    ),
    ("mistral_v11", "{{- '[TOOL_CALLS]' + call.function.name + args }}", None),
    (
        "mistral_v13",
        "{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}{{ '[THINK]' + t + '[/THINK]' }}",
        MISTRAL,
    ),
    (
        "harmony",
        "{{- '<|start|>assistant<|channel|>commentary to=functions.' + name }}"
        "{{- '<|message|>' + arguments|tojson + '<|call|>' }}",
        HARMONY,
    ),
    (
        "glm",
        "<think></think>{{ '<tool_call>' + tc.name }}{% for k, v in _args.items() %}"
        "<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>",
        THINK,
    ),
    (
        "gemma4",
        "{{- '<|tool_call>call:' + name + '{' -}}{{- '}<tool_call|>' -}}<|channel>thought\\n",
        GEMMA,
    ),
    ("function_gemma", "{{- '<start_function_call>call:' + name + '{' -}}", None),
    ("gemma_code", "Put calls into ```tool_code blocks.", None),
    (
        "deepseek_v3",
        "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + "
        "tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] "
        "{{'<｜Assistant｜><think>\\n'}}",
        THINK,
    ),
    (
        "deepseek_v31",
        "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>'"
        "{{'</think>'}}",
        THINK,
    ),
    ("deepseek_v32", "<｜DSML｜function_calls>", THINK),
    (
        "kimi_k2",
        "<|im_middle|><|tool_calls_section_begin|><|tool_call_begin|>{{ id }}<think></think>",
        THINK,
    ),
    ("kimi_k2", "<|im_assistant|>assistant<|im_middle|>", None),
    ("kimi_k3", "<|open|>message role=assistant<|sep|>", KIMI_K3),
    ("nemotron", "{{- '<TOOLCALL>[' -}}{{- '<think>\\n\\n' -}}", THINK),
    ("minimax_m2", "<minimax:tool_call>\n<invoke name='x'>{{ '<think>\\n' }}", THINK),
    ("granite", "{{- '<|tool_call|>' }}{{- '<|start_of_role|>' }}", None),
    ("lfm2", '{{- "<|tool_call_start|>[" + calls | join(", ") + "]<|tool_call_end|>" -}}', None),
    ("xlam", 'Answer with [{"name": "func_name1", "arguments": {"argument1": "value1"}}]', None),
    ("functionary", "<|from|>assistant\n<|recipient|>{{ name }}\n<|content|>", None),
    ("longcat", "<longcat_tool_call>{{ name }}<longcat_think>", LONGCAT),
    ("minicpm5", '<function name="f"><param name="p">v</param></function>', None),
]


@pytest.mark.parametrize(("family", "template", "markers"), TEMPLATES)
def test_a_template_shows_its_format(
    family: str, template: str, markers: ReasoningMarkers | None
) -> None:
    assert find_format(template) == OutputFormat(family, markers)


def test_every_family_is_found() -> None:
    assert {family for family, _, _ in TEMPLATES} == set(FAMILIES)


def test_a_plain_template_has_no_format() -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    for template in (plain, "", None):
        assert find_format(template) == OutputFormat()
        assert not find_format(template).keeps_special_tokens
    assert find_format("<think>") == OutputFormat(None, THINK)
    assert find_format("<seed:think>") == OutputFormat(None, SEED)


def test_the_type_of_a_model_decides_without_a_template() -> None:
    assert find_format(None, model_type="gpt_oss") == OutputFormat("harmony", HARMONY)
    assert find_format(None, model_type="deepseek_v32") == OutputFormat("deepseek_v32", THINK)
    assert find_format("{{ messages }}", model_type="gemma3").family == "gemma_code"
    assert find_format("<TOOLCALL>", model_type="gpt_oss").family == "nemotron"


def test_an_operator_names_a_format() -> None:
    assert OutputFormat.named("hermes") == OutputFormat("hermes", THINK)
    assert OutputFormat.named("hermes", reasoning=None).reasoning is None
    assert OutputFormat.named("harmony", reasoning=None).reasoning == HARMONY
    with pytest.raises(UsageError, match="'chatml'") as caught:
        OutputFormat.named("chatml")
    assert caught.value.hint is not None
    assert all(family in caught.value.hint for family in FAMILIES)


def test_special_tokens_are_kept_where_they_are_markers() -> None:
    kept = {family for family in FAMILIES if OutputFormat(family).keeps_special_tokens}
    assert set(FAMILIES) - kept == {"qwen3_coder", "gemma_code", "nemotron", "minimax_m2", "xlam"}
    assert OutputFormat(None, MISTRAL).keeps_special_tokens
    assert not OutputFormat(None, THINK).keeps_special_tokens


@pytest.mark.parametrize(
    ("family", "tail", "starts"),
    [
        ("hermes", "<|im_start|>assistant\n<think>\n", True),
        ("hermes", "<|im_start|>assistant\n<think>", True),
        ("hermes", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("hermes", "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("hermes", "<|im_start|>assistant\n", False),
        ("deepseek_v31", "<｜Assistant｜></think>", False),
        ("deepseek_v31", "<｜Assistant｜><think>", True),
        ("gemma4", "<|turn>model\n<|channel>thought\n<channel|>", False),
        ("gemma4", "<|turn>model\n<|channel>thought\n", True),
        ("harmony", "<|start|>assistant", False),
        ("harmony", "<|start|>assistant<|channel|>analysis<|message|>", True),
        ("mistral_v13", "[/INST][THINK]", True),
        ("kimi_k3", '<|open|>message role="assistant"<|sep|><|open|>think<|sep|>', True),
        ("kimi_k3", '<|open|>message role="assistant"<|sep|><|open|>response<|sep|>', False),
    ],
)
def test_the_prompt_may_begin_the_reasoning(family: str, tail: str, starts: bool) -> None:
    assert starts_reasoning(OutputFormat.named(family), tail) is starts
    assert not starts_reasoning(OutputFormat(family, None), tail)
