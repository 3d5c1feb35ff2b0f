"""Adapters of a model that is divided between ranks: each has its part of their matrices.

Rank 0 reads an adapter's file, compares it with the whole model, and sends the matrices of each
layer to the followers, which keep what they need. Nothing is in a slot until all ranks have all
layers. If a rank cannot keep its part, all forget the adapter.

    ADAPTER_NORMS  respond with the squares of this rank's weights with A and B added (DoRA)
    ADAPTER_LAYER  keep this rank's part of a layer's matrices; respond
    ADAPTER        put the layers into a slot, or free it if there are none; respond
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack.formats.adapter import Adapter, AdapterError
from modelpack_engine.attention.metadata import AdapterRows
from modelpack_engine.distributed.channel import MAX_BODY, Kind, LeaderChannel, WireError
from modelpack_engine.distributed.sharding import Divisions
from modelpack_engine.models.adapter import read_layers
from modelpack_engine.patches.lora import Layers, LoRALayers, Matrices, dense_weight, nbytes
from modelpack_engine.runner.adapters import AdapterSet


def pack_layer(number: int, layer: str, matrices: Matrices) -> bytes:
    """Return the body of ADAPTER_NORMS and ADAPTER_LAYER: safetensors."""
    file = io.BytesIO()
    mx.save_safetensors(file, matrices.arrays(), metadata={"number": str(number), "layer": layer})
    return file.getvalue()


def unpack_layer(body: bytes) -> tuple[int, str, Matrices]:
    """Return the number of the request, the layer and its matrices; raises `WireError`."""
    try:
        loaded: Any = mx.load(io.BytesIO(body), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        number, layer = int(metadata["number"]), metadata["layer"]
        matrices = Matrices(**arrays)
        mx.eval(list(arrays.values()))
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        raise WireError(f"the layer of an adapter is invalid: {error}") from error
    return number, layer, matrices


class AdapterParts:
    """A rank's parts of the adapters in its slots, and of the one that arrives layer by layer."""

    def __init__(self, model: nn.Module, rows: AdapterRows, divisions: Divisions) -> None:
        self._modules, self._divisions = dict(model.named_modules()), divisions
        self.layers = LoRALayers(model, rows)
        self._arriving: dict[str, Matrices] = {}

    def squares(self, layer: str, a: mx.array, b: mx.array) -> tuple[list[int], list[float]]:
        """Return the sums of squares of this rank's weights with A and B added, by output.

        The outputs are given by index. A rank with some of the inputs has a part of each sum.
        """
        division = self._divisions[layer]
        part = division.part(Matrices(a, b))
        weight = dense_weight(self._modules[layer]) + (part.a @ part.b).T
        rows = mx.arange(weight.shape[0]) if division.rows is None else division.rows
        return rows.tolist(), mx.sum(mx.square(weight), axis=1).tolist()  # type: ignore[return-value]

    def keep(self, layer: str, whole: Matrices) -> None:
        """Keep this rank's part of a layer's matrices for the next `place`."""
        part = self._divisions[layer].part(whole)
        # A part that is a view would keep the whole matrix in memory.
        arrays = {name: mx.contiguous(array) for name, array in part.arrays().items()}
        mx.eval(list(arrays.values()))
        self._arriving[layer] = Matrices(**arrays)

    def place(self, slot: int, count: int) -> int:
        """Put the `count` layers that were kept into a slot; return their bytes."""
        layers, self._arriving = self._arriving, {}
        if count and len(layers) != count:
            raise WireError(f"an adapter of {count} layers, but {len(layers)} arrived")
        self.layers.set(slot, layers if count else {})
        return nbytes(layers.values()) if count else 0


class DividedAdapters(AdapterSet):
    """The adapters of a model on all ranks, at rank 0.

    `number` returns that of a new request on the channel.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        rows: AdapterRows,
        max_loaded: int,
        divisions: Divisions,
        channel: LeaderChannel,
        number: Callable[[], int],
    ) -> None:
        super().__init__(model, config, rows, max_loaded)
        self._divisions, self._channel, self._number = divisions, channel, number
        self._parts = AdapterParts(model, rows, divisions)
        self._layers = self._parts.layers

    def read(self, adapter: Adapter) -> Layers:
        """Return the whole matrices of an adapter."""
        shapes = {path: division.shape for path, division in self._divisions.items()}
        return read_layers(adapter, self._model, self._config, norm_of=self._norm_of, shapes=shapes)

    def place(self, slot: int, layers: Layers) -> int:
        """Put an adapter into a slot on all ranks; raise the error of a rank that cannot."""
        for name, matrices in layers.items():
            if matrices.nbytes > MAX_BODY - (1 << 16):
                raise AdapterError(
                    f"{name}: {matrices.nbytes} bytes of an adapter are too many for several "
                    "devices",
                    hint="merge the adapter (--merge), or use one device",
                )
        try:
            for name, matrices in layers.items():
                self._ask(Kind.ADAPTER_LAYER, name, matrices)
                self._parts.keep(name, matrices)
            return self._place(slot, len(layers))
        except BaseException:
            self._place(slot, 0)  # the layers that arrived must not be part of the next adapter
            raise

    def _place(self, slot: int, count: int) -> int:
        number = self._number()
        self._channel.send(Kind.ADAPTER, {"number": number, "slot": slot, "layers": count})
        self._channel.gather(number)
        return self._parts.place(slot, count)

    def _norm_of(self, layer: str, a: mx.array, b: mx.array) -> mx.array:
        """Return the norms of a layer's whole weight with A and B added, by output."""
        division = self._divisions[layer]
        found = [self._parts.squares(layer, a, b)]
        if division.rows is not None or division.columns is not None:
            answers = self._ask(Kind.ADAPTER_NORMS, layer, Matrices(a, b), rows=list, squares=list)
            found += [(answer["rows"], answer["squares"]) for answer in answers]
        squares = mx.zeros((division.shape[-2],))
        for rows, values in found:
            if division.columns is not None:
                squares = squares + mx.array(values, mx.float32)
            else:
                squares[mx.array(rows, mx.int32)] = mx.array(values, mx.float32)
        return mx.sqrt(squares)

    def _ask(
        self, kind: Kind, layer: str, matrices: Matrices, **types: type
    ) -> list[dict[str, Any]]:
        number = self._number()
        self._channel.send(kind, pack_layer(number, layer, matrices))
        return self._channel.gather(number, **types)
