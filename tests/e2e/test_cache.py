"""The semantic cache in a mesh of separate processes: what is reused, what is not, what it
costs. What breaks is test_cache_faults'."""

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest

from infermesh import Client
from tests.e2e.mesh_process import Mesh, run_infermesh, wait_until
from tests.metric_rules import problems, promtool_problems

CAPITAL = "What is the capital of France?"
# a busy machine must not turn a hit into a miss
PATIENT = (
    "--set", "gateway.cache_head_start_ms=3000", "--set", "gateway.cache_timeout_ms=3000",
    "--set", "cache.lookup_deadline_ms=2500",
)  # fmt: skip

PRICE = "* prompt=1.5 cached_prompt=0.25 output=2 cached_output=0.5"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    priced = ("--set", f"auth.prices={PRICE}", "--set", "auth.currency=EUR")
    with Mesh(tmp_path_factory.mktemp("mesh"), "--dtype", "float32", *PATIENT, *priced) as running:
        wait_embedder(running)
        yield running


def wait_embedder(mesh: Mesh) -> None:
    """The cache comes after the first answer, and its embedder after that."""
    wait_until(lambda: "embed" in kinds(mesh), 120, "the embedder is listed")


def kinds(mesh: Mesh) -> list[str]:
    url = f"{mesh.facts['url']}/v1/models"
    listed = httpx.get(url, headers=bearer(mesh), timeout=10).json()["data"]
    return [model["kind"] for model in listed]


def bearer(mesh: Mesh) -> dict[str, str]:
    return {"authorization": f"Bearer {mesh.facts['api_key']}"}


def ask(mesh: Mesh, text: str, headers: dict[str, str] | None = None, **more: Any) -> Any:
    """The raw answer, with its headers."""
    body = {
        "model": mesh.model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 40,
        **more,
    }
    response = httpx.post(
        f"{mesh.facts['url']}/v1/chat/completions",
        json=body,
        headers=bearer(mesh) | (headers or {}),
        timeout=60,
    )
    assert response.status_code == 200, response.text
    return response


def outcome(response: httpx.Response) -> str:
    return response.headers["infermesh-cache"]


def reason(response: httpx.Response) -> str:
    return response.headers["infermesh-cache-reason"]


def said(response: httpx.Response) -> str:
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def keep(mesh: Mesh, text: str, **more: Any) -> httpx.Response:
    """A fresh answer, once the cache holds it and has indexed it."""
    stored, indexed = stores(mesh), num_indexed(mesh)
    answer: httpx.Response = ask(mesh, text, {"cache-control": "no-cache"}, **more)
    wait_until(lambda: stores(mesh) > stored, 20, f"{text} is kept")
    if more.get("n", 1) == 1 and "logprobs" not in more:
        wait_until(lambda: num_indexed(mesh) > indexed, 20, f"{text} is indexed")
    return answer


def stores(mesh: Mesh) -> float:
    return sample(mesh, "cache_stores_total", outcome="stored")


def num_indexed(mesh: Mesh) -> float:
    return sample(mesh, "cache_indexed_total")


def sample(mesh: Mesh, name: str, **labels: str) -> float:
    """A counter of the cache that may not have been counted yet."""
    try:
        return mesh.metric("cache", name, **labels)
    except AssertionError:
        return 0.0


def steps(mesh: Mesh) -> float:
    return mesh.metric("scheduler-0", "steps_total")


def test_repeated_question_is_a_hit_that_computes_nothing(mesh: Mesh) -> None:
    live = keep(mesh, CAPITAL)
    wait_until(lambda: mesh.metric("scheduler-0", "num_requests_running") == 0, 10)
    before = steps(mesh)
    hit = ask(mesh, CAPITAL)
    assert (outcome(hit), reason(hit)) == ("hit", "same_request")
    assert said(hit) == said(live)
    assert "Paris" in said(hit)
    assert hit.json()["usage"]["completion_tokens"] == live.json()["usage"]["completion_tokens"]
    streamed = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in mesh.openai().chat.completions.create(
            model=mesh.model,
            messages=[{"role": "user", "content": CAPITAL}],
            temperature=0,
            max_tokens=40,
            stream=True,
        )
    )
    assert streamed == said(live)
    assert steps(mesh) == before


