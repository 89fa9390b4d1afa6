"""A way through a model that passes by all code around its modules: embedding, layers in one stack,
norm, head.

What transformers does between them takes a tenth of a small model's step. The modules are found by
watching a few tokens go through, and the way is taken only where not one bit of states, logits, K
and V differs from the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from services.shard.kernels.library import Library
from services.shard.surgery.fused import FusedLayer, Stack
from services.shard.surgery.trial import NUM_TOKENS, given, page_of

# Of the tokens that both ways are tried with: of the first, and how far the next ones are.
_PROBES = ((1, 1), (5, 17))


@dataclass(frozen=True, slots=True)
class Shortcut:
    """The modules, in the order in which they run.

    Attributes:
        rotary: gives the stack's tables, from states for their type alone, and positions.
    """

    embedding: nn.Module
    rotary: nn.Module
    stack: Stack
    norm: nn.Module
    head: nn.Module

    def states(self, ids: torch.Tensor, positions: torch.Tensor, paged: Any) -> torch.Tensor:
        """[1, tokens] each → [1, tokens, width], as the model gives them to its head."""
        states = self.embedding(ids)
        tables = self.rotary(states, positions)
        found: torch.Tensor = self.norm(self.stack.run(states, tables, paged))
        return found

    def logits(self, states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """[1, tokens, width] and positions of some → [1, those, vocab_size]."""
        found: torch.Tensor = self.head(states[:, kept])
        return found


def find(library: Library, model: Any) -> Shortcut | None:
    """None where there is none. Every module stays as it is."""
    if not any(isinstance(module, FusedLayer) for module in model.modules()):
        return None
    with torch.inference_mode():
        with _watching(model) as calls:
            wanted = [_own_way(library, model, *_PROBES[0])]
        candidate = None if wanted[0] is None else _candidate(model, calls)
        if candidate is None:
            return None
        wanted += [_own_way(library, model, *probe) for probe in _PROBES[1:]]
        got = [given(_short_way, library, model, candidate, *probe) for probe in _PROBES]
    return candidate if all(map(_equal, wanted, got)) else None


def _candidate(model: Any, calls: list[tuple[nn.Module, tuple[Any, ...], Any]]) -> Shortcut | None:
    """By what was seen in the model's last pass."""
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    if any(layer.stack is not layers[0].stack for layer in layers):
        return None
    stack = layers[0].stack
    if len({id(tables) for tables in stack.tables}) != 1:
        return None
    after_layers = next(out for module, _, out in calls if module is layers[-1])
    # Of modules in one another the outermost ends last.
    rotary = [module for module, _, out in calls if out is stack.tables[0]]
    norm = [module for module, args, _ in calls if args and args[0] is after_layers]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not rotary or not norm or embedding is None or head is None:
        return None
    return Shortcut(embedding, rotary[-1], stack, norm[-1], head)


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[tuple[nn.Module, tuple[Any, ...], Any]]]:
    """Every module that is called meanwhile, with what it takes and gives."""
    calls: list[tuple[nn.Module, tuple[Any, ...], Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((module, args, output))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _equal(wanted: list[torch.Tensor] | None, got: list[torch.Tensor] | None) -> bool:
    """To the bit."""
    if wanted is None or got is None or len(wanted) != len(got):
        return False
    return all(map(torch.equal, wanted, got))


def _short_way(
    library: Library, model: Any, shortcut: Shortcut, first: int, apart: int
) -> list[torch.Tensor]:
    page = page_of(library, model)
    tokens = _tokens(first, apart)
    states = shortcut.states(tokens, tokens, page)
    logits = shortcut.logits(states, torch.arange(1, NUM_TOKENS))
    return [states, logits, *page.pool.keys, *page.pool.values]


def _own_way(library: Library, model: Any, first: int, apart: int) -> list[torch.Tensor] | None:
    """What a few tokens become before the head and after it, and what they leave in the pool; None
    where the model can't be asked like that."""
    page = page_of(library, model)
    tokens, seen = _tokens(first, apart), []
    decoder = getattr(model, model.base_model_prefix)
    hook = decoder.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    asked = {"input_ids": tokens, "position_ids": tokens, "use_cache": False, "paged": page}
    try:
        output = given(model, **asked, logits_to_keep=torch.arange(1, NUM_TOKENS))
    finally:
        hook.remove()
    if output is None:
        return None
    return [*seen, output.logits, *page.pool.keys, *page.pool.values]


def _tokens(first: int, apart: int) -> torch.Tensor:
    """Ids, and positions alike."""
    return first + apart * torch.arange(NUM_TOKENS)[None]
