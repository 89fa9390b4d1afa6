"""`infermesh usage` and `infermesh auth` with a real auth process: what they print and refuse."""

import csv
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from infermesh.cli import main
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1.auth_admin_service_pb2_grpc import AuthAdminServiceStub
from infermesh.v1.auth_service_pb2_grpc import AuthServiceStub
from tests.auth_child import AuthChild

DAY_MS = 86_400_000
OLD = 20_000  # 2024-10-04, when nothing had a price
# gateways' clocks may be ahead: what is dated after the start of auth has its price
NEXT = int(time.time() * 1000) // DAY_MS + 1
# tenant, user, labels, day
ROWS = (
    ("acme", "ann", {"team": "red"}, NEXT),
    ("acme", "ann", {"team": "blue"}, NEXT + 1),
    ("acme", "bob", {}, NEXT + 1),
    ("globex", "", {"team": "red"}, NEXT + 1),
    ("past", "", {}, OLD),
)


@dataclass
class Done:
    """A command that ended."""

    status: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        assert self.status == 0, self.err
        found: list[dict[str, Any]] = json.loads(self.out)
        return found


Command = Callable[..., Done]


@pytest.fixture(scope="module")
def auth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuthChild]:
    with AuthChild(tmp_path_factory.mktemp("auth"), prices="* prompt=2000") as child:
        with grpc.insecure_channel(child.admin_address) as channel:
            AuthAdminServiceStub(channel).CreateTenant(admin_pb.CreateTenantRequest(id="acme"))
        with grpc.insecure_channel(child.address) as channel:
            stub: Any = AuthServiceStub(channel)
            stub.RecordUsage(map(record, range(len(ROWS))))
        yield child


def record(number: int) -> pb.RecordUsageRequest:
    """The first has 1 token of prompt, the next 10, and so on."""
    tenant, user, labels, day = ROWS[number]
    facts = pb.UsageRecord(
        record_id=f"r{number}",
        tenant_id=tenant,
        key_id="k",
        model="tiny",
        prompt_tokens=10**number,
        device_us=500_000,
        end_user=user,
        labels=labels,
        finished_unix_ms=day * DAY_MS,
    )
    return pb.RecordUsageRequest(record=facts)


