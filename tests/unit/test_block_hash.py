"""The names of KV blocks, which schedulers and gateways of different versions must agree on."""

import hashlib
import struct

import pytest

from infermesh.block_hash import BlockHash, extend_hashes, long_scope, scope_hash, shorten
from infermesh.v1 import scheduler_service_pb2 as pb


def hashes_of(domain: str, tokens: list[int], block_size: int) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, scope_hash(domain), tokens, block_size)
    return hashes


def test_bytes_are_what_the_protocol_says_they_are() -> None:
    """Golden values: a change of them is a change of the wire."""
    scope = scope_hash("acme/alice")
    by_hand = hashlib.sha256(
        struct.pack("<Q", 10) + b"acme/alice" + struct.pack("<Q", 0) + struct.pack("<Q", 0)
    ).digest()
    assert scope == by_hand
    hashes = hashes_of("acme/alice", [*range(8), 70_000], 4)
    assert [one.hex() for one in hashes] == [
        "16a8a691e4d9707a01b04aade7e06eaf91d5dd32577919cf741cca4a6b77a85e",
        "51ce13bea209908745f52a4412d8ae966774eca08b4d0dbdbca39b8d5edb83e5",
    ]
    assert (
        long_scope(scope).hex()
        == "2831801d887fbb85fde889259c27c484671f3d91ced29ebab490fb59d89588e0"
    )
    assert shorten(hashes) == [0x7A70D9E491A6A816, 0x879009A2BE13CE51]


def test_short_hashes_fit_the_wire() -> None:
    hashes = hashes_of("a", list(range(64)), 4)
    sent = pb.BlockEvents(stored=shorten(hashes))
    received = pb.BlockEvents.FromString(sent.SerializeToString())
    assert [one.to_bytes(8, "little") for one in received.stored] == [h[:8] for h in hashes]
    assert shorten([]) == []


def test_block_hash_is_sha256_of_its_parent_and_its_little_endian_ids() -> None:
    first, second = hashes_of("tenant", [1, 2, 300, 70_000, 9], 2)
    scope = scope_hash("tenant")
    assert first == hashlib.sha256(scope + struct.pack("<2i", 1, 2)).digest()
    assert second == hashlib.sha256(first + struct.pack("<2i", 300, 70_000)).digest()


def test_block_hashes_are_the_same_when_tokens_come_piece_by_piece() -> None:
    tokens, hashes = list(range(11)), list[BlockHash]()
    for length in range(12):
        extend_hashes(hashes, scope_hash("tenant"), tokens[:length], 4)
        assert len(hashes) == length // 4
    assert hashes == hashes_of("tenant", tokens, 4)


@pytest.mark.parametrize(
    "other",
    [("b", "", b""), ("a", "x", b""), ("a", "", b"x"), ("", "a", b""), ("ax", "", b"")],
)
def test_scope_differs_when_anything_that_shapes_a_block_does(
    other: tuple[str, str, bytes],
) -> None:
    assert scope_hash("a", "", b"") != scope_hash(*other)
    assert scope_hash("a", "x", b"") != scope_hash("ax", "", b"")
