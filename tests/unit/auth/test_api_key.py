"""Keys carry 256 random bits, and only a hash of them is kept."""

import hashlib

import pytest

from services.auth import api_key


def test_key_carries_its_id_and_no_two_are_alike() -> None:
    drawn = [api_key.draw() for _ in range(200)]
    assert len({text for _, text in drawn}) == len({key_id for key_id, _ in drawn}) == 200
    for key_id, text in drawn:
        assert api_key.id_of(text) == key_id
        assert text.startswith(api_key.prefix(key_id))
        assert len(text.rpartition("-")[2]) * 5 >= 256


def test_kept_hash_matches_its_key_alone() -> None:
    _, text = api_key.draw()
    kept = api_key.hashed(text)
    assert kept == hashlib.sha256(text.encode()).digest()
    assert api_key.matches(text, kept)
    assert not api_key.matches(text + " ", kept)
    assert not api_key.matches(api_key.draw()[1], kept)


@pytest.mark.parametrize("text", ["", "local", "im-", "im-short-short", "sk-" + "a" * 66, "im-\n"])
def test_other_texts_are_no_keys(text: str) -> None:
    assert api_key.id_of(text) is None
