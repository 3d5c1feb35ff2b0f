"""Check a model by the rules of a policy, and report the findings, also as SARIF.

`check` runs the checks of all rules on a `LintSubject`; the function of each rule is `check_` and
its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Final
from urllib.parse import quote

from modelpack._version import __version__
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.model import Role
from modelpack.artifacts.reference import Reference
from modelpack.builder.classify import PICKLE_EXTENSIONS, PICKLE_HEAD_BYTES, holds_pickle
from modelpack.errors import ModelpackError
from modelpack.formats.config_json import ENCODERS, output_of, speech_family, stated_template
from modelpack.formats.config_json import context_size as context_of
from modelpack.formats.gguf import MetadataValue
from modelpack.formats.licences import licence_of, licence_of_card
from modelpack.formats.model_card import ModelCard
from modelpack.lint.policy import RULES, Level, LintPolicy

#: The rest of a longer text is not searched. Tokenizers of the largest vocabularies have 40 MB.
MAX_TEXT_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LintFile:
    """A file of the model; `read` returns the given number of bytes from its start."""

    path: str
    role: Role
    size: int
    format: str
    read: Callable[[int], bytes] = field(repr=False)

    @property
    def name(self) -> str:
        """The last part of the path, in lower case."""
        return self.path.rpartition("/")[2].lower()

    def text(self) -> str | None:
        """Return the file's text, or None for a binary file."""
        raw = self.read(min(self.size, MAX_TEXT_BYTES))
        if b"\x00" in raw[:4096]:
            return None
        return raw.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class LintSubject:
    """The model to check: its reference if it has one, config, files and GGUF metadata."""

    name: str
    reference: Reference | None
    config: ModelConfig
    files: tuple[LintFile, ...]
    gguf: Mapping[str, MetadataValue] = field(default_factory=dict, hash=False)
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)

    def file(self, name: str) -> LintFile | None:
        """Return the file of this name in the topmost directory, or None."""
        found = [file for file in self.files if file.name == name]
        return min(found, key=lambda file: file.path.count("/"), default=None)

    def gguf_text(self, key: str) -> str:
        """Return a text of the GGUF metadata, or "" if there is none."""
        found = self.gguf.get(key)
        return found.value if found is not None and isinstance(found.value, str) else ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A violation of a rule, with the `path` of the file and the `line` (from 1) if known."""

    rule: str
    message: str
    path: str | None = None
    line: int | None = None
    level: Level = Level.ERROR

    def to_json(self) -> dict[str, Any]:
        """Return the finding as a JSON object."""
        value: dict[str, Any] = {"rule": self.rule, "level": str(self.level)}
        if self.path is not None:
            value["path"] = self.path
        if self.line is not None:
            value["line"] = self.line
        return value | {"message": self.message}

    def __str__(self) -> str:
        line = f":{self.line}" if self.line is not None else ""
        where = f"{self.path}{line}: " if self.path is not None else ""
        return f"{self.level}: {where}{self.message} [{self.rule}]"


_WEIGHTS: Final = (Role.WEIGHT, Role.PROJECTOR)
_TEXTS: Final = (Role.CONFIG, Role.CHAT_TEMPLATE, Role.DOC, Role.CODE, Role.FILE, Role.LICENSE)
_PICKLE_NAMES: Final = (*PICKLE_EXTENSIONS, ".joblib", ".dill")
_SECRETS: Final = (
    ("a private key", re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----")),
    ("a token of Hugging Face", re.compile(r"\b(?:hf|api_org)_[A-Za-z]{30,40}\b")),
    ("a token of GitHub", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})")),
    ("a token of GitLab", re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}")),
    ("an access key of AWS", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a key of Google", re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b")),
    ("a token of Slack", re.compile(r"\bxox[abprs]-[0-9A-Za-z-]{20,}")),
    ("a key of OpenAI or Anthropic", re.compile(r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}")),
    ("a key of Weights & Biases", re.compile(r"WANDB_API_KEY\W{1,4}[0-9a-f]{40}\b")),
    ("a password in an address", re.compile(r"\bhttps?://[^\s/:@\"'<>]+:[^\s/@\"'<>]{3,}@[\w.-]+")),
)  # fmt: skip
_PATH = re.compile(
    r"(?:^|(?<=[\s\"'=:(\[]))"
    r"(?:/(?:home|Users|root|mnt|media|tmp|var|srv|data\d*|workspace|scratch|nfs|fsx|lustre|gpfs)"
    r"/[^\s\"'<>]+|[A-Za-z]:\\{1,2}(?!n\b)[\w.-]+\\{1,2}[^\s\"'<>]*)",
    re.MULTILINE,
)
#: Files with vocabularies are not searched: their tokens can look like secrets.
_VOCABULARIES: Final = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
_MAX_EACH: Final = 20


def check_pickles(subject: LintSubject, _: LintPolicy) -> Iterator[Finding]:
    """Yield the files that are pickles, by name or by content."""
    for file in subject.files:
        if file.name.endswith(_PICKLE_NAMES):
            yield Finding("pickle", "has the extension of a pickle", file.path)
            continue
        is_parsed = file.role in _WEIGHTS and file.format in ("gguf", "safetensors")
        if not is_parsed and holds_pickle(file.read(min(file.size, PICKLE_HEAD_BYTES))):
            yield Finding("pickle", "is a pickle", file.path)


def check_secrets(subject: LintSubject, policy: LintPolicy) -> Iterator[Finding]:
    """Yield the places of possible secrets; the findings do not contain the secrets."""
    for file, text in _texts(subject, policy):
        for what, pattern in _SECRETS:
            for match in islice(pattern.finditer(text), _MAX_EACH):
                yield Finding("secrets", f"contains {what}", file.path, _line(text, match.start()))


def check_paths(subject: LintSubject, policy: LintPolicy) -> Iterator[Finding]:
    """Yield the absolute paths in configurations and templates."""
    for file, text in _texts(subject, policy):
        if file.role in (Role.CONFIG, Role.CHAT_TEMPLATE):
            for match in islice(_PATH.finditer(text), _MAX_EACH):
                line = _line(text, match.start())
                yield Finding("paths", f"contains the path {match[0][:200]}", file.path, line)
    for key, entry in subject.gguf.items():
        if isinstance(entry.value, str) and not key.startswith("tokenizer."):
            for match in islice(_PATH.finditer(entry.value), _MAX_EACH):
                yield Finding("paths", f"the GGUF's {key} contains the path {match[0][:200]}")


def _texts(subject: LintSubject, policy: LintPolicy) -> Iterator[tuple[LintFile, str]]:
    for file in subject.files:
        wanted = file.role in _TEXTS and file.name not in _VOCABULARIES
        if wanted and policy.searches(file.path) and (text := file.text()) is not None:
            yield file, text


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


#: Render the source of a template with variables; raises `ModelpackError` for a broken template.
Render = Callable[[str, Mapping[str, Any]], str]

_TEMPLATE_KEY: Final = "tokenizer.chat_template"
_WORDS: Final = "the words of a test"
_MESSAGES: Final = [{"role": "user", "content": _WORDS}]


def check_name(subject: LintSubject, policy: LintPolicy) -> Iterator[Finding]:
    """Yield the problems of the model's name; files that are not packaged yet have no name."""
    if policy.name is not None and subject.reference is not None:
        for problem in policy.name.problems(subject.reference, subject.config):
            yield Finding("name", problem)


