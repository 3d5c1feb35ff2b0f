"""Trust policies: which models need signatures, and whose. A policy is a TOML file.

default = "reject"                            # for models that no rule matches; or "accept"

[publishers.team]
keys = ["team.pub", "team-2027.pub"]          # files in the policy's directory, or PEM texts

[publishers.company]
authorities = ["ca.pem"]                      # of certificates for signing, with long lives

[publishers.ci]
trusted_root = "trusted_root.json"            # default: the root of sigstore's public instance
[[publishers.ci.identities]]                  # of keyless signatures
identity_regexp = "https://github.com/team/.*"   # or identity = "…"
issuer = "https://token.actions.githubusercontent.com"   # or issuer_regexp

[[rules]]                                     # the first rule that matches a model counts
models = ["registry.example/team/*"]          # patterns of the full registry/repository
publishers = ["team"]
threshold = 1                                 # publishers that must sign; they share no signer
formats = ["cosign", "bundle"]                # default: all formats that cover the manifest
provenance = true                             # require signed provenance by a publisher, too
sources = ["git+https://git.example/team/*"]  # patterns of the commits' addresses in it

[[rules]]
models = ["localhost:5000/*"]
accept = true                                 # no signature needed
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from modelpack.artifacts.reference import Reference
from modelpack.errors import FormatError, InvalidReferenceError, UntrustedError, UsageError
from modelpack.trust.certificates import Authority
from modelpack.trust.keyless import Identity, TrustedRoot, exact_or_pattern
from modelpack.trust.keys import PublicKey, parse_public_key, read_public_key
from modelpack.trust.provenance import GIT_COMMIT, Provenance
from modelpack.trust.signatures import MANIFEST_FORMATS, Signature, SignatureKind, Signer

#: The variable that names a policy file.
POLICY: Final = "MODELPACK_POLICY"
_IPV6: Final = re.compile(r"\[[0-9a-f]*:[0-9a-f]*:[0-9a-f:]*\]")

#: What a rule may require, which a rule that accepts everything cannot have.
_REQUIREMENTS: Final = frozenset({"publishers", "threshold", "formats", "provenance", "sources"})
_SET: Final = re.compile(r"\[!?\]?[^]]*\]")
_IN_NO_PATH: Final = re.compile(r"[^a-z0-9._/*?-]")


@dataclass(frozen=True, slots=True)
class Publisher:
    """A publisher of models, who signs as any of the signers."""

    name: str
    signers: frozenset[Signer]


@dataclass(frozen=True, slots=True)
class Rule:
    """The signatures that models of these patterns need: by `threshold` of the publishers.

    With a threshold of 0 they need none. Only signatures of one of the `formats` count. With
    `provenance`, one of the publishers must also have signed the model's provenance; with
    `sources`, it names at least one commit, and a pattern matches the address of each.
    """

    models: tuple[str, ...]
    publishers: tuple[Publisher, ...]
    threshold: int = 1
    formats: tuple[SignatureKind, ...] = MANIFEST_FORMATS
    provenance: bool = False
    sources: tuple[str, ...] = ()

    def names(self, name: str) -> bool:
        """Return whether the rule matches the repository `name` (`registry/repository`)."""
        return any(fnmatchcase(name, pattern) for pattern in self.models)

    @property
    def signers(self) -> frozenset[Signer]:
        """The signers of all its publishers."""
        return frozenset(signer for one in self.publishers for signer in one.signers)

    def is_met(self, signatures: Collection[Signature]) -> bool:
        """Return whether the signatures, and the provenance among them, are those required."""
        return self.is_signed(signatures) and self.has_provenance(signatures)

    def has_provenance(self, signatures: Collection[Signature]) -> bool:
        """Return whether a publisher signed the required provenance, if the rule requires one."""
        return not self.provenance or any(
            one.provenance is not None
            and one.signer in self.signers
            and (not self.sources or self._names_sources(one.provenance))
            for one in signatures
        )

    def _names_sources(self, provenance: Provenance) -> bool:
        uris = [one.uri for one in provenance.dependencies if GIT_COMMIT in one.digest]
        return bool(uris) and all(
            uri and any(fnmatchcase(uri, pattern) for pattern in self.sources) for uri in uris
        )

    def is_signed(self, signatures: Collection[Signature]) -> bool:
        """Return whether enough publishers made one of the signatures."""
        by = {one.signer for one in signatures if one.kind in self.formats}
        signed = [one for one in self.publishers if not one.signers.isdisjoint(by)]
        return len(signed) >= self.threshold


@dataclass(frozen=True, slots=True)
class Trust:
    """Lists of rules, one of a policy and one of the command line; a model must satisfy both."""

    lists: tuple[tuple[Rule, ...], ...]

    @classmethod
    def of(
        cls,
        signers: Iterable[Signer] = (),
        policy: Path | None = None,
        formats: Sequence[SignatureKind] = (),
    ) -> Trust | None:
        """Return the trust that requires a signature by one of `signers`, and those of `policy`.

        Signatures by `signers` must have one of the `formats`, by default one that covers the
        manifest. The result is None without signers and policy. Raises `FormatError`.
        """
        lists: list[tuple[Rule, ...]] = []
        if found := frozenset(signers):
            options = {
                "--verify-key": any(isinstance(one, PublicKey) for one in found),
                "--certificate-authority": any(isinstance(one, Authority) for one in found),
                "--certificate-identity": any(isinstance(one, Identity) for one in found),
            }
            name = " or ".join(option for option, given in options.items() if given)
            publisher, accepted = Publisher(name, found), tuple(formats)
            lists.append((Rule(("*",), (publisher,), formats=accepted or MANIFEST_FORMATS),))
        if policy is not None:
            lists.append(read_policy(policy))
        return cls(tuple(lists)) if lists else None

    @classmethod
    def from_environment(cls) -> Trust | None:
        """Return the trust of the policy file in `MODELPACK_POLICY`, or None if it is not set."""
        policy = os.environ.get(POLICY)
        return cls.of(policy=Path(policy)) if policy else None

    def rules(self, name: str) -> tuple[Rule, ...]:
        """Return the rules for the repository `name`; raise `UntrustedError` if none matches."""
        found = []
        for rules in self.lists:
            rule = next((rule for rule in rules if rule.names(name)), None)
            if rule is None:
                raise UntrustedError(
                    f"{name}: no rule of the policy matches it",
                    hint='add a rule, or set default = "accept"',
                )
            found.append(rule)
        return tuple(found)


def read_policy(path: Path) -> tuple[Rule, ...]:
    """Return the rules of a policy file; raise `FormatError` with the invalid place."""
    try:
        text = path.read_text(encoding="utf-8")
        value = tomllib.loads(text)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=str(path)) from error
    except ValueError as error:
        raise FormatError(f"is not TOML: {error}", path=str(path)) from None
    what = str(path)
    check_fields(value, {"default", "publishers", "rules"}, what)
    default = value.get("default", "reject")
    if default not in ("accept", "reject"):
        raise FormatError(f'default is {default!r}, expected "accept" or "reject"', path=what)
    publishers = {
        name: _publisher(name, entry, path)
        for name, entry in _table(value.get("publishers", {}), f"{what}: publishers").items()
    }
    entries = value.get("rules", [])
    if not isinstance(entries, list):
        raise FormatError("rules is not an array of tables: write [[rules]]", path=what)
    rules = [_rule(entry, publishers, f"{what}: rules[{at}]") for at, entry in enumerate(entries)]
    for at, rule in enumerate(rules):
        for pattern in rule.models:
            if problem := _problem_of(pattern):
                where = f"{what}: rules[{at}]"
                raise FormatError(f"{pattern!r} matches no model: {problem}", path=where)
    if default == "accept":
        rules.append(Rule(("*",), (), 0))
    return tuple(rules)


def _publisher(name: str, entry: Any, path: Path) -> Publisher:
    where = f"{path}: publishers.{name}"
    check_fields(entry, {"keys", "authorities", "identities", "trusted_root"}, where)
    signers: list[Signer] = []
    if "keys" in entry or not entry.keys() & {"authorities", "identities"}:
        for at, text in enumerate(_texts(entry, "keys", where)):
            if "-----BEGIN" in text:
                signers.append(parse_public_key(text.encode(), f"{where}: keys[{at}]"))
            else:
                signers.append(read_public_key(path.parent / text))
    if "authorities" in entry:
        files = _texts(entry, "authorities", where)
        signers += [Authority.read(path.parent / name) for name in files]
    if "identities" in entry:
        signers += _identities(entry, path, where)
    elif "trusted_root" in entry:
        raise FormatError("trusted_root requires identities", path=where)
    return Publisher(name, frozenset(signers))


def _identities(entry: dict[str, Any], path: Path, where: str) -> list[Identity]:
    listed = entry["identities"]
    if not isinstance(listed, list) or not listed:
        raise FormatError("identities is not an array of at least one table", path=where)
    root_file = entry.get("trusted_root")
    if not isinstance(root_file, str | None):
        raise FormatError("trusted_root: expected the name of a file", path=where)
    matchers = []
    for at, one in enumerate(listed):
        place = f"{where}: identities[{at}]"
        check_fields(one, {"identity", "identity_regexp", "issuer", "issuer_regexp"}, place)
        for field, value in one.items():
            if not isinstance(value, str):
                raise FormatError(f"{field}: expected a string", path=place)
        try:
            identity, issuer = (
                exact_or_pattern(one.get(name), one.get(f"{name}_regexp"), name)
                for name in ("identity", "issuer")
            )
        except UsageError as error:
            raise FormatError(str(error), path=place) from None
        matchers.append((identity, issuer))
    root = TrustedRoot.read(path.parent / root_file if root_file is not None else None)
    return [Identity(identity, issuer, root) for identity, issuer in matchers]


def _rule(entry: Any, publishers: dict[str, Publisher], where: str) -> Rule:
    check_fields(entry, {"models", "accept", *_REQUIREMENTS}, where)
    models = _texts(entry, "models", where)
    accept = entry.get("accept", False)
    if not isinstance(accept, bool):
        raise FormatError("accept: expected true or false", path=where)
    if accept:
        if entry.keys() & _REQUIREMENTS:
            raise FormatError(
                "accept = true cannot be combined with publishers, threshold or formats, nor with "
                "provenance or sources",
                path=where,
            )
        return Rule(models, (), 0)
    named = _texts(entry, "publishers", where)
    unknown = [name for name in named if name not in publishers]
    if unknown:
        raise FormatError(f"no such publisher: {unknown[0]!r}", path=where)
    threshold = entry.get("threshold", 1)
    if type(threshold) is not int or not 1 <= threshold <= len(set(named)):
        raise FormatError(
            f"threshold is {threshold!r}, expected 1 to {len(set(named))}, the number of "
            "publishers",
            path=where,
        )
    rule = Rule(
        models,
        tuple(publishers[name] for name in dict.fromkeys(named)),
        threshold,
        _formats(entry, where),
        *_provenance(entry, where),
    )
    if threshold > 1:
        _check_distinct(rule, where)
    return rule


def _check_distinct(rule: Rule, where: str) -> None:
    """Raise `FormatError` if one signature could count for two publishers of a rule."""
    kept: set[object] = set()
    for publisher in rule.publishers:
        own: set[object] = set()
        for signer in publisher.signers:
            loose = ""
            if isinstance(signer, Authority):
                loose = "an authority, which may certify the key"
            elif isinstance(signer, Identity) and not signer.is_exact:
                loose = "a regular expression, which may match the certificate"
            if loose:
                raise FormatError(
                    f"threshold is {rule.threshold}, but publisher {publisher.name!r} has {loose} "
                    "of another one",
                    path=where,
                    hint="list the keys, or identities and issuers, of these publishers in full",
                )
            # Roots do not tell signers apart: two of them may issue the same certificate.
            own.add((signer.identity, signer.issuer) if isinstance(signer, Identity) else signer)
        if not kept.isdisjoint(own):
            what = "key or identity" if any(isinstance(one, tuple) for one in kept & own) else "key"
            raise FormatError(
                f"threshold is {rule.threshold}, but two of the publishers share a {what}, so one "
                "signature would count for both",
                path=where,
            )
        kept |= own


def _problem_of(pattern: str) -> str:
    """Return why a pattern matches no name of a model, or "" if it may match one.

    A rule with such a pattern would be skipped, and a later rule or the default would apply.
    """
    host, slash, path = pattern.partition("/")
    if pattern != pattern.lower():
        return "names are in lower case"
    if _IPV6.match(host):
        return f"'[' starts a set of characters; write [[]{pattern[1:]}"
    if ":" in path or "@" in path:
        return "rules match repositories, without tag and digest"
    literal = _SET.sub("?", path)
    if found := _IN_NO_PATH.search(literal):
        return f"no repository contains {found[0]!r}"
    if slash and "" in literal.split("/"):
        return "a component of the repository is empty"
    if not slash and "*" not in pattern:
        return "write registry/repository"
    if not slash or set(host) & set("*?["):
        return ""
    try:
        registry = Reference.parse(f"{host}/a/a").registry
    except InvalidReferenceError:
        return f"{host!r} is not a registry"
    return "" if registry == host else f"full names begin with {registry}/"


def _provenance(entry: dict[str, Any], where: str) -> tuple[bool, tuple[str, ...]]:
    """Return whether a rule requires provenance, and the patterns of its sources."""
    required = entry.get("provenance", False)
    if not isinstance(required, bool):
        raise FormatError("provenance: expected true or false", path=where)
    if "sources" not in entry:
        return required, ()
    if not required:
        raise FormatError("sources requires provenance = true", path=where)
    return required, _texts(entry, "sources", where)


def _formats(entry: dict[str, Any], where: str) -> tuple[SignatureKind, ...]:
    if "formats" not in entry:
        return MANIFEST_FORMATS
    named = _texts(entry, "formats", where)
    known = [kind for kind in SignatureKind if kind is not SignatureKind.PROVENANCE]
    unknown = [name for name in named if name not in known]
    if unknown:
        raise FormatError(
            f"{unknown[0]!r} is not a format of signatures; expected {', '.join(known)}",
            path=where,
        )
    return tuple(SignatureKind(name) for name in named)


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError("is not a table", path=where)
    return value


def check_fields(value: Any, known: set[str], where: str) -> None:
    """Reject unknown fields: a policy with a misspelled rule would trust other models."""
    unknown = sorted(_table(value, where).keys() - known)
    if unknown:
        expected = ", ".join(sorted(known))
        raise FormatError(f"has an unknown field {unknown[0]!r}: expected {expected}", path=where)


def _texts(value: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = value.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise FormatError(f"{key} is not an array of at least one string", path=where)
    return tuple(found)
