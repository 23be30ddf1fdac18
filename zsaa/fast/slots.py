"""A pruned cache whose rows lie in tensors with room for more, so that a new token is written and nothing is moved.

Layers hold different numbers of rows, and each has room of its own. Where they lie stands in a table, which the kernels
of kernels/decode.py read. Whoever looks at a layer sees its rows alone; whoever changes them (crops, reorders) gets a
plain PrunedLayer, and slots that anybody has seen are not written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zsaa.cache import PrunedLayer
from zsaa.fast import dispatch

CHUNK = 256  # rows that one program of the kernels looks at: kernels/decode.py
LEAST = 256  # rows of room beside those that are there, or an eighth of those


@dataclass
class Room:
    """keys, values [batch, kv_heads, room, dim]; columns int64 [batch, room]."""

    keys: Tensor
    values: Tensor
    columns: Tensor

    def __post_init__(self):
        self.size = self.columns.shape[1]


def _held(name: str) -> property:
    def get(self):
        held = getattr(self.room, name)
        return held.narrow(-1 if name == "columns" else -2, 0, self.rows)

    def put(self, value):
        held = {each: getattr(self, each) for each in ("keys", "values", "columns")}
        del self.room, self.rows
        self.__class__ = PrunedLayer
        vars(self).update({**held, name: value})

    return property(get, put)


class RoomyLayer(PrunedLayer):
    """A PrunedLayer whose `rows` rows are the first of its `room`."""

    room: Room
    rows: int
    keys: Any = _held("keys")
    values: Any = _held("values")
    columns: Any = _held("columns")
    pruned = True

    def get_seq_length(self) -> int:
        return self.seen


def settle(layers: Sequence[PrunedLayer]) -> None:
    """Give each layer room for one more row at least."""
    for layer in layers:
        rows = layer.rows if isinstance(layer, RoomyLayer) else layer.columns.shape[1]
        if isinstance(layer, RoomyLayer) and rows < layer.room.size:
            continue
        size, (batch, heads, _, dim) = rows + max(LEAST, rows // 8), layer.keys.shape
        room = Room(
            layer.keys.new_empty(batch, heads, size, dim),
            layer.values.new_empty(batch, heads, size, dim),
            layer.columns.new_empty(batch, size),
        )
        for name in ("keys", "values", "columns"):
            getattr(room, name).narrow(-1 if name == "columns" else -2, 0, rows).copy_(getattr(layer, name))
            vars(layer).pop(name, None)
        layer.__class__ = RoomyLayer
        vars(layer).update(room=room, rows=rows)


def lines(layers: Sequence[RoomyLayer]) -> list[list[int]]:
    """The table for one more row in each layer: see kernels/decode.py."""
    return [
        [r.keys.data_ptr(), r.values.data_ptr(), r.columns.data_ptr(), layer.rows, r.size, layer.seen]
        for layer, r in ((layer, layer.room) for layer in layers)
    ]


def advance(layers: Sequence[RoomyLayer], by: int = 1) -> None:
    """The row that the kernels have written into each layer is there."""
    for layer in layers:
        layer.rows += by
        layer.seen += by
        layer.removable += by


class Slots:
    """What the layers of one decoding step ask: where to write, and where to look.

    table: int64 [layers, FIELDS] on the device; chunks: the most chunks of keys that a layer may hold.
    """

    def __init__(self, table: Tensor, chunks: int):
        self.table, self.chunks = table, chunks

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, tables, *, window: int | None, scale: float, softcap, **_
    ) -> Tensor:
        """The new row joins `layer` and looks at all that is there: [batch, 1, heads x head_dim]. q, k, v [batch,
        heads, 1, head_dim], not turned yet."""
        kernels: Any = dispatch.step_kernels(q)
        q = kernels.append(q, k, v, tables, self.table, layer)
        return kernels.attend(
            q, k.shape[1], self.table, layer, self.chunks, scale=scale, softcap=softcap, window=window
        )