def test_paraphrase_is_a_hit_by_meaning(mesh: Mesh) -> None:
    live = keep(mesh, CAPITAL)
    hit = ask(mesh, "Which city is the capital of France?")
    assert (outcome(hit), reason(hit)) == ("hit", "same_meaning")
    assert 0.9 < float(hit.headers["infermesh-cache-similarity"]) < 1
    assert said(hit) == said(live)
    assert int(hit.headers["infermesh-cache-age"]) >= 0
    with httpx.stream(
        "POST",
        f"{mesh.facts['url']}/v1/chat/completions",
        json={
            "model": mesh.model,
            "messages": [{"role": "user", "content": "Tell me the capital of France."}],
            "temperature": 0,
            "max_tokens": 40,
            "stream": True,
        },
        headers=bearer(mesh),
        timeout=60,
    ) as streamed:
        assert streamed.headers["infermesh-cache"] == "hit"
        assert streamed.read().count(b"data: {") > 2


@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        ("How far is it from Paris to London?", "How far is it from London to Paris?"),
        ("Translate the train from Paris to London", "Translate the train from London to Paris"),
        ("What is 17×23?", "What is 17×24?"),
        ("Is this mushroom safe to eat?", "Is this mushroom unsafe to eat?"),
        ("Why should I use a cache?", "Why should I not use a cache?"),
        ("What is the capital of Spain?", "What is the capital of Italy?"),
    ],
)
def test_opposite_is_a_miss(mesh: Mesh, kept: str, asked: str) -> None:
    keep(mesh, kept)
    for one, other in ((asked, "miss"), (kept, "hit")):
        assert outcome(ask(mesh, one)) == other


def test_another_sharing_domain_is_a_miss(mesh: Mesh) -> None:
    keep(mesh, "Name a colour", user="ann")
    assert outcome(ask(mesh, "Name a colour", user="ann")) == "hit"
    assert (
        outcome(ask(mesh, "Name a colour", {"cache-control": "no-store"}, user="bob")) == "bypass"
    )
    assert outcome(ask(mesh, "Name a colour", user="bob")) == "miss"


CHANGES: list[dict[str, Any]] = [
    {"max_tokens": 39},
    {"min_tokens": 1},
    {"top_p": 0.9},
    {"top_k": 7},
    {"min_p": 0.1},
    {"presence_penalty": 0.1},
    {"frequency_penalty": 0.1},
    {"repetition_penalty": 1.1},
    {"logit_bias": {"5": 1}},
    {"seed": 5},
    {"stop": ["#"]},
    {"stop_token_ids": [9]},
    {"ignore_eos": True},
    {"user": "other"},
    {"n": 2},
    {"logprobs": True},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]},
    {"messages": [*({"role": r, "content": "Hi"} for r in ("user", "assistant")),
                  {"role": "user", "content": "Who are you?"}]},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_one_changed_field_is_a_miss(mesh: Mesh, change: dict[str, Any]) -> None:
    if outcome(ask(mesh, "Who are you?")) != "hit":
        keep(mesh, "Who are you?")
    headers = {"cache-control": "max-age=3600"}
    assert outcome(ask(mesh, "Who are you?", headers)) == "hit"
    assert outcome(ask(mesh, "Who are you?", headers, **change)) == "miss"


def test_cache_control_is_obeyed(mesh: Mesh) -> None:
    keep(mesh, "What is a river?")
    assert outcome(ask(mesh, "What is a river?", {"cache-control": "no-store"})) == "bypass"
    assert outcome(ask(mesh, "What is a river?", {"cache-control": "no-cache"})) == "bypass"
    assert outcome(ask(mesh, "What is a river?", {"cache-control": "max-age=0"})) == "bypass"
    assert outcome(ask(mesh, "What is a river?")) == "hit"


def test_grpc_client_gets_the_same_answer(mesh: Mesh) -> None:
    live = keep(mesh, "What is a lake?")
    before = steps(mesh)
    with Client(mesh.facts["grpc"], api_key=mesh.facts["api_key"]) as client:
        text = "".join(
            delta.text for delta in client.chat("What is a lake?", temperature=0, max_tokens=40)
        )
        assert client.usage is not None
        assert client.usage.cached_prompt_tokens == client.usage.prompt_tokens
    assert text == said(live)
    assert steps(mesh) == before


def test_reported_entry_is_never_served_again(mesh: Mesh) -> None:
    keep(mesh, "What is a mountain?")
    hit = ask(mesh, "What is a mountain?")
    entry = hit.headers["infermesh-cache-entry"]
    url = f"{mesh.facts['admin_url']}/cache"
    report = httpx.post(f"{url}/report-bad-hit", json={"entry_id": entry}, timeout=20)
    assert report.json()["newly_quarantined"] is True
    for _ in range(2):
        assert outcome(ask(mesh, "What is a mountain?")) == "miss"