def date(day: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(day * DAY_MS // 1000))


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """The console script's function, as a user without a mesh calls it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["infermesh", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return Done(ended.value.code or 0, said.out, said.err)  # type: ignore[arg-type]  # a number

    return run


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (["day"], {("2024-10-04",): 10_000, (date(NEXT),): 1, (date(NEXT + 1),): 1110}),
        (["user"], {("",): 11_000, ("ann",): 11, ("bob",): 100}),
        (["label:team"], {("",): 10_100, ("blue",): 10, ("red",): 1001}),
        (["label:city"], {("",): 11_111}),
        (["tenant", "day"], {("acme", date(NEXT)): 1, ("acme", date(NEXT + 1)): 110,
                             ("globex", date(NEXT + 1)): 1000, ("past", "2024-10-04"): 10_000}),
    ],
)  # fmt: skip
def test_usage_sums_by_what_it_is_told(
    auth: AuthChild, command: Command, by: list[str], expected: dict[tuple[str, ...], int]
) -> None:
    words = [word for name in by for word in ("--by", name)]
    given = ("usage", "--admin", auth.admin_address, *words)
    rows = command(*given, "--format", "json").rows
    found = Counter[tuple[str, ...]]()
    for row in rows:
        found[tuple(row[name] for name in by)] += row["prompt_tokens"]
    assert found == expected
    assert command(*given, "--json").rows == rows
    as_text = csv.DictReader(io.StringIO(command(*given, "--format", "csv").out))
    assert list(as_text) == [{name: str(value) for name, value in row.items()} for row in rows]
    heading, *lines = command(*given).out.splitlines()
    assert [name for name in (*by, "cost") if name not in heading] == []
    for line, row in zip(lines, rows, strict=True):
        shown = {str(row[name]) for name in ("requests", "prompt_tokens", "cost", "currency")}
        assert shown - {""} <= {*line.split()}


def test_usage_is_whole_in_a_narrow_terminal(
    auth: AuthChild, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = command("usage", "--admin", auth.admin_address).out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert "device s" in shown


def test_usage_has_cost_and_device_time_of_one_tenant(auth: AuthChild, command: Command) -> None:
    (row,) = command("usage", "--admin", auth.admin_address, "--tenant", "acme", "--json").rows
    assert (row["requests"], row["cost"], row["device_seconds"]) == (3, "0.222", 1.5)
    (old,) = command("usage", "--admin", auth.admin_address, "--tenant", "past", "--json").rows
    assert (old["cost"], old["currency"]) == ("", "")
    since = ("usage", "--admin", auth.admin_address, "--since", "30d", "--by", "tenant", "--json")
    assert [row["tenant"] for row in command(*since).rows] == ["acme", "globex"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by", "colour"], "by is 'colour'; it must be tenant"),
        (["--by", "label"], "by is 'label'"),
        (["--by", "day:team"], "by is 'day:team'"),
        (["--by", "label:a", "--by", "label:b"], "two labels"),
        (["--since", "lately"], "since is 'lately'"),
        (["--admin", "unix:/nowhere/admin.sock"], "nothing answers at unix:/nowhere/admin.sock"),
    ],
)
def test_usage_refuses_in_one_sentence(
    auth: AuthChild, command: Command, words: list[str], said: str
) -> None:
    done = command("usage", "--admin", auth.admin_address, *words)
    assert_refused(done, said)


def test_usage_says_how_to_start_a_mesh_where_none_runs(command: Command) -> None:
    assert_refused(command("usage"), "no mesh with an auth service runs here; `infermesh up`")


def test_unknown_format_is_refused_by_name(auth: AuthChild, command: Command) -> None:
    done = command("usage", "--admin", auth.admin_address, "--format", "xml")
    assert done.status == 2
    assert "xml" in done.err


def test_backup_of_a_running_auth_becomes_another_database(
    auth: AuthChild, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "auth.gz"
    made = command("auth", "backup", file, "--database-url", auth.url)
    assert (made.status, made.err) == (0, "")
    assert f"{file}: 1 tenants, 0 keys, 5 usage" in made.out
    there = ("--database-url", f"sqlite:///{tmp_path / 'other.sqlite3'}")
    assert (
        "restored 1 tenants, 0 keys, 5 usage rows" in command("auth", "restore", file, *there).out
    )
    assert_refused(
        command("auth", "restore", file, *there), "1 tenants and 5 usage rows; --replace"
    )
    file.write_bytes(file.read_bytes()[:200])
    assert_refused(command("auth", "restore", file, "--replace", *there), "is torn")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["backup", "/nowhere/auth.gz"],
            "/nowhere/auth.gz can't be written: No such file or directory",
        ),
        (
            ["backup", "auth.gz", "--database-url", "postgres://u:hidden@/x?host=/no"],
            "auth.database",
        ),
        (["restore", "missing.gz"], "No such file or directory: 'missing.gz'"),
    ],
)
def test_backup_and_restore_refuse_in_one_sentence(
    auth: AuthChild, command: Command, words: list[str], said: str
) -> None:
    if "--database-url" not in words:
        words = [*words, "--database-url", auth.url]
    done = command("auth", *words)
    assert_refused(done, said)
    assert "hidden" not in done.err


def test_backup_needs_a_checkout(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infermesh.cli.auth.ROOT", tmp_path)
    assert_refused(command("auth", "backup", tmp_path / "auth.gz"), "needs a checkout")


def assert_refused(done: Done, said: str) -> None:
    """One sentence, nothing else, and a status that a script sees."""
    assert done.status == 1
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert said in done.err
    assert done.err.count("\n") == 1
