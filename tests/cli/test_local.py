"""Commands that need no registry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.store.deletion import Removal
from modelpack.store.layout import LayoutStore
from tests.cli.running import modelpack, succeed
from tests.models import tiny_gguf, tiny_safetensors

DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path)


@pytest.fixture
def packaged(gguf: Path) -> str:
    """Return the digest of a model stored as team/tiny:v1."""
    return succeed("package", "--gguf", gguf, "team/tiny:v1").out


def test_package_prints_only_the_digest(gguf: Path) -> None:
    result = succeed("package", "--gguf", gguf, "team/tiny:v1")
    assert DIGEST.match(result.out)
    assert "packaged docker.io/team/tiny:v1" in result.err


def test_quiet_says_nothing(gguf: Path) -> None:
    result = succeed("package", "-q", "--gguf", gguf, "team/tiny:v1")
    assert DIGEST.match(result.out)
    assert result.err == ""


@pytest.mark.parametrize("alias", ["build", "pack"])
def test_aliases_of_package(alias: str, gguf: Path, packaged: str) -> None:
    assert succeed(alias, "--gguf", gguf, "team/tiny:v2").out == packaged


def test_a_bare_name_says_where_it_is(gguf: Path) -> None:
    assert "tiny is docker.io/ai/tiny:latest" in succeed("package", "--gguf", gguf, "tiny").err


def test_package_json(gguf: Path) -> None:
    value = succeed("package", "--json", "--gguf", gguf, "tiny").json
    assert value["schemaVersion"] == 1
    assert value["reference"] == "docker.io/ai/tiny:latest"
    assert value["stored"] is True
    assert value["layers"][0]["annotations"]["org.cncf.model.filepath"] == "tiny.gguf"


def test_dry_run_stores_nothing(gguf: Path, packaged: str) -> None:
    succeed("rm", "team/tiny:v1")
    result = succeed("package", "--dry-run", "--gguf", gguf, "team/tiny:v1")
    assert result.out == packaged
    assert "would package" in result.err
    assert succeed("list", "-q").out == ""


def test_relative_paths_and_home(
    gguf: Path, packaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(gguf.parent)
    assert succeed("package", "--gguf", gguf.name, "team/tiny:v1").out == packaged
    monkeypatch.setenv("HOME", str(gguf.parent))
    assert succeed("package", "--gguf", f"~/{gguf.name}", "team/tiny:v1").out == packaged


def test_list(packaged: str, tmp_path: Path) -> None:
    succeed("package", "--safetensors-dir", tiny_safetensors(tmp_path), "other:v2")
    lines = succeed("list").out.splitlines()
    assert lines[0].split()[:2] == ["MODEL", "NAME"]
    assert [line.split()[0] for line in lines[1:]] == ["other:v2", "team/tiny:v1"]
    assert packaged[7:19] in lines[2]
    ids = succeed("ls", "-q").out.splitlines()
    assert len(ids) == 2
    assert packaged[7:19] in ids
    value = succeed("list", "--json").json
    assert {tuple(model["tags"]) for model in value["models"]} == {
        ("docker.io/ai/other:v2",),
        ("docker.io/team/tiny:v1",),
    }


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("team/tiny", ["team/tiny:v1", "team/tiny:v2"]),
        ("team/tiny:v2", ["team/tiny:v2"]),
        ("docker.io/team/tiny", ["team/tiny:v1", "team/tiny:v2"]),
        ("nobody/nothing", []),
    ],
)
def test_list_one(packaged: str, name: str, shown: list[str]) -> None:
    succeed("tag", "team/tiny:v1", "team/tiny:v2")
    assert [line.split()[0] for line in succeed("list", name).out.splitlines()[1:]] == shown


def test_inspect(packaged: str) -> None:
    text = succeed("inspect", "team/tiny:v1").out
    assert f"Digest:       {packaged}" in text
    assert re.search(r"weight +256 B +tiny.gguf", text)
    value = succeed("show", "--json", "team/tiny:v1").json
    assert value["digest"] == packaged
    assert value["config"]["contextSize"] == 2048
    assert value["files"][0]["role"] == "weight"


def test_manifest_and_config_are_raw_bytes(packaged: str) -> None:
    raw = succeed("manifest", "team/tiny:v1").stdout
    assert str(Digest.of(raw)) == packaged
    config = succeed("config", "team/tiny:v1").stdout
    assert str(Digest.of(config)) == json.loads(raw)["config"]["digest"]


@pytest.mark.parametrize("spell", ["{0}", "{1}", "{2}", "team/tiny@{0}", "team/tiny:v1@{0}"])
def test_ways_to_name_a_model(packaged: str, spell: str) -> None:
    name = spell.format(packaged, packaged[7:19], packaged[7:13])
    assert succeed("inspect", "--json", name).json["digest"] == packaged


def test_tag_and_digest_must_agree(packaged: str) -> None:
    other = "sha256:" + "0" * 64
    result = modelpack("inspect", f"team/tiny:v1@{other}")
    assert result.code in (3, 5)
    assert other in result.err


def test_resolve(packaged: str, gguf: Path) -> None:
    path = succeed("resolve", "team/tiny:v1").out
    assert Path(path).read_bytes() == gguf.read_bytes()
    assert succeed("resolve", "team/tiny:v1", "--media-type", "gguf").out == path
    assert succeed("resolve", "team/tiny:v1", "--file", "tiny.gguf").out == path
    [file] = succeed("resolve", "--json", "team/tiny:v1").json["files"]
    assert file["path"] == path
    assert file["mediaType"] == "application/vnd.docker.ai.gguf.v3"


def test_resolve_names_what_there_is(packaged: str) -> None:
    result = modelpack("resolve", "team/tiny:v1", "--media-type", "license")
    assert result.code == 3
    assert "tiny.gguf" in result.err
    assert result.out == ""


def test_bundle(packaged: str, gguf: Path, tmp_path: Path) -> None:
    bundled = succeed("bundle", "team/tiny:v1", tmp_path / "run")
    again = modelpack("bundle", "team/tiny:v1", tmp_path / "run")
    assert again.code == 7
    assert "give --force to replace everything in this one" in again.err
    weight = Path(bundled.out)
    assert f"wrote 1 file to {tmp_path / 'run'}" in bundled.err
    assert weight.name == "model.gguf"
    assert weight.read_bytes() == gguf.read_bytes()
    assert json.loads((tmp_path / "run" / "config.json").read_bytes())["format"] == "gguf"
    again = modelpack("unpack", "team/tiny:v1", tmp_path / "run")
    assert again.code != 0
    assert succeed("unpack", "-f", "team/tiny:v1", tmp_path / "run").out == str(weight)


@pytest.mark.parametrize("place", ["store", "store/blobs", "store/new", "."])
@pytest.mark.parametrize("command", ["bundle", "export"])
def test_nothing_is_written_over_the_store(
    gguf: Path, tmp_path: Path, command: str, place: str
) -> None:
    home = tmp_path / "home"
    store = home / "store"
    succeed("package", "--store", store, "--gguf", gguf, "team/tiny:v1")
    place = f"{home}/{place}"
    to = [place] if command == "bundle" else ["-o", f"{place}/index.json"]
    if command == "export" and not Path(place).resolve().is_relative_to(store):
        to = ["-o", place]
    result = modelpack(command, "--store", store, "-f", "team/tiny:v1", *to)
    assert result.code == 2, result.err
    assert re.search("is inside|is the store|contains", result.err)
    assert "team/tiny:v1" in succeed("list", "--store", store).out
    succeed("fsck", "--store", store)


def test_tag_moves(gguf: Path, packaged: str, tmp_path: Path) -> None:
    other = succeed("package", "--gguf", gguf, "--context-size", "7", "team/other:v1").out
    assert succeed("tag", "team/other:v1", "team/tiny:v1").out == other
    assert succeed("inspect", "--json", "team/tiny:v1").json["digest"] == other


def test_rm(packaged: str) -> None:
    succeed("tag", "team/tiny:v1", "team/tiny:v2")
    first = succeed("rm", "team/tiny:v1")
    assert first.out == "Untagged: docker.io/team/tiny:v1"
    refused = modelpack("rm", "team/tiny:v1")
    assert refused.code == 3
    last = succeed("rm", "team/tiny:v2")
    assert last.out.splitlines() == [
        "Untagged: docker.io/team/tiny:v2",
        f"Deleted: {packaged}",
    ]
    assert succeed("gc", "--grace", "0").out == ""


def test_rm_by_id_needs_force_when_it_has_several_tags(packaged: str) -> None:
    succeed("tag", "team/tiny:v1", "team/tiny:v2")
    refused = modelpack("rm", packaged)
    assert refused.code == 7
    assert f"Deleted: {packaged}" in succeed("rm", "-f", packaged).out


def test_rm_goes_on_after_a_failure(packaged: str) -> None:
    succeed("tag", "team/tiny:v1", "team/tiny:v2")
    result = modelpack("rm", "team/tiny:v1", "nobody/nothing", "team/tiny:v2")
    assert result.code == 3
    assert result.out.splitlines() == [
        "Untagged: docker.io/team/tiny:v1",
        "Untagged: docker.io/team/tiny:v2",
        f"Deleted: {packaged}",
    ]
    assert result.err.count("error: no such model") == 1
    assert "freed" in result.err


def test_rm_reports_every_failure_in_json(packaged: str) -> None:
    result = modelpack("rm", "--json", "nobody/one", "team/tiny:v1", "nobody/two")
    assert result.code == 3
    value = json.loads(result.out)
    assert value["deleted"] == [packaged]
    assert [one["name"] for one in value["failed"]] == ["nobody/one", "nobody/two"]
    assert all("no such model" in one["error"] for one in value["failed"])
    assert json.loads(result.err.splitlines()[-1])["error"]["exitCode"] == 3


def test_rm_reports_what_it_removed_before_an_interruption(
    packaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = LayoutStore.remove

    def interrupted(store: LayoutStore, name: str, *, force: bool) -> Removal:
        if name == "interrupted":
            raise KeyboardInterrupt
        return remove(store, name, force=force)

    monkeypatch.setattr(LayoutStore, "remove", interrupted)
    result = modelpack("rm", "team/tiny:v1", "interrupted", "never")
    assert result.code == 130
    assert result.out.splitlines() == [
        "Untagged: docker.io/team/tiny:v1",
        f"Deleted: {packaged}",
    ]


def test_package_takes_a_path_without_an_option(gguf: Path, tmp_path: Path) -> None:
    named = succeed("package", "--gguf", str(gguf), "team/tiny:v1").out
    assert succeed("package", str(gguf), "team/tiny:v2").out == named
    directory = tiny_safetensors(tmp_path)
    named = succeed("package", "--safetensors-dir", str(directory), "team/dir:v1").out
    assert succeed("package", str(directory), "team/dir:v2").out == named


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{gguf}"], "hint: name the model too: modelpack package {gguf} NAME"),
        (["team/tiny"], "hint: give a PATH before REFERENCE"),
        (["{gguf}", "dir", "team/tiny"], "error: expected one PATH, got {gguf} and dir"),
        (["", "x"], "error: expected a path, got an empty text"),
        (["--safetensors-dir", "", "x"], "error: expected a path, got an empty text"),
        (["a" * 5000, "x"], "aaa: cannot be read: File name too long"),
        (["a" * 5000], "hint: give a PATH before REFERENCE"),
        (["s3://bucket/a", "x"], "hint: give --from s3://bucket/a"),
        (["--safetensors-dir", "gs://bucket/a", "x"], "hint: give --from gs://bucket/a"),
        (["--gguf", "{gguf}", "{gguf}", "x"], "hint: give --gguf or PATH, once"),
        (["{gguf}.not", "x"], "{gguf}.not: no such file"),
        (["{gguf}", "--adapter", "a", "--base", "b", "x"], "--adapter cannot be combined"),
    ],
)  # fmt: skip
def test_package_says_which_path_is_wrong(gguf: Path, arguments: list[str], says: str) -> None:
    failed = modelpack("package", *(argument.format(gguf=gguf) for argument in arguments))
    assert failed.code in (1, 2, 3)
    assert says.format(gguf=gguf) in failed.err


def test_fsck_finds_a_flipped_bit(packaged: str) -> None:
    assert succeed("fsck").out == ""
    path = Path(succeed("resolve", "team/tiny:v1").out)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    assert succeed("fsck", "--fast").out == ""  # sizes only
    found = modelpack("fsck")
    assert found.code == 5
    assert "team/tiny:v1" in found.out
    assert modelpack("resolve", "team/tiny:v1").code != 0


def test_store_before_and_after_the_command(gguf: Path, tmp_path: Path) -> None:
    store = tmp_path / "mine"
    succeed("--store", store, "package", "--gguf", gguf, "x:1")
    assert succeed("list", "--store", store).out.splitlines()[1].startswith("x:1")
    assert len(succeed("list").out.splitlines()) == 1


def test_a_directory_that_is_no_store_is_left_alone(gguf: Path, tmp_path: Path) -> None:
    home = tmp_path / "documents"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    result = modelpack("--store", home, "package", "--gguf", gguf, "x:1")
    assert result.code == 1
    assert str(home) in result.err
    assert sorted(path.name for path in home.iterdir()) == ["thesis.txt"]


@pytest.mark.parametrize("length", [5, 12, 64])
def test_inspect_by_id_shows_the_names(packaged: str, length: int) -> None:
    names = ["docker.io/team/other:v2", "docker.io/team/tiny:v1"]
    succeed("tag", "team/tiny:v1", "team/other:v2")
    text = packaged.removeprefix("sha256:")[:length]
    first = succeed("inspect", text).out.splitlines()[0]
    assert first.split() == ["Model:", f"{names[0]},", names[1]]
    value = succeed("inspect", "--json", text).json
    assert (value["reference"], value["references"]) == (None, names)
    value = succeed("inspect", "--json", "team/tiny:v1").json
    assert (value["reference"], value["references"]) == (names[1], names)


def test_inspect_by_id_of_a_model_without_a_name(packaged: str, gguf: Path) -> None:
    succeed("package", "--gguf", gguf, "--context-size", 7, "team/tiny:v1")
    short = packaged.removeprefix("sha256:")[:12]
    assert succeed("inspect", short[:6]).out.splitlines()[0].split() == ["Model:", short]
    assert succeed("inspect", "--json", short).json["references"] == []


READING = [
    *(["list"], ["inspect", "x"], ["inspect", "--header", "x"], ["manifest", "x"], ["config", "x"]),
    *(["resolve", "x"], ["bundle", "x", "out"], ["export", "x", "-o", "out"], ["push", "x"]),
    *(["referrers", "--local", "x"], ["index", "show", "x"], ["lint", "x"], ["rm", "x"]),
    *(["tag", "x", "y"], ["gc"], ["fsck"], ["diff", "x", "y"], ["sbom", "x"]),
]


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_a_mistyped_store_is_an_error_and_not_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = modelpack(*arguments, "--store", tmp_path / "typo")
    assert result.code, result.err
    assert f"there is no model store at {tmp_path / 'typo'}" in result.err
    assert list(tmp_path.iterdir()) == []


def test_reading_does_not_create_the_default_store(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "absent" / "store"
    monkeypatch.setenv("MODELPACK_STORE", str(store))
    assert succeed("list", "--json").json["models"] == []
    assert modelpack("inspect", "x").code == 3
    assert modelpack("resolve", "x").code == 3
    digest = succeed("package", "--dry-run", "--gguf", gguf, "x:1").out
    assert DIGEST.match(digest)
    assert not store.parent.exists()
    succeed("package", "--dry-run", "--gguf", gguf, "x:1", "--store", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert succeed("package", "--gguf", gguf, "x:1").out == digest
    assert (store / "oci-layout").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["inspect", "nobody/nothing"], 3, "nobody/nothing"),
        (["inspect", "UPPER//x"], 2, "invalid reference"),
        (["package", "x:1"], 2, "give a PATH before REFERENCE"),
        (["tag", "x:1", "https://registry.example/x:1"], 2, "hint: leave out the scheme"),
        (["pull", "s3://bucket/a"], 2, "hint: run modelpack import"),
        (["package", "--gguf", "/no/such/file.gguf", "x:1"], 3, "/no/such/file.gguf"),
        (["package", "--gguf", "a", "--dduf", "b", "x:1"], 2, "--dduf"),
        (["package", "--format", "zip", "--gguf", "a", "x:1"], 2, "zip"),
        (["package", "--annotation", "novalue", "--gguf", "a", "x:1"], 2, "KEY=VALUE"),
        (["package", "--push", "--dry-run", "--gguf", "a", "x:1"], 2, "--dry-run"),
        (["nonsense"], 2, "nonsense"),
        (["list", "--nonsense"], 2, "--nonsense"),
        (["rm"], 2, "Usage: modelpack rm [OPTIONS] MODEL..."),
        (["inspect", "./model.gguf"], 2, "hint: this is a path"),
        (["registry", "serve", "--host", "0.0.0.0"], 2, "or give --allow-anonymous to allow"),
        (["import", "--docker-store"], 2, "--all"),
    ],
)
def test_errors(arguments: list[str], code: int, says: str) -> None:
    result = modelpack(*arguments)
    assert result.code == code, result.err
    assert says in result.err
    assert result.out == ""
    assert "Traceback" not in result.err


def test_errors_as_json() -> None:
    result = modelpack("inspect", "--json", "nobody/nothing")
    assert result.code == 3
    error = json.loads(result.err)["error"]
    assert error["type"] == "NotFoundError"
    assert error["exitCode"] == 3


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in modelpack("inspect", "--debug", "nobody/nothing").err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    assert "_MODELPACK_COMPLETE" in succeed("completion", shell).out


def test_help_lists_commands_and_exit_codes() -> None:
    text = succeed("--help").out
    for word in ("package", "resolve", "Exit codes", "130  interrupted"):
        assert word in text


def test_every_command_has_help() -> None:
    from modelpack.cli.main import ALIASES, COMMANDS

    for name in [*COMMANDS, *ALIASES]:
        assert "Usage: modelpack" in succeed(name, "--help").out


def test_a_file_that_is_no_blob_has_its_own_hint(packaged: str, tmp_path: Path) -> None:
    store = LayoutStore()
    (store.root / "blobs" / "notes.txt").write_text("mine")
    result = modelpack("fsck", "--repair")
    assert result.code == 5
    assert "move the files that are no blobs out of the store" in result.err
    assert "package the models named above" not in result.err
