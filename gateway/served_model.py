"""A model as the gateway serves it: its manifest's facts, its text, its defaults."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.ranges import RANGES
from gateway.request import Fingerprint, Sampling
from gateway.text.tokenizer import ModelText


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One loaded model; replicas with its fingerprint are interchangeable.

    Attributes:
        rope_switch_len: longer sequences share no KV blocks with others; 0: all lengths share.
    """

    model_id: str
    fingerprint: Fingerprint
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    created_unix_s: int
    defaults: Sampling
    text: ModelText
    rope_switch_len: int = 0
    # "int8", "int4-g32"; empty: weights are floats
    quantization: str = ""


def sampling_defaults(generation_config_json: str) -> Sampling:
    """The model author's choice in generation_config.json, where it is one this mesh can follow."""
    config = parse_config(generation_config_json)

    def number(name: str, kind: Callable[[float], Any]) -> Any:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return kind(value) if RANGES[name].holds(value) else None

    # transformers decodes such a model greedily, whatever temperature stands beside it
    is_greedy = config.get("do_sample") is False
    return Sampling(
        temperature=0.0 if is_greedy else number("temperature", float),
        top_p=number("top_p", float),
        top_k=number("top_k", int),
        min_p=number("min_p", float),
        repetition_penalty=number("repetition_penalty", float),
    )


def parse_config(text: str) -> Mapping[str, Any]:
    """A JSON object of a model's files; {} for a file that is not there.

    Raises:
        ValueError: it is there, and no JSON object.
    """
    found = json.loads(text) if text.strip() else {}
    if not isinstance(found, dict):
        raise ValueError("a model's configuration file must hold a JSON object")
    return found
