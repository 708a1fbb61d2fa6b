"""A cache of keys and values that is filled in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, cache_utils

# transformers' own annotations change from version to version.
_DynamicLayer: Any = cache_utils.DynamicLayer


class _BufferedLayer(_DynamicLayer):  # type: ignore[misc]
    """A cache layer in a buffer of known length, so that no token copies the past."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.used = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of further positions; return those of all positions."""
        # Under autocast, a rotary embedding can convert the keys to float32; each later token would
        # convert all of them back.
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            n, heads, _, width = key_states.shape
            self.lazy_initialization(key_states, value_states)
            self.key_buffer = key_states.new_empty(n, heads, self.length, width)
            self.value_buffer = value_states.new_empty(
                n, heads, self.length, value_states.shape[-1]
            )
        start, self.used = self.used, self.used + key_states.shape[-2]
        self.key_buffer[:, :, start : self.used] = key_states
        self.value_buffer[:, :, start : self.used] = value_states
        self._show()
        return self.keys, self.values

    def reorder_cache(self, rows: Tensor) -> None:
        """Select texts by their rows."""
        if not self.is_initialized:  # A layer that reads another layer's keys never is.
            return
        rows = rows.to(self.key_buffer.device)  # Layers may lie on several devices.
        self.key_buffer = self.key_buffer[rows]
        self.value_buffer = self.value_buffer[rows]
        self._show()

    def _show(self) -> None:
        self.keys = self.key_buffer[:, :, : self.used]
        self.values = self.value_buffer[:, :, : self.used]


def buffered_cache(config: Any, length: int) -> Any:
    """Return transformers' cache for `config`, with buffers of `length` for growing layers."""
    cache = DynamicCache(config=config)
    cache.layers = [_BufferedLayer(length) if type(x) is _DynamicLayer else x for x in cache.layers]
    return cache