def check_licence(subject: LintSubject, policy: LintPolicy) -> Iterator[Finding]:
    """Yield a finding for a missing licence and for each one that is not allowed."""
    known = licences(subject)
    if not known:
        yield Finding("licence", "no licence: there is no licence file and none in the metadata")
    for path, identifier in known.items():
        place = path or None
        if not policy.allowed:
            continue
        if identifier is None:
            yield Finding("licence", "is not a recognised licence", place)
        elif identifier.lower() not in (one.lower() for one in policy.allowed):
            allowed = ", ".join(policy.allowed)
            yield Finding("licence", f"is {identifier}, allowed: {allowed}", place)


def licences(subject: LintSubject) -> dict[str, str | None]:
    """Return the SPDX identifiers of the licences by file, or None for an unknown text.

    Without a licence file, the empty path has the licence of the config, GGUF or model card.
    """
    found = {
        file.path: licence_of(file.text() or "")
        for file in subject.files
        if file.role is Role.LICENSE
    }
    if found:
        return found
    named = subject.config.cncf_descriptor.get("licenses") or []
    texts = [text for text in named if isinstance(text, str)]
    texts.append(subject.gguf_text("general.license"))
    readme = subject.file("readme.md")
    card = licence_of_card(ModelCard.parse(readme.text() or "")) if readme is not None else None
    identifiers = [licence_of(text) or text for text in texts if text] or ([card] if card else [])
    return {"": identifiers[0]} if identifiers else {}


def check_metadata(subject: LintSubject, policy: LintPolicy) -> Iterator[Finding]:
    """Yield the required fields that are empty in the config."""
    for name in policy.required:
        if not getattr(subject.config, name):
            yield Finding("metadata", f"the config has no {name}")


