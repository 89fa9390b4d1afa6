"""Attention whose every query is computed in the same way, whatever else is in the step.

A query's tile and the keys it is multiplied with follow from its position alone: tiles of queries
and of keys begin at multiples of their size, and places that this step does not compute are filled
with zeros. So a decoded token, the same token within a prefill and its recomputation elsewhere have
the same bits. Slower than `attention`, which batches by length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from services.shard.attention import ScoreRules, cap, gather
from services.shard.attention_plan import CPU_LIMITS
from services.shard.scratch import Scratch

# The second is a multiple of the first: all queries of a tile see the same tiles of keys.
QUERY_TILE = 8
KEY_TILE = 64

Ints = npt.NDArray[np.int64]
_F32 = torch.float32


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Query tiles with equally many keys."""

    num_tiles: int
    num_keys: int
    # Packed tokens [n], and each one's place among the queries of the tiles [n].
    tokens: torch.Tensor
    places: torch.Tensor
    # Rows of a pool seen as [tokens * num_kv_heads, head_dim]: [tiles * num_kv_heads * num_keys]
    gather: torch.Tensor
    # True where a query must not see a key: [tiles, 1, 1, QUERY_TILE, num_keys]
    hidden: torch.Tensor


@dataclass(slots=True)
class TiledLayout:
    """One step's rows, packed one after another; gives the groups for each window once.

    Args: as of AttentionLayout.
    """

    block_tables: Ints
    query_lens: Ints
    context_lens: Ints
    block_size: int
    num_kv_heads: int
    head_dim: int
    _groups: dict[int | None, list[TileGroup]] = field(default_factory=dict)

    def groups(self, window: int | None) -> list[TileGroup]:
        """For layers that see the last `window` tokens, or all."""
        if window not in self._groups:
            self._groups[window] = self._build(window)
        return self._groups[window]

    def _build(self, window: int | None) -> list[TileGroup]:
        row = np.repeat(np.arange(len(self.query_lens)), self.query_lens)
        ends = np.cumsum(self.query_lens)
        first = self.context_lens - self.query_lens
        position = np.arange(len(row)) - np.repeat(ends - self.query_lens - first, self.query_lens)
        # Tokens of one row follow one another, so equal neighbours are one tile.
        keys = np.stack((row, position // QUERY_TILE))
        begins = np.append(True, (np.diff(keys) != 0).any(axis=0))
        tile = np.cumsum(begins) - 1
        tile_row, tile_start = row[begins], keys[1][begins] * QUERY_TILE
        low = np.zeros_like(tile_start)
        if window is not None:
            low = np.maximum(0, tile_start - window + 1) // KEY_TILE * KEY_TILE
        num_keys = (tile_start // KEY_TILE + 1) * KEY_TILE - low
        groups = []
        for count in np.unique(num_keys).tolist():
            same = np.flatnonzero(num_keys == count)
            most = max(1, CPU_LIMITS.gathered // (self.num_kv_heads * self.head_dim * count))
            for begin in range(0, len(same), most):
                chosen = same[begin : begin + most]
                tokens = np.flatnonzero(np.isin(tile, chosen))
                places = np.searchsorted(chosen, tile[tokens]) * QUERY_TILE
                places += position[tokens] % QUERY_TILE
                rows = (tile_row[chosen], tile_start[chosen], low[chosen])
                groups.append(self._group(tokens, places, *rows, count, window))
        return groups

    def _group(
        self,
        tokens: Ints,
        places: Ints,
        rows: Ints,
        starts: Ints,
        low: Ints,
        num_keys: int,
        window: int | None,
    ) -> TileGroup:
        key_at = low[:, None] + np.arange(num_keys)
        query_at = starts[:, None] + np.arange(QUERY_TILE)
        hidden = key_at[:, None, :] > query_at[:, :, None]
        if window is not None:
            hidden |= key_at[:, None, :] <= query_at[:, :, None] - window
        # What is not there yet repeats the row's last token: finite memory that is the row's own.
        read = np.minimum(key_at, self.context_lens[rows][:, None] - 1)
        blocks = self.block_tables[rows[:, None], read // self.block_size]
        slots = blocks * self.block_size + read % self.block_size
        heads = np.arange(self.num_kv_heads)[None, :, None]
        return TileGroup(
            len(rows),
            num_keys,
            torch.from_numpy(tokens),
            torch.from_numpy(places),
            torch.from_numpy((slots[:, None, :] * self.num_kv_heads + heads).reshape(-1)),
            torch.from_numpy(hidden[:, None, None]),
        )


def attend_tiled(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    layout: TiledLayout,
    rules: ScoreRules,
    sliding_window: int | None,
    scratch: Scratch,
) -> torch.Tensor:
    """As `attention.attend`, on a CPU; queries past the layout's tokens get zeros."""
    if rules.sinks is not None:
        raise AssertionError("no model that is served in deterministic mode has sinks")
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for group in layout.groups(sliding_window):
        mixed = _mix(q, k_pool, v_pool, group, rules, scratch)
        out.index_copy_(0, group.tokens, mixed[group.places].to(q.dtype))
    return out


def _mix(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    group: TileGroup,
    rules: ScoreRules,
    scratch: Scratch,
) -> torch.Tensor:
    """[tiles * QUERY_TILE, num_heads, head_dim]"""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_pool.shape[2]
    shared = num_heads // num_kv_heads
    tiles, num_keys = group.num_tiles, group.num_keys
    batch, height = tiles * num_kv_heads, shared * QUERY_TILE
    query = scratch.take("queries", (tiles * QUERY_TILE, num_heads, head_dim), _F32).zero_()
    query.index_copy_(0, group.places, q[group.tokens].to(_F32) * rules.scale)
    query = query.view(tiles, QUERY_TILE, num_kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(batch, height, head_dim)
    keys = gather(k_pool.view(-1, head_dim), group.gather, scratch)
    scores = scratch.take("scores", (batch, height, num_keys), _F32)
    torch.bmm(query, keys.view(batch, num_keys, head_dim).transpose(1, 2), out=scores)
    scores = scores.view(tiles, num_kv_heads, shared, QUERY_TILE, num_keys)
    cap(scores, rules)
    scores.masked_fill_(group.hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1).view(batch, height, num_keys)
    values = gather(v_pool.view(-1, head_dim), group.gather, scratch)
    mixed = torch.bmm(weights, values.view(batch, num_keys, head_dim))
    mixed = mixed.view(tiles, num_kv_heads, shared, QUERY_TILE, head_dim).permute(0, 3, 1, 2, 4)
    return mixed.reshape(tiles * QUERY_TILE, num_heads, head_dim)