def test_embeddings_come_from_the_official_client(mesh: Mesh) -> None:
    client = mesh.openai()
    name = next(model.id for model in client.models.list() if model.id != mesh.model)
    texts = ["A cat sits on a mat.", "A feline rests on a rug.", "Stock prices fell."]
    answer = client.embeddings.create(model=name, input=texts)
    vectors = [item.embedding for item in answer.data]
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors)

    def likeness(a: int, b: int) -> float:
        return sum(x * y for x, y in zip(vectors[a], vectors[b], strict=True))

    assert likeness(0, 1) > likeness(0, 2) + 0.2
    assert answer.usage.prompt_tokens > len(texts) * 4
    floats = client.embeddings.create(model=name, input=texts[0], encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(vectors[0], abs=1e-5)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=name, input=["short", "long " * 400])
    assert caught.value.param == "input[1]"
    assert "256" in caught.value.message
    with Client(mesh.facts["grpc"], api_key=mesh.facts["api_key"]) as grpc_client:
        assert grpc_client.embed(texts[0])[0] == pytest.approx(vectors[0], abs=1e-5)


def test_mesh_without_a_cache_says_nothing_of_it(demo_mesh: Mesh) -> None:
    assert "cache" not in [service["name"] for service in demo_mesh.facts["services"]]
    answer = ask(demo_mesh, CAPITAL)
    assert "infermesh-cache" not in answer.headers


def usage_by_user(mesh: Mesh, tenant: str) -> dict[str, dict[str, Any]]:
    words = ("usage", "--tenant", tenant, "--by", "user", "--format", "json")
    done = run_infermesh(mesh.tmp_path, *words)
    assert done.returncode == 0, done.stderr
    return {row["user"]: row for row in json.loads(done.stdout)}


def test_users_pay_what_was_computed_for_them_and_less_for_what_was_reused(mesh: Mesh) -> None:
    run_infermesh(mesh.tmp_path, "tenants", "create", "billed")
    made = run_infermesh(mesh.tmp_path, "keys", "create", "--tenant", "billed")
    key = {"authorization": f"Bearer {made.stdout.strip()}"}
    busy_s = mesh.metric("scheduler-0", "shard_busy_seconds_total")
    expected, tokens = {"ann": Decimal(0), "bob": Decimal(0)}, {"ann": 0, "bob": 0}
    # drawn answers reuse the prompt's blocks alone; of equal greedy ones the second is a hit
    for user, temperature, outcomes in (
        ("ann", 1.0, ("bypass", "bypass")),
        ("bob", 0, ("miss", "hit")),
    ):
        for outcome in outcomes:
            text = f"{CAPITAL} Please tell {user}. " * 4
            num_stored = stores(mesh)
            answer = ask(mesh, text, key, user=user, temperature=temperature, max_tokens=8)
            assert answer.headers["infermesh-cache"] == outcome
            if outcome == "miss":
                wait_until(lambda before=num_stored: stores(mesh) > before, 20, "it is kept")
            usage = answer.json()["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            output = Decimal("0.5") if outcome == "hit" else Decimal(2)
            expected[user] += (usage["prompt_tokens"] - cached) * Decimal("1.5")
            expected[user] += cached * Decimal("0.25") + usage["completion_tokens"] * output
            tokens[user] += cached
    assert tokens["ann"] > 0  # the prefix was reused
    wait_until(
        lambda: sum(row["requests"] for row in usage_by_user(mesh, "billed").values()) >= 4, 30
    )
    rows = usage_by_user(mesh, "billed")
    for user in ("ann", "bob"):
        assert Decimal(rows[user]["cost"]) == expected[user] / 1_000_000
        assert (rows[user]["currency"], rows[user]["cached_prompt_tokens"]) == ("EUR", tokens[user])
    spent_s = rows["ann"]["device_seconds"] + rows["bob"]["device_seconds"]
    assert rows["bob"]["device_seconds"] > 0
    assert spent_s <= mesh.metric("scheduler-0", "shard_busy_seconds_total") - busy_s + 1e-4


def test_metrics_of_the_cache_follow_the_conventions(mesh: Mesh) -> None:
    ask(mesh, "Which conventions do metrics follow?")
    text = httpx.get(f"http://{mesh.service('cache')['metrics']}/metrics", timeout=10).text
    assert "infermesh_cache_lookups_total{" in text
    assert problems(text) == []
    assert promtool_problems(text) == ""
