"""Where each tensor of a checkpoint belongs in the model: a parameter, or one expert's part of one.

Names only; reads and allocates nothing. A checkpoint names its tensors as its author's library did:
GPT-2 without the prefix of its causal model, Mixtral and Qwen 3 MoE one tensor per expert, where
transformers 5 computes with all experts of a layer in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from infermesh.errors import ModelLoadFailed

Shape = tuple[int, ...]

# What models compute by themselves: rotary tables, GPT-2's causal masks.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
# Mixtral's names and Qwen's → the fused parameter, its half of the rows, of how many.
_EXPERT_PARTS = {
    "w1": ("gate_up_proj", 0, 2),
    "gate_proj": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
    "down_proj": ("down_proj", 0, 1),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter, or the rows `start` to `end` of expert `expert` in one of [experts, rows, n]."""

    parameter: str
    shape: Shape
    expert: int | None = None
    start: int = 0
    end: int = 0


def place_tensors(
    stored: Iterable[str], wanted: Mapping[str, Shape], prefix: str, tied: Mapping[str, str]
) -> dict[str, Place]:
    """The place of every stored tensor that the model has one for.

    Args:
        wanted: the model's parameters.
        prefix: of the parameters below the head; a checkpoint of the bare model lacks it.
        tied: parameter → the parameter that it shares; one of a pair is enough.

    Raises:
        ModelLoadFailed: a tensor is missing, unexpected, or there twice.
    """
    places: dict[str, Place] = {}
    taken: dict[Place, str] = {}
    for name in stored:
        place = _find(name, wanted) or _find(f"{prefix}.{name}", wanted)
        if place is None:
            if _IGNORED.search(name):
                continue
            raise ModelLoadFailed(f"the checkpoint has an unexpected tensor {name}")
        if place in taken:
            raise ModelLoadFailed(f"the checkpoint has one tensor twice: {taken[place]} and {name}")
        places[name] = place
        taken[place] = name
    _check_complete(places.values(), wanted, tied)
    return places


def _find(name: str, wanted: Mapping[str, Shape]) -> Place | None:
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if name in wanted:
        return Place(name, wanted[name])
    found = _EXPERT.fullmatch(name)
    if found is None or found[3] not in _EXPERT_PARTS:
        return None
    leaf, part, num_parts = _EXPERT_PARTS[found[3]]
    parameter, expert = f"{found[1]}.{leaf}", int(found[2])
    if parameter not in wanted or expert >= wanted[parameter][0]:
        return None
    _, rows, width = wanted[parameter]
    size = rows // num_parts
    return Place(parameter, (size, width), expert, part * size, (part + 1) * size)


def _check_complete(
    places: Iterable[Place], wanted: Mapping[str, Shape], tied: Mapping[str, str]
) -> None:
    rows: dict[str, int] = {}
    for place in places:
        whole = place.expert is None
        rows[place.parameter] = rows.get(place.parameter, 0) + (
            _num_rows(place.shape) if whole else place.end - place.start
        )
    missing = [
        name
        for name, shape in wanted.items()
        if name not in rows and not (rows.keys() & partners(name, tied))
    ]
    partial = [name for name, count in rows.items() if count < _num_rows(wanted[name])]
    for names, what in ((missing, "tensor"), (partial, "an expert of")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelLoadFailed(f"the checkpoint lacks {what} {names[0]}{more}")


def _num_rows(shape: Shape) -> int:
    """Rows over all experts, where there are any; one for everything else."""
    return shape[0] * shape[1] if len(shape) == 3 else 1


def partners(name: str, tied: Mapping[str, str]) -> set[str]:
    """The parameters that share memory with `name`."""
    if name in tied:
        return {tied[name]}
    return {target for target, source in tied.items() if source == name}
