"""`modelpack lint`: each rule, on models of stores and registries and on directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import modelpack
from fixtures.weights import STRING, U32, KeyValue, gguf
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.reference import Reference
from modelpack.cli.main import run
from modelpack.errors import FormatError
from modelpack.lint.checks import to_sarif
from modelpack.lint.policy import RULES, Level, LintPolicy, NamePattern, parse_policy
from modelpack.operations.lint import LintReport, lint
from modelpack.testing import registry
from modelpack.testing.weights import minilm_directory
from modelpack_engine.models.chat_template import ChatTemplate
from tests.models import package, tiny_safetensors

CONFIG = '{"max_position_embeddings":512,"model_type":"llama"}'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory without findings."""
    path = tiny_safetensors(tmp_path)
    (path / "config.json").write_text(CONFIG)
    return path


def linted(name: Path | str, text: str = "", store: modelpack.Store | None = None) -> LintReport:
    policy = parse_policy(text, "policy")
    return lint(str(name), policy, lambda source, given: ChatTemplate(source).render(given),
                store=store)  # fmt: skip


def test_nothing_is_found(directory: Path) -> None:
    report = linted(directory)
    assert report.findings == ()
    assert report.passed


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "policy", "rule", "says", "path", "line"),
    [
        (lambda d: (d / "LICENSE").unlink(), "", "licence", "no licence", None, None),
        (write("LICENSE", "mine"), "[licence]\nallowed=['MIT']", "licence",
         "not a recognised licence", "LICENSE", None),
        (write("LICENSE", "apache-2.0"), "[licence]\nallowed=['mit', 'ISC']", "licence",
         "is Apache-2.0, allowed: mit, ISC", "LICENSE", None),
        (write("config.json", "{}"), "", "metadata", "the config has no architecture", None, None),
        (lambda d: (d / "chat_template.jinja").unlink(), "", "template", "no chat template", None,
         None),
        (write("chat_template.jinja", "{{ a"), "", "template", "does not render: ",
         "chat_template.jinja", None),
        (write("chat_template.jinja", "{% for i in range(9**9) %}x{% endfor %}"), "", "template",
         "does not render", "chat_template.jinja", None),
        (write("chat_template.jinja", "hello"), "", "template",
         "leaves out the message of the user", "chat_template.jinja", None),
        (write("training_args.bin", b"x"), "", "pickle", "has the extension of a pickle",
         "training_args.bin", None),
        (write("state", b"\x80\x04\x95" + bytes(8) + b"}."), "", "pickle", "is a pickle",
         "state", None),
        (write("old", b"cposix\ngetcwd\np0\n(tRp1\n."), "", "pickle", "is a pickle",
         "old", None),
        (write("w.dat", b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(64)), "", "pickle",
         "is a pickle", "w.dat", None),
        (write("run.sh", "#!/bin/sh\nexport HF_TOKEN=hf_" + "aB" * 17 + "\n"), "", "secrets",
         "a token of Hugging Face", "run.sh", 2),
        (write("notes.md", "\n\n-----BEGIN OPENSSH PRIVATE KEY-----\n"), "", "secrets",
         "a private key", "notes.md", 3),
        (write("x.json", '{"url": "https://me:hunter22@host.example/"}'), "", "secrets",
         "a password in an address", "x.json", 1),
        (write("params.json", '{"_name_or_path":\n"/home/ann/llama"}'), "", "paths",
         "contains the path /home/ann/llama", "params.json", 2),
        (write("params.json", '{"p": "C:\\\\Users\\\\ann"}'), "", "paths", "contains the path C:",
         "params.json", 1),
        (lambda d: None, "[context]\nmin = 2048", "context", "is 512 tokens, expected 2048", None,
         None),
    ],
)  # fmt: skip
def test_findings(
    directory: Path,
    change: Callable[[Path], object],
    policy: str,
    rule: str,
    says: str,
    path: str | None,
    line: int | None,
) -> None:
    change(directory)
    report = linted(directory, policy)
    [finding] = report.findings
    if "context" in policy:
        assert finding.level is Level.ERROR
    assert (finding.rule, finding.path, finding.line) == (rule, path, line)
    assert says in finding.message
    assert not report.passed
    # A warning is still reported; a rule that is switched off is not.
    for level, passed, count in (("warning", True, 1), ("off", True, 0)):
        other = linted(directory, f"{policy}\n[rules]\n{rule} = '{level}'")
        assert (other.passed, len(other.findings)) == (passed, count)


