"""What models write, family by family, and what is in it."""

from __future__ import annotations

from typing import NamedTuple

from tests.engine.output.reading import Found, call, text, thought

PARIS = '{"city": "Paris", "days": 3}'
paris = call("get_weather", city="Paris", days=3)
DEEP = '{"where": {"a": {"b": [1, {"c": "}"}]}}, "city": "<tool_call>{\\"name\\"} </tool_call> [TOOL_CALLS]"}'
deep = call(
    "get_weather",
    where={"a": {"b": [1, {"c": "}"}]}},
    city='<tool_call>{"name"} </tool_call> [TOOL_CALLS]',
)
now = call("now")
UNKNOWN = '{"name": "rm_rf", "arguments": {"path": "/"}}'


class Case(NamedTuple):
    family: str
    name: str
    written: str
    found: Found


def _named(arguments: str, name: str = "get_weather", key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def _hermes(*bodies: str) -> str:
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def _coder(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def _glm(name: str, **parameters: str) -> str:
    inner = "".join(
        f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in parameters.items()
    )
    return f"<tool_call>{name}\n{inner}</tool_call>"


def _invoke(name: str, **parameters: str) -> str:
    inner = "".join(f'<parameter name="{k}">{v}</parameter>\n' for k, v in parameters.items())
    return f'<invoke name="{name}">\n{inner}</invoke>\n'


def _dsml(name: str, **parameters: tuple[str, str]) -> str:
    inner = "".join(
        f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>\n'
        for k, (s, v) in parameters.items()
    )
    return f'<｜DSML｜invoke name="{name}">\n{inner}</｜DSML｜invoke>\n'


def _v3(name: str, arguments: str) -> str:
    return (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜>"
    )


def _v31(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def _calls(*calls: str) -> str:
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


def _kimi(*calls: tuple[str, str]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{n}:{i}<|tool_call_argument_begin|>{a}<|tool_call_end|>"
        for i, (n, a) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def _to(name: str, arguments: str) -> str:
    return (
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
    )


THINK = "<|channel|>analysis<|message|>Hm, \n so.<|end|><|start|>assistant"
Q = '<|"|>'
SMILE = '{"city": "S\\u00e3o \\ud83d\\ude00 Paulo 😀 \\"x\\" \\\\ \\n"}'
smile = call("get_weather", city='São 😀 Paulo 😀 "x" \\ \n')

_TWO = [text("Let me see."), paris, now]
CASES = [
    # Hermes, Qwen 2.5 and 3
    Case("hermes", "two", "Let me see.\n" + _hermes(_named(PARIS), _named("{}", "now")), _TWO),
    Case("hermes", "deep", _hermes(_named(DEEP)), [deep]),
    Case("hermes", "unicode", _hermes(_named(SMILE)), [smile]),
    Case("hermes", "arguments first", _hermes('{"arguments": {"city": "x"}, "name": "get_weather"}'),
         [call("get_weather", city="x")]),
    Case("hermes", "arguments in a string",
         _hermes('{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}'),
         [call("get_weather", city="x")]),
    Case("hermes", "no arguments", _hermes('{"name": "now"}'), [now]),
    Case("hermes", "no closing tag", "<tool_call>" + _named(PARIS), [paris]),
    Case("hermes", "closing brace missing", f"<tool_call>{_named(PARIS)[:-1]}</tool_call> ok",
         [paris, text("ok")]),
    Case("hermes", "two in a block", _hermes(_named(PARIS) + "\n" + _named("{}", "now")), _TWO[1:]),
    Case("hermes", "bare", _named(PARIS), [paris]),
    Case("hermes", "bare but unknown", UNKNOWN, [text(UNKNOWN)]),
    Case("hermes", "bare but not alone", "See " + _named(PARIS), [text("See " + _named(PARIS))]),
    Case("hermes", "unknown", _hermes(UNKNOWN), [text(_hermes(UNKNOWN))]),
    Case("hermes", "unknown, then known", _hermes(UNKNOWN) + "\n" + _hermes(_named(PARIS)),
         [text(_hermes(UNKNOWN)), paris]),
    Case("hermes", "between texts", "a\n" + _hermes(_named(PARIS)) + "\nb", [text("a"), paris, text("\n\nb")]),
    Case("hermes", "tag in prose", "The <tool_call> tag. " + _hermes(_named(PARIS)),
         [text("The <tool_call> tag."), paris]),
    Case("hermes", "never closed", '<tool_call>{"name": "get_weather', [text('<tool_call>{"name": "get_weather')]),
    Case("hermes", "cut in a string", '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
         [call("get_weather", city="Par")]),
    Case("hermes", "cut after a key", '<tool_call>{"name": "get_weather", "arguments": {"city": "P", "days":',
         [call("get_weather", city="P")]),
    Case("hermes", "cut in a number", '<tool_call>{"name": "get_weather", "arguments": {"days": 1',
         [call("get_weather")]),
    Case("hermes", "cut in an escape", '<tool_call>{"name": "get_weather", "arguments": {"city": "P\\u00e',
         [call("get_weather", city="P")]),
    Case("hermes", "broken, then whole",
         '<tool_call>{"name": "get_weather", "arguments": {"city": oops}}</tool_call>'
         + _hermes(_named(PARIS)), [call("get_weather"), paris]),
    Case("hermes", "raw line break in a string",
         '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb\\d", "tags": [1,],}}</tool_call>',
         [call("get_weather", city="a\nb\\d", tags=[1])]),
    Case("hermes", "reasoning", "<think>\nHm.\n</think>\n\n" + _hermes(_named(PARIS)), [thought("Hm."), paris]),
    Case("hermes", "call in reasoning", "<think>" + _hermes(_named(PARIS)) + "</think>x",
         [thought(_hermes(_named(PARIS))), text("x")]),
    Case("hermes", "end token", "Hi<|im_end|>\n", [text("Hi\n")]),
    # Qwen3-Coder
    Case("qwen3_coder", "two", "Let me see.\n" + _coder("get_weather", city="Paris", days="3") + "\n"
         + _coder("now"), _TWO),
    Case("qwen3_coder", "types", _coder("get_weather", city="42", metric="True", where='{"a": [1]}',
         tags="[1, 'x']", note="null", days="soon"),
         [call("get_weather", city="42", metric=True, where={"a": [1]}, tags=[1, "x"], note=None, days="soon")]),
    Case("qwen3_coder", "text as it is", _coder("get_weather", city="\n  a < b\n</tool_call> "),
         [call("get_weather", city="\n  a < b\n</tool_call> ")]),
    Case("qwen3_coder", "undeclared", _coder("get_weather", x="5", y="[1]", z="word", w="\"q\""),
         [call("get_weather", x=5, y=[1], z="word", w='"q"')]),
    Case("qwen3_coder", "no outer tag", "<function=get_weather>\n<parameter=city>\nx\n</parameter>\n</function>",
         [call("get_weather", city="x")]),
    Case("qwen3_coder", "JSON inside", "<tool_call><function=get_weather>" + PARIS + "</function></tool_call>", [paris]),
    Case("qwen3_coder", "unknown", _coder("rm", path="/"), [text(_coder("rm", path="/"))]),
    Case("qwen3_coder", "cut in the first value", "<tool_call><function=get_weather><parameter=city>Par",
         [text("<tool_call><function=get_weather><parameter=city>Par")]),
    Case("qwen3_coder", "cut in the second value",
         "<tool_call><function=get_weather><parameter=city>P</parameter><parameter=days>1",
         [call("get_weather", city="P")]),
    # Llama
    Case("llama3", "tag", "<|python_tag|>" + _named(PARIS, key="parameters") + "<|eom_id|>", [paris]),
    Case("llama3", "bare", '{"type": "function", "name": "get_weather", "parameters": ' + PARIS + "}<|eot_id|>", [paris]),
    Case("llama3", "two", _named(PARIS, key="parameters") + "; " + _named("{}", "now", "parameters"), _TWO[1:]),
    Case("llama3", "old tag", "<function=get_weather>" + PARIS + "</function>", [paris]),
    Case("llama3", "code", "<|python_tag|>print(1)", [text("<|python_tag|>print(1)")]),
    Case("llama3", "other JSON", '{"answer": 42}', [text('{"answer": 42}')]),
    Case("llama3", "list", "[1, 2]", [text("[1, 2]")]),
    Case("llama3", "not at the start", "So: " + _named(PARIS, key="parameters"),
         [text("So: " + _named(PARIS, key="parameters"))]),
    Case("llama4", "pythonic", '[get_weather(city="Pa)]ris", days=3), now()]<|eot|>',
         [call("get_weather", city="Pa)]ris", days=3), now]),
    Case("llama4", "between tokens", '<|python_start|>[get_weather(city="Paris", days=3)]<|python_end|>', [paris]),
    Case("llama4", "evaluates nothing", "[get_weather(city=__import__('os').getcwd())]",
         [text("[get_weather(city=__import__('os').getcwd())]")]),
    Case("llama4", "never closed", '[get_weather(city="Par', [text('[get_weather(city="Par')]),
    # Mistral
    Case("mistral", "list", "[TOOL_CALLS] [" + _named(PARIS) + ", " + _named("{}", "now") + "]</s>", _TWO[1:]),
    Case("mistral", "deep", "[TOOL_CALLS][" + _named(DEEP) + "]", [deep]),
    Case("mistral_v11", "names", "Let me see.[TOOL_CALLS]get_weather" + PARIS + "[TOOL_CALLS]now{}", _TWO),
    Case("mistral_v11", "dotted", "[TOOL_CALLS]time.now-utc{}", [call("time.now-utc")]),
    Case("mistral_v11", "deep", "[TOOL_CALLS]get_weather" + DEEP, [deep]),
    Case("mistral_v13", "two", "[TOOL_CALLS]get_weather[ARGS]" + PARIS + "[TOOL_CALLS]now[ARGS]{}</s>", _TWO[1:]),
    Case("mistral_v13", "id", "[TOOL_CALLS]get_weather[CALL_ID]abcdEFG12[ARGS]" + PARIS, [paris]),
    Case("mistral_v13", "reasoning", "[THINK]Hm.[/THINK]Yes </s> and</s>", [thought("Hm."), text("Yes </s> and")]),
    Case("mistral_v13", "unknown", "[TOOL_CALLS]rm[ARGS]{}", [text("[TOOL_CALLS]rm[ARGS]{}")]),
    # Harmony
    Case("harmony", "call", THINK + _to("get_weather", PARIS), [thought("Hm, \n so."), paris]),
    Case("harmony", "final", THINK + "<|channel|>final<|message|>Hi <b>.<|return|>", [thought("Hm, \n so."), text("Hi <b>.")]),
    Case("harmony", "constrained", "<|channel|>final <|constrain|>JSON<|message|>{}<|return|>", [text("{}")]),
    Case("harmony", "preamble", "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant"
         + _to("get_weather", PARIS) + "<|start|>assistant" + _to("now", "{}"), _TWO),
    Case("harmony", "in the role", " to=functions.time.now-utc<|channel|>commentary json<|message|>{}<|call|>",
         [call("time.now-utc")]),
    Case("harmony", "in the role, again", THINK + " to=functions.now<|channel|>analysis<|message|>{}<|call|>",
         [thought("Hm, \n so."), now]),
    Case("harmony", "marker in a string", _to("get_weather", '{"city": "<|call|>{"}'), [call("get_weather", city="<|call|>{")]),
    Case("harmony", "unknown", _to("rm", '{"path": "/"}'), [text('{"path": "/"}')]),
    Case("harmony", "no structure", "Hello. to=x", [text("Hello. to=x")]),
    Case("harmony", "cut in a header", THINK + "<|channel|>comm", [thought("Hm, \n so.")]),
    Case("harmony", "cut in arguments", _to("get_weather", '{"city": "P')[:-8], [call("get_weather", city="P")]),
    Case("harmony", "empty body", _to("now", ""), [now]),
    Case("harmony", "two thoughts", "<|channel|>analysis<|message|>a<|end|>" + THINK, [thought("a\n\nHm, \n so.")]),
    # GLM
    Case("glm", "two", "Let me see.\n" + _glm("get_weather", city="Paris", days="3") + _glm("now"), _TWO),
    Case("glm", "4.7", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>12</arg_value></tool_call>",
         [call("get_weather", city="12")]),
    Case("glm", "no arguments", "<tool_call>now</tool_call>", [now]),
    Case("glm", "JSON", _hermes(_named(PARIS)), [paris]),
    Case("glm", "values", _glm("get_weather", where='{"a": "x"}', note="null", tags="['x']", x="1.5"),
         [call("get_weather", where={"a": "x"}, note=None, tags=["x"], x=1.5)]),
    Case("glm", "unknown", _glm("rm", path="/"), [text(_glm("rm", path="/"))]),
    Case("glm", "box", "<think>a</think>\n<|begin_of_box|>42<|end_of_box|><|user|>", [thought("a"), text("42")]),
    # Gemma
    Case("gemma4", "two", f"Let me see.<|tool_call>call:get_weather{{city:{Q}Paris{Q},days:3}}<tool_call|>"
         "<|tool_call>call:now{}<tool_call|>", _TWO),
    Case("gemma4", "two in a block", f"<|tool_call>call:get_weather{{city:{Q}Paris{Q},days:3}}call:now{{}}<tool_call|>", _TWO[1:]),
    Case("gemma4", "nested", f'<|tool_call>call:get_weather{{where:{{a:[1,{{b-c:{Q}}},"{Q}}}],d:true}},city:{Q}7{Q}}}<tool_call|>',
         [call("get_weather", where={"a": [1, {"b-c": '},"'}], "d": True}, city="7")]),
    Case("gemma4", "bare text", "<|tool_call>call:get_weather{city:New York,days:2}<tool_call|>",
         [call("get_weather", city="New York", days=2)]),
    Case("gemma4", "text", 'call:get_weather(city="Pa)ris", days=3)', [call("get_weather", city="Pa)ris", days=3)]),
    Case("gemma4", "prose", "I will call: get_weather", [text("I will call: get_weather")]),
    Case("gemma4", "reasoning", "<|channel>thought\nHm.<channel|>Hi<turn|>", [thought("Hm."), text("Hi")]),
    Case("gemma4", "reasoning twice", "<|channel>thought\na<channel|><|channel>thought\nb<channel|>Hi",
         [thought("ab"), text("Hi")]),
    Case("gemma4", "response", "<|channel>response\nHi<channel|>", [text("Hi")]),
    Case("gemma4", "unknown", f"<|tool_call>call:rm{{p:{Q}/{Q}}}<tool_call|>", [text(f"<|tool_call>call:rm{{p:{Q}/{Q}}}<tool_call|>")]),
    Case("gemma4", "cut", f"<|tool_call>call:get_weather{{city:{Q}P{Q},days:", [call("get_weather", city="P")]),
    Case("function_gemma", "two", "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
         "<start_function_call>call:now{}<end_function_call>", _TWO[1:]),
    Case("function_gemma", "braces", "<start_function_call>call:get_weather{where:{a:<escape>}<escape>},days:1}<end_function_call>",
         [call("get_weather", where={"a": "}"}, days=1)]),
    Case("gemma_code", "fence", 'Let me see.\n```tool_code\nget_weather(city="Paris", days=3)\nprint(now())\n```', _TWO),
    Case("gemma_code", "lines", '```tool_code\nprint(default_api.get_weather(\n  city="Paris",\n  days=3,\n))\n```', [paris]),
    Case("gemma_code", "other code", "```tool_code\nimport os\n```", [text("```tool_code\nimport os\n```")]),
    # DeepSeek
    Case("deepseek_v3", "two", "Let me see." + _calls(_v3("get_weather", PARIS), _v3("now", "{}")) + "<｜end▁of▁sentence｜>", _TWO),
    Case("deepseek_v31", "two", _calls(_v31("get_weather", PARIS), _v31("now", "{}")), _TWO[1:]),
    Case("deepseek_v31", "deep", _calls(_v31("get_weather", DEEP)), [deep]),
    Case("deepseek_v31", "unknown", _calls(_v31("rm", "{}")), [text(_calls(_v31("rm", "{}")))]),
    Case("deepseek_v31", "not closed", _calls(_v31("get_weather", PARIS))[:-20], [paris]),
    Case("deepseek_v32", "two", "Let me see.\n\n<｜DSML｜function_calls>\n"
         + _dsml("get_weather", city=("true", "Paris"), days=("false", "3")) + _dsml("now")
         + "</｜DSML｜function_calls>", _TWO),
    Case("deepseek_v32", "typed", "<｜DSML｜function_calls>" + _dsml("get_weather", city=("true", "3"), where=("false", '{"a": 1}'),
         days=("false", '"x"')) + "</｜DSML｜function_calls>", [call("get_weather", city="3", where={"a": 1}, days="x")]),
    # Kimi
    Case("kimi_k2", "two", "Let me see." + _kimi(("get_weather", PARIS), ("now", "{}")), _TWO),
    Case("kimi_k2", "in reasoning", "<think>a" + _kimi(("now", "{}")) + "b</think>c",
         [thought("a"), now, thought("b"), text("c")]),
    Case("kimi_k2", "unknown", _kimi(("rm", "{}")), [text(_kimi(("rm", "{}")))]),
    Case("kimi_k2", "cut", _kimi(("get_weather", '{"city": "P')).split("P")[0] + "P", [call("get_weather", city="P")]),
    # MiniMax
    Case("minimax_m2", "two", "Let me see.\n<minimax:tool_call>\n" + _invoke("get_weather", city="Paris", days="3")
         + _invoke("now") + "</minimax:tool_call>", _TWO),
    Case("minimax_m2", "in reasoning", "<think>\na\n<minimax:tool_call>" + _invoke("now") + "</minimax:tool_call>\n</think>\nb",
         [thought("a"), now, text("b")]),
    Case("minimax_m2", "one unknown", "<minimax:tool_call>" + _invoke("now") + _invoke("rm") + "</minimax:tool_call>",
         [now, text(_invoke("rm") + "</minimax:tool_call>")]),
    # The others
    Case("nemotron", "two", "<TOOLCALL>[" + _named(PARIS) + ", " + _named("{}", "now") + "]</TOOLCALL>", _TWO[1:]),
    Case("nemotron", "prose", "<TOOLCALL> is a tag", [text("<TOOLCALL> is a tag")]),
    Case("granite", "list", "<|tool_call|>[" + _named(PARIS) + "," + _named("{}", "now") + "]<|end_of_text|>", _TWO[1:]),
    Case("granite", "tag", "Let me see. <tool_call>[" + _named(PARIS) + "]</tool_call><tool_call>" + _named("{}", "now") + "</tool_call>", _TWO),
    Case("lfm2", "two", '<|tool_call_start|>[get_weather(city="Paris", days=3), now()]<|tool_call_end|>Let me see.<|im_end|>',
         [paris, now, text("Let me see.")]),
    Case("lfm2", "values", "<|tool_call_start|>[get_weather(city='\\d', tags=(1, 2.5), where={'a': null, 'b': True})]<|tool_call_end|>",
         [call("get_weather", city="\\d", tags=[1, 2.5], where={"a": None, "b": True})]),
    Case("lfm2", "JSON", "<|tool_call_start|>[" + _named(PARIS) + "]<|tool_call_end|>", [paris]),
    Case("lfm2", "a name as a value", "<|tool_call_start|>[now(x=y)]<|tool_call_end|>",
         [text("<|tool_call_start|>[now(x=y)]<|tool_call_end|>")]),
    Case("xlam", "two", "[" + _named(PARIS) + ", " + _named("{}", "now") + "]", _TWO[1:]),
    Case("xlam", "fence", "```json\n[" + _named(PARIS) + "]\n```", [paris]),
    Case("xlam", "other list", '[{"name": "rm_rf"}]', [text('[{"name": "rm_rf"}]')]),
    Case("functionary", "call", "get_weather\n<|content|>" + PARIS + "<|stop|>", [paris]),
    Case("functionary", "text and call", "all\n<|content|> Let me see.\n<|from|>assistant\n<|recipient|>get_weather\n<|content|>"
         + PARIS + "\n<|from|>assistant\n<|recipient|>now\n<|content|>{}<|stop|>", _TWO),
    Case("functionary", "no structure", "Hello there", [text("Hello there")]),
    # mlx-lm's own parsers
    Case("longcat", "call", "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
         "<longcat_arg_value>12</longcat_arg_value>\n</longcat_tool_call>", [call("get_weather", city="12")]),
    Case("longcat", "nonsense", "<longcat_tool_call>x</longcat_tool_call>", [text("<longcat_tool_call>x</longcat_tool_call>")]),
    Case("minicpm5", "call", '<function name="get_weather"><param name="city">x</param></function>', [call("get_weather", city="x")]),
    Case("muse_spark", "call", '<atem:function_calls><atem:invoke name="get_weather"><atem:parameter name="days">3</atem:parameter>'
         "</atem:invoke></atem:function_calls>", [call("get_weather", days=3)]),
    Case("kimi_k3", "unknown", '<|open|>tools<|sep|><|open|>call tool="rm"<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
         [text('<|open|>tools<|sep|><|open|>call tool="rm"<|sep|><|close|>call<|sep|><|close|>tools<|sep|>')]),
    Case("kimi_k3", "call", '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" '
         'type="string"<|sep|>x<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>', [call("get_weather", city="x")]),
]  # fmt: skip
