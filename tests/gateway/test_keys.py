"""The format of the keys file."""

from __future__ import annotations

import hashlib

import pytest

from modelpack.errors import FormatError
from modelpack_server.gateway.keys import Key, hash_of, parse_keys
from modelpack_server.gateway.limits import Limits

HASH = hashlib.sha256(b"mp_secret").hexdigest()
OTHER = hashlib.sha256(b"mp_other").hexdigest()


def test_everything_that_a_key_may_have() -> None:
    [key] = parse_keys(
        f"""
        [keys.alice]
        sha256 = "{HASH.upper()}"
        requests_per_minute = 60
        tokens_per_minute = 100_000
        concurrency = 4
        models = ["ai/smollm2*", "team/*"]

        [keys.alice.per_caller]
        requests_per_minute = 10
        """,
        "keys.toml",
    ).keys
    assert key == Key(
        "alice",
        bytes.fromhex(HASH),
        Limits(60, 100_000, 4),
        Limits(requests_per_minute=10),
        ("ai/smollm2*", "team/*"),
    )


def test_a_key_without_limits() -> None:
    [key] = parse_keys(f'[keys."ci.bot@x"]\nsha256 = "{HASH}"', "keys.toml").keys
    assert key == Key("ci.bot@x", bytes.fromhex(HASH))


@pytest.mark.parametrize("text", ["", "# nobody\n", "[keys]\n"])
def test_a_file_without_keys(text: str) -> None:
    assert parse_keys(text, "keys.toml").keys == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[keys.a", "is not TOML"),
        ("port = 1", "unknown field 'port'; keys are tables [keys.NAME]"),
        ("keys = 1", "'keys' is not a table"),
        ("keys.a = 1", "[keys.a]: expected a table, got a number"),
        ("[keys.a]", "[keys.a] sha256: is missing"),
        ("[keys.a]\nsha256 = 1", "[keys.a] sha256: expected 64 hexadecimal digits, got a number"),
        ('[keys.a]\nsha256 = ""', "[keys.a] sha256: expected 64 hexadecimal digits"),
        ('[keys.a]\nsha256 = "mp_oops"', "[keys.a] sha256: expected 64 hexadecimal digits, got"),
        (f'[keys.a]\nsha256 = "{HASH}0"', "got other text of length 65"),
        ('[keys."a b"]\nsha256 = "{H}"', "[keys.'a b']: a name has 1 to 64"),
        ('[keys.""]\nsha256 = "{H}"', "[keys.'']: a name has 1 to 64"),
        (
            '[keys.a]\nsha256 = "{H}"\nrate = 1',
            "[keys.a] rate: is unknown; expected one of concurrency",
        ),
        ('[keys.a]\nsha256 = "{H}"\nconcurrency = 0', "[keys.a] concurrency: expected 1 to"),
        ('[keys.a]\nsha256 = "{H}"\nconcurrency = true', "expected a whole number, got a boolean"),
        ('[keys.a]\nsha256 = "{H}"\nconcurrency = "4"', "expected a whole number, got a string"),
        (
            '[keys.a]\nsha256 = "{H}"\ntokens_per_minute = 1.5',
            "[keys.a] tokens_per_minute: expected a whole number, got a fraction",
        ),
        ('[keys.a]\nsha256 = "{H}"\nrequests_per_minute = -1', "got -1"),
        ('[keys.a]\nsha256 = "{H}"\nmodels = "*"', "[keys.a] models: expected a list of patterns"),
        ('[keys.a]\nsha256 = "{H}"\nmodels = []', "[keys.a] models: is empty"),
        ('[keys.a]\nsha256 = "{H}"\nmodels = ["x", 1]', "[keys.a] models[1]: expected a pattern"),
        ('[keys.a]\nsha256 = "{H}"\nmodels = [""]', "models[0]: expected a pattern, got an empty"),
        ('[keys.a]\nsha256 = "{H}"\nper_caller = 1', "[keys.a] per_caller: expected a table"),
        ('[keys.a]\nsha256 = "{H}"\nper_caller = {x = 1}', "[keys.a] per_caller.x: is unknown"),
        (
            '[keys.a]\nsha256 = "{H}"\nper_caller = {concurrency = 0}',
            "[keys.a] per_caller.concurrency: expected 1 to",
        ),
        (
            '[keys.a]\nsha256 = "{H}"\n[keys.b]\nsha256 = "{H}"',
            "[keys.b] has the same sha256 as [keys.a]",
        ),
        ('[keys.a]\nsha256 = "{H}"\n[keys.a]\nsha256 = "{H}"', "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_keys(text.replace("{H}", HASH), "dir/keys.toml")
    assert str(caught.value).startswith("dir/keys.toml: ")
    assert message in str(caught.value)
    assert "mp_oops" not in str(caught.value)


def test_finding_a_key_by_its_secret() -> None:
    keys = parse_keys(f'[keys.a]\nsha256 = "{HASH}"\n[keys.b]\nsha256 = "{OTHER}"', "keys.toml")
    assert [keys.find(secret) and keys.find(secret).name for secret in
            ("mp_secret", "mp_other", "", HASH, "mp_secret ", "mp_\udcff")] == [
        "a", "b", None, None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("globs", "model", "allowed"),
    [
        (None, "anything", True),
        (("ai/*",), "ai/smollm2:latest", True),
        (("ai/*",), "AI/smollm2", False),
        (("ai/*",), "x/ai/smollm2", False),
        (("smollm2",), "smollm2:latest", False),
        (("x", "smollm?:*"), "smollm2:latest", True),
        (("[ab]*",), "c", False),
        # A text that may refer to any model needs an exact pattern.
        (("*",), f"ai/smollm2@sha256:{HASH}", False),
        (("ai/*", f"ai/smollm2@sha256:{HASH}"), f"ai/smollm2@sha256:{HASH}", True),
        (("*",), f"sha256:{HASH}", False),
        (("sha256:*",), f"SHA256:{HASH}", False),
        (("b*",), f"blake3:{HASH}", False),
        ((HASH,), HASH, True),
        (("*",), HASH, False),
        (("*",), HASH[:12], False),
        (("*",), HASH[:4].upper(), False),
        (("*",), f" {HASH[:4]}\n", False),
        (("*", "beef"), "beef", True),
        (("*",), "beef", False),
        (("*",), "beefy", True),
        (("*",), "beef:latest", True),
        (None, HASH, True),
    ],
)
def test_globs(globs: tuple[str, ...] | None, model: str, allowed: bool) -> None:
    assert Key("a", hash_of("s"), models=globs).allows(model) is allowed