QWEN = '{"architectures":["Qwen3ForCausalLM"],"max_position_embeddings":512,"model_type":"qwen3"}'
BERT = '{"architectures":["BertModel"],"max_position_embeddings":512,"model_type":"bert"}'
RANKER = """{"architectures":["XLMRobertaForSequenceClassification"],
"max_position_embeddings":512,"model_type":"unknown"}"""


@pytest.mark.parametrize(
    ("files", "needs_template"),
    [
        ({"config.json": BERT}, False),
        ({"config.json": BERT.replace("bert", "nomic_bert")}, False),
        ({"config.json": RANKER}, False),
        ({"config.json": QWEN, "modules.json": "[]"}, False),
        ({"config.json": QWEN}, True),
        ({"config.json": QWEN.replace("Qwen3ForCausalLM", "GPT2LMHeadModel")}, True),
        ({"config.json": CONFIG}, True),
    ],
)
def test_only_models_that_generate_text_need_a_template(
    directory: Path, files: dict[str, str], needs_template: bool
) -> None:
    (directory / "chat_template.jinja").unlink()
    for name, text in files.items():
        (directory / name).write_text(text)
    says = ["error: no chat template [template]"] if needs_template else []
    assert [str(finding) for finding in linted(directory).findings] == says
    store = modelpack.Store(directory.parent / "store")
    package("x/m:v1", directory, store)
    assert [str(finding) for finding in linted("x/m:v1", store=store).findings] == says


@pytest.mark.parametrize(
    ("architecture", "pooling", "needs_template"),
    [("bert", None, False), ("qwen3", 3, False), ("qwen3", 0, True), ("qwen3", None, True)],
)
def test_embedding_models_in_gguf(
    tmp_path: Path, architecture: str, pooling: int | None, needs_template: bool
) -> None:
    entries = [KeyValue("general.architecture", STRING, architecture)]
    if pooling is not None:
        entries.append(KeyValue(f"{architecture}.pooling_type", U32, pooling))
    (tmp_path / "m.gguf").write_bytes(gguf(entries, []))
    rules = "[metadata]\nrequired = []\n[rules]\nlicence = 'off'"
    rules_found = [finding.rule for finding in linted(tmp_path, rules).findings]
    assert rules_found == ["template"] * needs_template


@pytest.mark.weights
@pytest.mark.long
def test_a_real_embedding_model() -> None:
    assert linted(minilm_directory()).findings == ()


def test_a_secret_is_not_shown(directory: Path) -> None:
    secret = "ghp_" + "a1B2" * 9
    (directory / "run.sh").write_text(f"TOKEN={secret}")
    [finding] = linted(directory).findings
    assert secret not in str(finding) + json.dumps(finding.to_json())


@pytest.mark.parametrize(
    "text",
    [
        "see /home page, and/home/x",
        '{"a": "https://host.example/home/x", "b": "a/tmp/x", "c": "text/x:/nothing"}',
        '{"merges": "C:\\n"}',
        "https://host.example:8080/@user",
        "sk-short, hf_transfer, AKIA",
    ],
)
def test_what_is_no_path_and_no_secret(directory: Path, text: str) -> None:
    (directory / "more.json").write_text(text)
    assert linted(directory).findings == ()