def check_context(subject: LintSubject, policy: LintPolicy) -> Iterator[Finding]:
    """Yield a context size outside the policy's bounds or beyond the model's own."""
    size, own = subject.config.context_size, trained_context(subject)
    used = own if size is None else size
    if used is not None and not policy.min_context <= used <= policy.max_context:
        bounds = f"{policy.min_context} to {policy.max_context}"
        what = (
            f"the model has a context of {own}" if size is None else f"the context size is {size}"
        )
        yield Finding("context", f"{what} tokens, expected {bounds}")
    if size is not None and own is not None and size > own:
        yield Finding("context", f"the context size is {size} tokens, but the model has {own}")


def trained_context(subject: LintSubject) -> int | None:
    """Return the context size in the model's GGUF or config.json, in tokens, or None."""
    found = subject.gguf.get(f"{subject.gguf_text('general.architecture')}.context_length")
    if found is not None and type(found.value) is int:
        return found.value
    config = _json(subject.file("config.json"))
    return context_of(config, nested=True) if config is not None else None


def check_template(render: Render, subject: LintSubject, _: LintPolicy) -> Iterator[Finding]:
    """Yield a finding for a missing template and for each that does not render a message."""
    if not generates_text(subject):
        return
    found = templates(subject)
    if not found:
        yield Finding("template", "no chat template")
    for path, source in found.items():
        try:
            text = render(source, _variables(subject))
        except ModelpackError as error:
            yield Finding("template", f"does not render: {error}", path or None)
            continue
        if _WORDS not in text:
            yield Finding("template", "leaves out the message of the user", path or None)


def generates_text(subject: LintSubject) -> bool:
    """Return whether the model continues text, unlike encoders, diffusers and speech to text."""
    architecture = subject.gguf_text("general.architecture")
    if architecture:
        # llama.cpp: a pooling type other than 0 makes a decoder an embedding model.
        pooling = subject.gguf.get(f"{architecture}.pooling_type")
        return architecture not in ENCODERS and (pooling is None or pooling.value == 0)
    if subject.file("modules.json") is not None:  # sentence-transformers
        return False
    config = _json(subject.file("config.json")) or {}
    config = {**config, "model_type": config.get("model_type") or subject.config.architecture}
    formats = {file.format for file in subject.files if file.role is Role.WEIGHT}
    return formats != {"dduf"} and output_of(config) == "text" and speech_family(config) is None


def templates(subject: LintSubject) -> dict[str, str]:
    """Return the sources of the chat templates by file; that of a GGUF has an empty path."""
    found = {
        file.path: file.text() or "" for file in subject.files if file.role is Role.CHAT_TEMPLATE
    }
    if found:
        return found
    tokenizer = subject.file("tokenizer_config.json")
    stated = stated_template(_json(tokenizer) or {})
    if tokenizer is not None and stated:
        return {tokenizer.path: stated}
    source = subject.gguf_text(_TEMPLATE_KEY)
    return {"": source} if source else {}


def _variables(subject: LintSubject) -> dict[str, Any]:
    config = _json(subject.file("tokenizer_config.json")) or {}

    def token(name: str) -> str:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else ""

    return {
        "messages": _MESSAGES,
        "add_generation_prompt": True,
        "bos_token": token("bos_token"),
        "eos_token": token("eos_token"),
    }


def _json(file: LintFile | None) -> dict[str, Any] | None:
    try:
        value = json.loads(file.text() or "") if file is not None else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def check(subject: LintSubject, policy: LintPolicy, render: Render) -> tuple[Finding, ...]:
    """Return the findings of all rules that the policy does not switch off."""
    checks: dict[str, Callable[[LintSubject, LintPolicy], Iterator[Finding]]] = {
        "name": check_name,
        "licence": check_licence,
        "metadata": check_metadata,
        "template": partial(check_template, render),
        "pickle": check_pickles,
        "secrets": check_secrets,
        "paths": check_paths,
        "context": check_context,
    }
    found: list[Finding] = []
    for rule, look in checks.items():
        if (level := policy.level(rule)) is not Level.OFF:
            found += [replace(one, level=level) for one in look(subject, policy)]
    return tuple(found)


SCHEMA: Final = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


def to_sarif(name: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return a SARIF log with the findings of one run on the model `name`."""
    order = list(RULES)
    rules = [{"id": rule, "shortDescription": {"text": text}} for rule, text in RULES.items()]
    driver = {"name": "modelpack lint", "version": __version__, "rules": rules}
    results = [_result(one, name, order.index(one.rule)) for one in findings]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _result(finding: Finding, name: str, index: int) -> dict[str, Any]:
    location: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": name, "kind": "module"}]
    }
    if finding.path is not None:
        physical: dict[str, Any] = {"artifactLocation": {"uri": quote(finding.path)}}
        if finding.line is not None:
            physical["region"] = {"startLine": finding.line}
        location["physicalLocation"] = physical
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": str(finding.level),
        "message": {"text": finding.message},
        "locations": [location],
    }
