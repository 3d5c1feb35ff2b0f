"""Headers of remote weights are read by a few ranges, and equal those of the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import modelpack
from modelpack.errors import NotFoundError, PartialModelError, WeightFormatError
from modelpack.formats.gguf import GGUFHeader
from modelpack.formats.safetensors import SafetensorsHeader
from modelpack.operations.headers import read_headers
from modelpack.operations.pull import Part, Selection
from modelpack.registry_server import RegistryServer, RequestRecord
from modelpack.testing import registry
from tests.cli.running import succeed
from tests.models import tiny_gguf
from tests.operations.conftest import Published, Records
from tests.registry.faults import flipped_bit, ignoring_range
from tests.registry.faulty import FaultyRegistry

MIB = 1024 * 1024


def big_safetensors(directory: Path) -> Path:
    """A model of 48 MiB with one tensor."""
    directory.mkdir()
    size = 48 * MIB
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    (directory / "config.json").write_text('{"model_type":"llama"}')
    return directory


@dataclass
class Hosted:
    """A model in a registry that counts requests."""

    server: RegistryServer
    reference: str
    records: Records

    def asked(self) -> list[RequestRecord]:
        return self.records.settled(self.server)


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """A remote model of 48 MiB."""
    path = tmp_path_factory.mktemp("big")
    records = Records()
    with registry(path / "registry", on_request=records.add) as server:
        reference = f"{server.host}/team/big:v1"
        request = modelpack.PackageRequest(safetensors_dir=big_safetensors(path / "model"))
        modelpack.package(reference, request, push=True, store=modelpack.Store(path / "store"))
        yield Hosted(server, reference, records)


@pytest.fixture
def big(hosted: Hosted) -> Hosted:
    hosted.records.forget(hosted.server)
    return hosted


def test_a_remote_header_costs_a_few_ranges(big: Hosted) -> None:
    [read] = read_headers(big.reference, from_registry=True)
    assert isinstance(read.header, SafetensorsHeader)
    assert read.header.tensors[0].size == 48 * MIB
    got = [record for record in big.asked() if "/blobs/" in record.path and record.status == 206]
    assert len(got) == read.requests <= 3
    assert sum(record.sent for record in big.asked()) < MIB
    assert sum(record.sent for record in got) == read.bytes_fetched < MIB


def test_inspecting_a_remote_model_reads_no_layer(big: Hosted) -> None:
    assert modelpack.inspect(big.reference, from_registry=True).manifest.total_size > 48 * MIB
    assert sum(record.sent for record in big.asked()) < 16 * 1024
    assert len(big.asked()) <= 3


@pytest.mark.parametrize("ranges", [True, False])
def test_gguf_as_from_the_file(tmp_path: Path, ranges: bool) -> None:
    store = modelpack.Store(tmp_path / "store")
    with FaultyRegistry() as server:
        if not ranges:
            server.faults.add("GET", "/blobs/sha256:", ignoring_range, times=None)
        reference = f"{server.host}/team/tiny:v1"
        request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))
        modelpack.package(reference, request, push=True, store=store)
        [here] = read_headers(reference, store=store)
        [there] = read_headers(reference, from_registry=True)
    assert isinstance(here.header, GGUFHeader)
    assert (here.header, here.bytes_fetched, here.requests) == (there.header, 0, 0)
    assert there.bytes_fetched == here.header.file_size


def test_a_damaged_header_is_told_with_its_byte(tmp_path: Path) -> None:
    with FaultyRegistry() as server:
        reference = f"{server.host}/team/tiny:v1"
        request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))
        made = modelpack.package(
            reference, request, push=True, store=modelpack.Store(tmp_path / "store")
        )
        path = f"/blobs/{made.manifest.layers[0].digest}"
        server.faults.add("GET", path, flipped_bit(0), times=None)
        with pytest.raises(WeightFormatError, match=r"tiny\.gguf at byte 0"):
            read_headers(reference, from_registry=True)


def test_files_are_chosen(published: Published) -> None:
    name = published.reference
    [read] = read_headers(name, files=["model.safetensors"], from_registry=True)
    assert read.file.filepath == "model.safetensors"
    assert read_headers(name, files=["LICENSE"], from_registry=True) == ()
    with pytest.raises(NotFoundError):
        read_headers(name, files=["other.gguf"], from_registry=True)
    modelpack.pull(name, selection=Selection(only=Part.CONFIG), store=published.store)
    with pytest.raises(PartialModelError):
        read_headers(name, store=published.store)


def test_the_command(big: Hosted) -> None:
    text = succeed("inspect", "--remote", "--header", big.reference).out
    assert "model.safetensors: safetensors" in text
    assert text.splitlines()[-1].split() == ["w", "U8", "50331648"]
    [header] = succeed("inspect", "-r", "--header", "--json", big.reference).json["headers"]
    assert header["tensors"] == [
        {"name": "w", "dtype": "U8", "shape": [48 * MIB], "offset": 0, "size": 48 * MIB}
    ]
    assert header["bytesFetched"] < MIB
    assert sum(record.sent for record in big.asked()) < 2 * MIB
