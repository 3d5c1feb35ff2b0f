"""What is in the files: pickles, secrets, paths of somebody's machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from modelpack.linting.findings import Finding
from modelpack.linting.policy import LintPolicy
from modelpack.linting.subject import LintFile, LintSubject
from modelpack.model import Role
from modelpack.packaging.classify import PICKLE_EXTENSIONS, PICKLE_HEAD_BYTES, holds_pickle

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
#: Tokens of vocabularies look like anything.
_VOCABULARIES: Final = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
_MAX_EACH: Final = 20


def check_pickles(subject: LintSubject, _: LintPolicy) -> Iterator[Finding]:
    """Yield the files that are pickles, by name or by content."""
    for file in subject.files:
        if file.name.endswith(_PICKLE_NAMES):
            yield Finding("pickle", "is named like a pickle", file.path)
            continue
        is_parsed = file.role in _WEIGHTS and file.format in ("gguf", "safetensors")
        if not is_parsed and holds_pickle(file.read(min(file.size, PICKLE_HEAD_BYTES))):
            yield Finding("pickle", "holds a pickle", file.path)


def check_secrets(subject: LintSubject, policy: LintPolicy) -> Iterator[Finding]:
    """Yield the places that look like secrets, without the secrets."""
    for file, text in _texts(subject, policy):
        for what, pattern in _SECRETS:
            for match in _some(pattern, text):
                yield Finding("secrets", f"holds {what}", file.path, _line(text, match.start()))


def check_paths(subject: LintSubject, policy: LintPolicy) -> Iterator[Finding]:
    """Yield the absolute paths in configurations and templates."""
    for file, text in _texts(subject, policy):
        if file.role in (Role.CONFIG, Role.CHAT_TEMPLATE):
            for match in _some(_PATH, text):
                line = _line(text, match.start())
                yield Finding("paths", f"holds the path {match[0][:200]}", file.path, line)
    for key, entry in subject.gguf.items():
        if isinstance(entry.value, str) and not key.startswith("tokenizer."):
            for match in _some(_PATH, entry.value):
                yield Finding("paths", f"the GGUF's {key} holds the path {match[0][:200]}")


def _texts(subject: LintSubject, policy: LintPolicy) -> Iterator[tuple[LintFile, str]]:
    for file in subject.files:
        wanted = file.role in _TEXTS and file.name not in _VOCABULARIES
        if wanted and policy.looks_into(file.path):
            text = file.text()
            if text is not None:
                yield file, text


def _some(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    for count, match in enumerate(pattern.finditer(text)):
        if count == _MAX_EACH:
            return
        yield match


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
