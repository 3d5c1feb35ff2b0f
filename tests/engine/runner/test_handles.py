"""Handles reach the attention function, or an error is raised."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from mlx_lm.models.base import scaled_dot_product_attention

from modelpack_engine.attention.cache_handle import (
    KVHandle,
    LostHandleError,
    make_row_mask,
)
from modelpack_engine.attention.gather import native_attention
from modelpack_engine.attention.kv_pools import KVLayout
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.patches.functions import install
from tests.engine.runner.models import prefill

LAYOUT = KVLayout(1, 8, 1, 8, mx.float32)


@pytest.fixture
def paged() -> PagedKV:
    install()
    step = StepInputs(16, exact=True)
    step.begin(prefill(0, [1, 2, 3], [1]), [2])
    return PagedKV(LAYOUT, step, num_blocks=3)


def rows(dim: int = 8) -> mx.array:
    return mx.random.normal((3, 1, 1, dim))


def attend(keys: mx.array, values: mx.array, mask: mx.array | None = None) -> mx.array:
    return scaled_dot_product_attention(rows(), keys, values, cache=None, scale=1.0, mask=mask)


def test_installed_once() -> None:
    install()
    wrapper = mx.fast.scaled_dot_product_attention
    install()
    assert mx.fast.scaled_dot_product_attention is wrapper
    assert wrapper is not native_attention


def test_attention_without_handles_is_native() -> None:
    install()
    q, k, v = (mx.random.normal((1, 2, 5, 8)) for _ in range(3))
    expected = native_attention(q, k, v, scale=0.5, mask="causal")
    found = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask="causal")
    assert mx.array_equal(found, expected).item()


def test_handles_are_the_rows(paged: PagedKV) -> None:
    keys = rows()
    handle, _ = paged.update_and_fetch(keys, rows())
    assert handle.shape == keys.shape
    assert handle.dtype == keys.dtype
    assert mx.array_equal(handle, keys).item()


def test_attended_once_or_twice(paged: PagedKV) -> None:
    keys, values = paged.update_and_fetch(rows(), rows())
    assert attend(keys, values).shape == (3, 1, 1, 8)
    assert attend(keys, values).shape == (3, 1, 1, 8)
    paged.close()


def test_cast_handles_stay_handles(paged: PagedKV) -> None:
    keys, values = paged.update_and_fetch(rows(), rows())
    assert attend(keys.astype(mx.float32), values).dtype == mx.float32
    paged.close()


def test_shared_keys_are_handed_out_again(paged: PagedKV) -> None:
    with pytest.raises(LostHandleError):
        paged.keys_and_values()
    made = paged.update_and_fetch(rows(), rows())
    assert paged.keys_and_values() == made
    attend(*made)
    paged.close()
    with pytest.raises(LostHandleError):
        paged.keys_and_values()


Use = Callable[[KVHandle, KVHandle], object]


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda k, v: attend(k + 0, v), id="keys computed with"),
        pytest.param(lambda k, v: attend(k, v * 2), id="values computed with"),
        pytest.param(lambda k, v: attend(v, k), id="exchanged"),
        pytest.param(lambda k, v: attend(k, k), id="keys as values"),
        pytest.param(lambda k, v: attend(k.swapaxes(-1, -2), v), id="transposed"),
        pytest.param(lambda k, v: attend(k, v, mx.array([True])), id="a mask of its own"),
        pytest.param(lambda k, v: rows() @ k.swapaxes(-1, -2), id="multiplied by hand"),
        pytest.param(lambda k, v: rows() @ v, id="multiplied without transposing"),
    ],
)
def test_lost_handle_raises_at_once(paged: PagedKV, use: Use) -> None:
    handles = paged.update_and_fetch(rows(), rows())
    with pytest.raises(LostHandleError) as raised:
        use(*handles)
    assert raised.value.cache is paged


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda k, v: attend(k + 0, v + 0), id="attended elsewhere"),
        pytest.param(lambda k, v: k.sum() + v.sum(), id="never attended"),
        pytest.param(lambda k, v: mx.repeat(k, 2, axis=1), id="repeated"),
    ],
)
def test_lost_handle_raises_at_the_end_of_the_step(paged: PagedKV, use: Use) -> None:
    use(*paged.update_and_fetch(rows(), rows()))
    with pytest.raises(LostHandleError) as raised:
        paged.close()
    assert raised.value.cache is paged


def test_second_update_without_attention_raises(paged: PagedKV) -> None:
    paged.update_and_fetch(rows(), rows())
    with pytest.raises(LostHandleError):
        paged.update_and_fetch(rows(), rows())


def test_masks_say_what_was_asked_for(paged: PagedKV) -> None:
    assert paged.make_mask(1) is None
    mask = paged.make_mask(1, window_size=2)
    assert mask is not None
    assert (mask.window, mask.cache_window) == (2, None)
    with pytest.raises(LostHandleError):
        attend(rows(), rows(), make_row_mask(2, None, False))


def test_reflected_product_carries_the_queries(paged: PagedKV) -> None:
    """Python asks a subclass's reflected operator first: latent attention depends on it."""
    keys, values = paged.update_and_fetch(rows(), rows())
    queries = rows()
    scores = queries @ values.swapaxes(-1, -2)
    assert scores.queries is queries  # type: ignore[attr-defined]
    assert attend(keys, keys, scores).shape == (3, 1, 1, 8)
    paged.close()
