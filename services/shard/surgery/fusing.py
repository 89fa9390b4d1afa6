"""Where a fused module may stand in for a model's own: where both were seen to compute the same.

A module is a candidate by its parts alone. Every way in which they might go together is tried on
noise beside the module itself; what none of them repeats stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from services.shard.footprint import WithoutParameters, footprint
from services.shard.forward import PagedContext
from services.shard.kernels.elementwise import GATES, Elementwise
from services.shard.kernels.layers import LayerParts, Norm, Room
from services.shard.kernels.library import Library
from services.shard.surgery.fused import (
    FusedAttention,
    FusedLayer,
    FusedMlp,
    FusedNorm,
    Gated,
    HeadRules,
)
from services.shard.surgery.packed import PackedLinear
from services.shard.surgery.stacking import stack
from services.shard.surgery.trial import NUM_TOKENS, agree, given, given_to, one_page
from services.shard.surgery.watching import NoPages

_ACTIVATIONS = tuple({kernel: name for name, kernel in GATES.items()}.values())


class Fusing:
    """Fuses what it can of a model in float32 whose matrices are packed."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._kernels = Elementwise(library, torch.float32)
        self._room = Room()
        self.counts = {"norms": 0, "mlps": 0, "attentions": 0, "layers": 0, "stacked": 0}
        self._draw = torch.Generator().manual_seed(0)

    def run(self, model: Any) -> None:
        """From the inside out: what is fused is part of what may be."""
        with torch.inference_mode():
            for kind, find in (
                ("norms", self._norm),
                ("mlps", self._mlp),
                ("attentions", lambda module: self._attention(model, module)),
                ("layers", lambda module: self._layer(model, module)),
            ):
                for path, module in list(model.named_modules()):
                    fused = find(module)
                    if fused is not None:
                        _take_over(fused, module)
                        model.set_submodule(path, fused)
                        self.counts[kind] += 1
            self.counts["stacked"] = stack(self._library, self._room, model)

    def _norm(self, module: Any) -> nn.Module | None:
        parameters = dict(module.named_parameters())
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or not eps:
            return None
        weight = parameters["weight"]
        x = self._noise(NUM_TOKENS, len(weight))
        wanted = module(x)
        for offset in (0.0, 1.0):
            fused = FusedNorm(self._kernels, weight, float(eps), offset)
            if agree(fused(x), wanted):
                return fused
        return None

    def _mlp(self, module: nn.Module) -> nn.Module | None:
        linears = [child for child in module.children() if isinstance(child, PackedLinear)]
        shared = list(dict.fromkeys(linear.shared for linear in linears))
        others = [child for child in module.children() if child not in linears]
        if len(shared) != 2 or any(True for other in others for _ in other.parameters()):
            return None
        for both, down in itertools.permutations(one.matrix for one in shared):
            halves = len(both.sizes) == 2 and both.sizes[0] == both.sizes[1]
            if not (halves or len(both.sizes) == 1) or len(down.sizes) != 1:
                continue
            if both.num_rows != 2 * down.num_columns or both.num_columns != down.num_rows:
                continue
            x = self._noise(1, NUM_TOKENS, both.num_columns)
            with given_to(down, linears) as hidden:
                wanted = given(module, x)
            if wanted is None or not hidden or not agree(down.multiply(hidden[0]), wanted[0]):
                continue
            for activation, gate_first in itertools.product(_ACTIVATIONS, (True, False)):
                fused = FusedMlp(self._kernels, both, down, Gated(activation, gate_first))
                if agree(fused.hidden(x), hidden[0]):
                    return fused
        return None

    def _attention(self, model: Any, module: Any) -> nn.Module | None:
        linears = [child for child in module.children() if isinstance(child, PackedLinear)]
        shared = list(dict.fromkeys(linear.shared for linear in linears))
        layer = getattr(module, "layer_idx", None)
        if layer is None or sorted(len(one.matrix.sizes) for one in shared) != [1, 3]:
            return None
        out, qkv = sorted((one.matrix for one in shared), key=lambda matrix: len(matrix.sizes))
        hidden = self._noise(1, NUM_TOKENS, qkv.num_columns)
        tables = _tables(model, module, hidden)
        seen = _Seen()
        wanted = given(module, hidden, tables, None, paged=seen)
        if wanted is None or seen.q is None or tables is None:
            return None
        if not agree(out.multiply(seen.q.reshape(NUM_TOKENS, -1)), wanted[0][0]):
            return None
        for rules in _head_rules(module, seen):
            fused = FusedAttention(self._kernels, layer, qkv, out, rules)
            own = _Seen()
            if given(fused, hidden, tables, None, paged=own) is not None and own.agrees(seen):
                return fused
        return None

    def _layer(self, model: Any, module: Any) -> nn.Module | None:
        children = list(module.children())
        attentions = [child for child in children if isinstance(child, FusedAttention)]
        mlps = [child for child in children if isinstance(child, FusedMlp)]
        norms = [child for child in children if isinstance(child, FusedNorm)]
        if (len(attentions), len(mlps)) != (1, 1) or len(norms) + 2 != len(children):
            return None
        attention, mlp = attentions[0], mlps[0]
        hidden = self._noise(1, NUM_TOKENS, mlp.both.num_columns)
        tables = _tables(model, attention, hidden)
        wanted_page = self._page(attention)
        wanted = given(module, hidden, position_embeddings=tables, paged=wanted_page)
        if not isinstance(wanted, torch.Tensor):
            return None
        for places in _norm_places(norms):
            parts = _parts(attention, mlp, places, getattr(module, "residual_multiplier", 1.0))
            fused = FusedLayer(self._library, self._room, attention.layer, parts)
            page = self._page(attention)
            got = fused(hidden, position_embeddings=tables, paged=page)
            if agree(got, wanted) and agree(page.pool.keys[-1], wanted_page.pool.keys[-1]):
                return fused
        return None

    def _page(self, attention: FusedAttention) -> PagedContext:
        rules = attention.rules
        num_kv_heads = attention.qkv.sizes[rules.order[1]] // rules.head_dim
        return one_page(self._library, attention.layer + 1, num_kv_heads, rules.head_dim)

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._draw)


