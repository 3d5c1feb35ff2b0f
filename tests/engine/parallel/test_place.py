"""The rank of a process, from the environment variables of launchers."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from modelpack_engine.distributed.group import Place, find_place
from modelpack_engine.distributed.launch import PTX_DIRECTORY, separate
from modelpack_engine.errors import EngineError


def test_no_launcher() -> None:
    assert find_place({}) is None


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"NCCL_HOST_IP": "10.0.0.1", "MLX_RANK": "3"}, Place(3, "nccl", "10.0.0.1")),
        (
            {"MLX_JACCL_COORDINATOR": "10.0.0.2:4000", "MLX_RANK": "0"},
            Place(0, "jaccl", "10.0.0.2"),
        ),
        (
            {"NCCL_HOST_IP": "10.0.0.1", "MLX_RANK": "1", "MODELPACK_CHANNEL_HOST": "10.9.9.9"},
            Place(1, "nccl", "10.9.9.9"),
        ),
    ],
)
def test_launchers(environment: dict[str, str], place: Place) -> None:
    assert find_place(environment) == place


def test_a_ring_names_rank_0_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text('[["192.168.1.5:32323", "192.168.2.5:32324"], ["192.168.1.6:32325"]]\n')
    environment = {"MLX_RANK": "1", "MLX_HOSTFILE": str(path)}
    assert find_place(environment) == Place(1, "ring", "192.168.1.5")


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "[[]]", "3"])
def test_files_that_name_nobody(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EngineError, match="MLX_HOSTFILE"):
        find_place({"MLX_RANK": "1", "MLX_HOSTFILE": str(path)})


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"MLX_RANK": "-1", "NCCL_HOST_IP": "::1"}, "MLX_RANK is '-1'"),
        ({"MLX_RANK": "one", "NCCL_HOST_IP": "::1"}, "MLX_RANK is 'one'"),
        ({"MLX_RANK": "1"}, "neither MLX_HOSTFILE"),
        ({"MLX_RANK": "1", "MLX_HOSTFILE": ""}, "neither MLX_HOSTFILE"),
    ],
)
def test_environments_that_make_no_sense(environment: dict[str, str], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        find_place(environment)


def test_ranks_do_not_share_files_of_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    found = []
    for rank in range(3):
        environment = {PTX_DIRECTORY: "/kernels"}
        separate(rank, environment)
        found.append(environment)
    assert found[0] == {PTX_DIRECTORY: "/kernels"}
    assert found[1] == {
        PTX_DIRECTORY: "/kernels/rank-1",
        "TMPDIR": str(tmp_path / "modelpack" / "ranks" / "1"),
    }
    assert found[2] != found[1]
    assert all(Path(environment["TMPDIR"]).is_dir() for environment in found[1:])
    environment = {}
    separate(1, environment)
    assert set(environment) == {"TMPDIR"}
