"""The keys file: reloaded when it changes, replaced atomically."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from modelpack.errors import ConflictError, FormatError, NotFoundError, UsageError
from modelpack_server.gateway.keys import KeyFile, add_key, remove_key
from modelpack_server.gateway.limits import Limits


def names(file: KeyFile) -> list[str]:
    return [key.name for key in file.current().keys]


def test_a_key_made_is_a_key_found(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.toml"
    secret = add_key(path, "alice", limits=Limits(1, 2, 3), models=('a"\\\n*',))
    assert secret.startswith("mp_")
    assert len(secret) > 40
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = KeyFile(path).current().find(secret)
    assert key is not None
    assert (key.name, key.limits, key.models) == ("alice", Limits(1, 2, 3), ('a"\\\n*',))
    assert sorted(os.listdir(path.parent)) == ["keys.toml"]


def test_comments_stay_and_the_mode_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("# ours\n")
    path.chmod(0o644)
    add_key(path, "alice")
    add_key(path, "bob")
    assert path.read_text().startswith("# ours\n\n[keys.")
    assert names(KeyFile(path)) == ["alice", "bob"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


OURS = """\
# our keys

[keys.alice]  # of the first team
sha256 = "{a}"
models = [
    "x",
]
# more of alice
[keys."alice".per_caller]
concurrency = 1

# bob's
[keys.bob]
sha256 = "{b}"
# the end
"""


def test_a_key_removed_takes_its_tables_and_no_other_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    text = OURS.format(a="a" * 64, b="b" * 64)
    path.write_text(text)
    file = KeyFile(path)
    remove_key(path, "alice")
    assert names(file) == ["bob"]
    assert path.read_text() == (
        f'# our keys\n\n# more of alice\n\n# bob\'s\n[keys.bob]\nsha256 = "{"b" * 64}"\n# the end\n'
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(text)
    remove_key(path, "bob")
    assert path.read_text().startswith("# our keys\n\n[keys.alice]  # of the first team\n")
    assert path.read_text().endswith("concurrency = 1\n\n# bob's\n# the end\n")
    remove_key(path, "alice")
    assert names(file) == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('[keys.bob]\nsha256 = "{}"\n', NotFoundError),
        ('[keys]\nalice = {{ sha256 = "{}" }}\n', ConflictError),
        ('keys.alice.sha256 = "{}"\n', ConflictError),
        ("[keys.alice]\n", FormatError),
        (None, UsageError),
    ],
)
def test_a_key_that_cannot_be_removed(
    tmp_path: Path, text: str | None, error: type[Exception]
) -> None:
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text.format("a" * 64))
    with pytest.raises(error):
        remove_key(path, "alice")
    assert text is None or path.read_text() == text.format("a" * 64)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.toml").symlink_to(tmp_path / "real.toml")
    add_key(tmp_path / "link.toml", "alice")
    assert (tmp_path / "link.toml").is_symlink()
    assert names(KeyFile(tmp_path / "real.toml")) == ["alice"]


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    threads = [threading.Thread(target=add_key, args=(path, f"k{n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names(KeyFile(path))) == [f"k{n}" for n in range(8)]


def test_what_cannot_be_added(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, "alice")
    before = path.read_bytes()
    with pytest.raises(ConflictError, match="already has a key 'alice'"):
        add_key(path, "alice")
    with pytest.raises(UsageError, match="is not a valid key name"):
        add_key(path, "a b")
    assert path.read_bytes() == before
    path.write_text("nonsense")
    with pytest.raises(FormatError, match="not TOML"):
        add_key(path, "bob")
    assert path.read_text() == "nonsense"


def test_a_changed_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.toml"
    first = add_key(path, "alice")
    file = KeyFile(path)
    second = add_key(path, "bob")
    assert names(file) == ["alice", "bob"]
    assert "number of keys: 2" in caplog.text
    path.write_text("")  # every request is refused
    assert file.current().find(first) is None
    assert "every request is refused" in caplog.text
    assert first not in caplog.text
    assert second not in caplog.text


@pytest.mark.parametrize("broken", [b"[keys.", b"\xff\xfe", b"x = 1"])
def test_a_broken_edit_keeps_the_keys_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: bytes
) -> None:
    path = tmp_path / "keys.toml"
    secret = add_key(path, "alice")
    whole = path.read_bytes()
    file = KeyFile(path)
    path.write_bytes(broken)
    for _ in range(3):
        assert file.current().find(secret) is not None
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert str(path) in errors[0].getMessage()
    path.write_bytes(whole + b"# mended\n")
    assert names(file) == ["alice"]
    assert "number of keys: 1" in caplog.text


def test_a_file_that_is_gone_keeps_the_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, "alice")
    file = KeyFile(path)
    path.unlink()
    assert names(file) == names(file) == ["alice"]
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    add_key(path, "bob")
    assert names(file) == ["bob"]


def test_others_who_can_read_the_file_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, "alice")
    KeyFile(path)
    assert caplog.text == ""
    path.chmod(0o640)
    KeyFile(path)
    assert "mode 0640" in caplog.text


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file") as caught:
        KeyFile(tmp_path / "keys.toml")
    assert "gateway key" in str(caught.value.hint)
