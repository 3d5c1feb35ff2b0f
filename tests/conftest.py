"""What all tests share."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.peers import REQUIRED, docker_registry, missing

ROOT = Path(__file__).parent.parent

# Tests get a home of their own; what is costly to fetch stays where the user's own is.
os.environ.setdefault("GOPATH", str(Path.home() / "go"))
os.environ.setdefault("GOCACHE", str(Path.home() / ".cache" / "go-build"))
os.environ.setdefault("CARGO_HOME", str(Path.home() / ".cargo"))
os.environ.setdefault("RUSTUP_HOME", str(Path.home() / ".rustup"))
os.environ.setdefault("MODELPACK_CACHE", str(ROOT / ".cache"))


# Machines that run tests are busy; a slow example is not a wrong one. `make test` tries few
# examples, `make test-long` more, or as many as a test asks for.
hypothesis.settings.register_profile("few", deadline=None, max_examples=20, stateful_step_count=30)
hypothesis.settings.register_profile("modelpack", deadline=None, max_examples=50)


def pytest_configure(config: pytest.Config) -> None:
    """Choose how many examples the properties are tried with."""
    few = "not long" in config.getoption("markexpr")
    hypothesis.settings.load_profile("few" if few else "modelpack")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Spare the garbage collector the tests themselves, which stay in memory until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After each file, spare the collector what stays: modules, caches and shared servers.

    An engine collects when it is closed, which took a second or more late in a run.
    """
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave cases of functions that have the mark `sample` to `make test-long`."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("long"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for every in cases.values():
        mark = every[0].get_closest_marker("sample")
        assert mark is not None
        chosen = {len(every) * index // mark.args[0] for index in range(mark.args[0])}
        for index, item in enumerate(every):
            if index not in chosen:
                item.add_marker(pytest.mark.long)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Take SIGINT: a shell's background jobs, and what they start, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB, to be filled."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", place], capture_output=True
    )
    if mounted.returncode:
        missing(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Paths for homes of tests; `tmp_path_factory` lists all that there are, for each."""
    parent = tmp_path_factory.mktemp("homes")
    return (parent / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, homes: Iterator[Path]) -> None:
    """Keep a user's own store, credentials and settings out of every test."""
    home = next(homes)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MODELPACK_STORE", str(home / "store"))
    for name in (
        "COSIGN_PASSWORD",
        "DEFAULT_REGISTRY",
        "DOCKER_CONFIG",
        "INSECURE_REGISTRY",
        "MODELPACK_MIRRORS",
        "MODELPACK_PASSWORD",
        "MODELPACK_POLICY",
        "MODELPACK_REGISTRY",
        "MODELPACK_USERNAME",
        "MODELS_PATH",
        "REGISTRY_AUTH_FILE",
        "SOURCE_DATE_EPOCH",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "XDG_RUNTIME_DIR",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "no_proxy",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def registry_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The host:port of a docker-registry that the whole run shares."""
    with docker_registry(tmp_path_factory.mktemp("docker-registry")) as host:
        yield host


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where peers are required, a skipped test has failed: nothing passes by not running."""
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and MODELPACK_REQUIRE_PEERS is set"
    return report