class _Seen(NoPages):
    """What a module asked of the paged attention."""

    def __init__(self) -> None:
        super().__init__(torch.arange(NUM_TOKENS))
        self.q: torch.Tensor | None = None
        self.states: list[torch.Tensor] = []
        self.rules: Any = None
        self.window: int | None = None

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keeps them."""
        self.states += [keys.clone(), values.clone()]

    def attend(self, q: torch.Tensor, *asked: Any) -> torch.Tensor:
        """The queries."""
        *_, self.rules, self.window = asked
        self.q = q.clone()
        self.states.append(self.q)
        return q

    def agrees(self, other: _Seen) -> bool:
        """The same queries, keys and values."""
        return len(self.states) == len(other.states) == 3 and all(
            agree(own, theirs) for own, theirs in zip(self.states, other.states, strict=True)
        )


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """The weights, and the names that models may ask their modules for, such as their kind."""
    vars(new).update({name: value for name, value in vars(old).items() if isinstance(value, str)})
    if isinstance(new, WithoutParameters):
        own, all_of_it = footprint(new), footprint(old)
        new.num_weights += all_of_it[0] - own[0]
        new.weight_bytes += all_of_it[1] - own[1]


def _norm_places(norms: list[FusedNorm]) -> Iterator[list[FusedNorm | None]]:
    """Before and after the attention, before and after the MLP: where norms may stand."""
    if len(norms) == 4:
        yield list(norms)
    if len(norms) == 2:
        for one, other in itertools.permutations(norms):
            yield [one, None, other, None]
            yield [None, one, None, other]


def _parts(
    attention: FusedAttention, mlp: FusedMlp, norms: list[FusedNorm | None], multiplier: float
) -> LayerParts:
    rules = attention.rules
    described = [None if norm is None else _described(norm) for norm in norms]
    return LayerParts(
        norms=(described[0], described[1], described[2], described[3]),
        head_norms=None
        if rules.norms is None
        else (_described(rules.norms[0]), _described(rules.norms[1])),
        norm_whole=rules.norm_whole,
        qkv=attention.qkv,
        out=attention.out,
        both=mlp.both,
        down=mlp.down,
        order=rules.order,
        head_dim=rules.head_dim,
        neighbours=rules.neighbours,
        score_rules=rules.score_rules,
        window=rules.window,
        activation=mlp.gated.activation,
        gate_first=mlp.gated.gate_first,
        multiplier=multiplier,
    )


def _described(norm: FusedNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.eps, norm.offset)


def _head_rules(module: nn.Module, seen: _Seen) -> Iterator[HeadRules]:
    norms = [child for child in module.children() if isinstance(child, FusedNorm)]
    if len(norms) not in (0, 2) or seen.q is None:
        return
    pairs: list[Any] = [None] if not norms else [(norms[0], norms[1]), (norms[1], norms[0])]
    head_dim = seen.q.shape[-1]
    for order, neighbours, pair, whole in itertools.product(
        ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)),
        (False, True),
        pairs,
        (False, True) if norms else (False,),
    ):
        yield HeadRules(head_dim, order, neighbours, pair, whole, seen.rules, seen.window)


def _tables(model: Any, module: Any, hidden: torch.Tensor) -> Any:
    """cos and sin as the model would give them to a module; None where it has no such thing."""
    rotary = getattr(getattr(model, model.base_model_prefix), "rotary_emb", None)
    positions = torch.arange(5, 5 + NUM_TOKENS)[None]
    if rotary is None:
        return None
    kind = getattr(module, "layer_type", None)
    by_kind = given(rotary, hidden, positions, kind) if kind else None
    return by_kind or given(rotary, hidden, positions)
