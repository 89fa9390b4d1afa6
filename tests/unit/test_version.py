"""Who speaks with whom, from what both say of themselves."""

import pytest

from infermesh.version import HERE, Build, are_far_apart, from_user_agent, incompatibility


def test_user_agent_is_read_among_the_words_of_grpc() -> None:
    build = Build("1.2.3rc1", 4, 2)
    assert from_user_agent(f"grpc-python-asyncio/1.80.0 {build} grpc-c/53") == build
    assert from_user_agent(str(HERE)) == HERE


@pytest.mark.parametrize(
    "words", ["", "grpcurl/1.9", "infermesh/1.0.0", "infermesh/1\n2 (protocol 1; oldest 1)"]
)
def test_user_agent_without_a_build_names_none(words: str) -> None:
    assert from_user_agent(words) is None


def test_neighbours_agree_when_the_newer_still_speaks_the_older_protocol() -> None:
    old, new = Build("0.1.0", 1, 1), Build("0.2.0", 2, 1)
    assert incompatibility("ShardService", old, new) is None
    assert incompatibility("ShardService", new, old) is None


@pytest.mark.parametrize(
    ("here", "caller", "first"),
    [
        (Build("0.3.0", 3, 2), Build("0.1.0", 1, 1), "upgrade the caller first"),
        (Build("0.1.0", 1, 1), Build("0.3.0", 3, 2), "upgrade ShardService first"),
    ],
)
def test_refusal_names_both_versions_and_what_to_upgrade(
    here: Build, caller: Build, first: str
) -> None:
    sentence = incompatibility("ShardService", here, caller)
    assert sentence is not None
    assert sentence.endswith(first)
    assert "0.1.0" in sentence
    assert "0.3.0" in sentence


@pytest.mark.parametrize(
    ("one", "other", "far"),
    [
        ("0.1.0", "0.1.9", False),
        ("0.1.0", "0.2.0", False),
        ("0.1.0", "0.3.0", True),
        ("1.0.0", "0.9.0", True),
        ("unknown", "unknown", False),
        ("unknown", "0.1.0", True),
    ],
)
def test_versions_are_far_apart_beyond_one_minor_version(one: str, other: str, far: bool) -> None:
    assert are_far_apart(one, other) is far
    assert are_far_apart(other, one) is far