def test_ignored_files(directory: Path) -> None:
    (directory / "docs").mkdir()
    (directory / "docs" / "a.json").write_text('"/home/ann/x"')
    assert not linted(directory).passed
    assert linted(directory, "[files]\nignore = ['docs/*']").passed


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("smol:135M-Q4_K_M-8k", None),
        ("smol:135m-q4_k_m-8192", None),
        ("smol-lm2.5:0.1B-Q4_K_M-8K", "params is 0.1B, but the config has 135 M"),
        ("smol:135M-Q8_0-8k", "quant is Q8_0, but the config has Q4_K_M"),
        ("smol:135M-Q4_K_M-16k", "context is 16384, but the config has 8192"),
        ("smol:latest", "does not follow <family>:<params>-<quant>-<context>"),
        ("smol:135M-Q4_K_M", "does not follow"),
    ],
)
def test_names(name: str, problem: str | None) -> None:
    pattern = NamePattern.parse("<family>:<params>-<quant>-<context>", "policy")
    config = ModelConfig("", quantization="Q4_K_M", parameters="135 M", context_size=8192)
    found = pattern.problems(Reference.parse(f"registry.example/ai/{name}"), config)
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1
        assert problem in found[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = 'x'", "expected a pattern like"),
        ("name = '<family>:<size>'", "<size> is not one of"),
        ("name = '<family>:<family>'", "once each"),
        ("name = 3", "name is not a string"),
        ("[rules]\nnames = 'off'", "unknown field 'names'"),
        ("[rules]\nname = 'no'", "rules.name: is 'no'"),
        ("[license]\nallowed = []", "unknown field 'license'"),
        ("[licence]\nallowed = 'MIT'", "allowed is not an array of strings"),
        ("[metadata]\nrequired = ['x']", "'x' is not one of"),
        ("[context]\nmin = 0", "context is 0 to"),
        ("[context]\nmin = 9\nmax = 8", "context is 9 to 8"),
        ("rules = 1", "rules is not a table"),
        ("=", "is not TOML"),
    ],
)
def test_policies_that_are_wrong(text: str, says: str) -> None:
    with pytest.raises(FormatError) as raised:
        parse_policy(text, "policy")
    assert says in str(raised.value)


def test_the_default_knows_every_rule() -> None:
    assert {LintPolicy().level(rule) for rule in RULES} == {Level.ERROR}


def test_a_stored_model_and_that_of_its_registry(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "generation_config.json").write_text('{"path": "/root/x"}')
    store = modelpack.Store(tmp_path / "store")
    policy = tmp_path / "policy.toml"
    policy.write_text('name = "<family>:<params>"')
    with registry(tmp_path / "registry") as server:
        reference = f"{server.host}/team/model:v1"
        package(reference, directory, store, push=True)
        for where in (["--store", str(store.root)], ["-r"]):
            assert run(["lint", reference, "--policy", str(policy), "--json", *where]) == 1
            found = json.loads(capsys.readouterr().out)["findings"]
            assert [one["rule"] for one in found] == ["name", "paths"]
    assert run(["lint", "nothing/there:v1", "--store", str(store.root)]) == 3
    assert run(["lint", str(directory), "--format", "sarif"]) == 1
    log = json.loads(capsys.readouterr().out)
    [result] = log["runs"][0]["results"]
    assert result["ruleId"] == "paths"
    assert result["locations"][0]["physicalLocation"]["artifactLocation"] == {
        "uri": "generation_config.json"
    }


def test_sarif(directory: Path) -> None:
    (directory / "a b.json").write_text('\n"/home/ann/x"')
    report = linted(directory)
    log = to_sarif(report.name, report.findings)
    [run_] = log["runs"]
    rules = run_["tool"]["driver"]["rules"]
    [result] = run_["results"]
    assert log["version"] == "2.1.0"
    assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == "paths"
    physical = result["locations"][0]["physicalLocation"]
    assert physical == {"artifactLocation": {"uri": "a%20b.json"}, "region": {"startLine": 2}}


def test_an_empty_directory(tmp_path: Path) -> None:
    assert run(["lint", str(tmp_path)]) == 2
