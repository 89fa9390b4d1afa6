"""What a gateway shows while a part of the cache is away or its content is taken out: an embedder
that hangs alone, an invalidation that overtakes a running generation.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.mesh_process import Mesh, wait_until
from tests.e2e.test_cache import ask, keep, outcome, reason, said, sample, wait_embedder

STEP_S = 0.02
HANGS_AFTER_S = 0.2
CAPITAL = "What is the capital of France?"
# Read by Python before the cache's own code. While there is a pipe, a pass waits to read it.
SITECUSTOMIZE = """
import sys
from pathlib import Path

if "services.cache" in sys.orig_argv:
    from services.cache.minilm import MiniLm

    gate, encode = Path(__file__).with_name("gate"), MiniLm.encode

    def hanging(self, batch):
        if gate.exists():
            gate.read_bytes()
        return encode(self, batch)

    MiniLm.encode = hanging
"""


class Embedder:
    """The real one, which can be made to hang, of a mesh that has `folder` on its path."""

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.folder = folder

    @contextmanager
    def hangs(self) -> Iterator[None]:
        """Every pass that begins meanwhile waits for the end of it."""
        gate = self.folder / "gate"
        os.mkfifo(gate)
        try:
            yield
        finally:
            writer = os.open(gate, os.O_RDWR)  # those that wait for a writer have one
            gate.unlink()
            os.close(writer)  # and now its end


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return Embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    profile = folder / "profile.json"
    costs = dict.fromkeys(("per_prefill_token_us", "per_decode_row_us", "per_context_token_us"), 0)
    profile.write_text(json.dumps({"fixed_us": STEP_S * 1e6, **costs}))
    settings = {
        "shard.simulated_profile": profile,
        "cache.lookup_deadline_ms": 1e3 * HANGS_AFTER_S,
        "gateway.cache_head_start_ms": 3000,
        "gateway.cache_timeout_ms": 3000,
    }
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    with Mesh(folder, "--engine", "simulated", *flags, python_path=embedder.folder) as running:
        wait_embedder(running)
        yield running


def test_requests_go_on_as_misses_when_the_embedder_alone_hangs(
    mesh: Mesh, embedder: Embedder
) -> None:
    live = keep(mesh, CAPITAL)
    pid = mesh.service("cache")["pid"]
    with embedder.hangs():
        answer = ask(mesh, "Which city is the capital of France?")
        assert (outcome(answer), reason(answer)) == ("miss", "deadline")
        assert said(answer)
        hit = ask(mesh, CAPITAL)
        assert (outcome(hit), reason(hit)) == ("hit", "same_request")
        assert said(hit) == said(live)
        # what was answered meanwhile is kept, though not yet found by meaning
        wait_until(lambda: outcome(ask(mesh, "Which city is the capital of France?")) == "hit", 20)
        numbers = iter(range(1, 1000))

        def is_known_to_hang() -> bool:
            answer = ask(mesh, f"Name the capital of France, number {next(numbers)}")
            assert outcome(answer) == "miss"
            return reason(answer) == "embedder_failed"

        wait_until(is_known_to_hang, 30, "lookups no longer wait for the embedder")
        assert sample(mesh, "cache_lookups_total", reason="embedder_failed") >= 1
    wait_until(
        # another text each time: after a miss its answer is kept, and found as the same request
        lambda: (
            reason(ask(mesh, f"Tell me the capital of France{'.' * next(numbers)}"))
            == "same_meaning"
        ),
        30,
        "answers are found by meaning again",
    )
    assert mesh.service("cache")["pid"] == pid


def test_an_answer_under_way_is_not_kept_when_its_model_is_invalidated(mesh: Mesh) -> None:
    question = "How long is a long answer?"
    outdated = sample(mesh, "cache_stores_total", outcome="outdated")
    answers: list[httpx.Response] = []
    client = threading.Thread(target=lambda: answers.append(ask(mesh, question, max_tokens=100)))
    client.start()
    wait_until(lambda: mesh.metric("scheduler-0", "num_requests_running") == 1, 20, "it runs")
    url = f"{mesh.facts['admin_url']}/cache/invalidate"
    response = httpx.post(url, json={"model_id": mesh.model}, timeout=20)
    assert response.status_code == 200, response.text
    assert mesh.metric("scheduler-0", "num_requests_running") == 1, "the answer was too short"
    client.join(60)
    assert [outcome(answer) for answer in answers] == ["miss"]
    wait_until(
        lambda: sample(mesh, "cache_stores_total", outcome="outdated") == outdated + 1,
        20,
        "the answer was offered and refused",
    )
    assert outcome(ask(mesh, question, max_tokens=100)) == "miss"
    wait_until(lambda: outcome(ask(mesh, question, max_tokens=100)) == "hit", 20, "it is kept now")
