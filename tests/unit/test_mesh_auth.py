"""The auth service in the plan of a mesh: where it stands, and what stays off command lines."""

from pathlib import Path

from infermesh.config_load import load
from infermesh.mesh.models import choose_models
from infermesh.mesh.plan import MeshPlan, plan_mesh
from infermesh.mesh.state import StateFolder


def planned(tmp_path: Path, state: StateFolder | None, *flags: str) -> MeshPlan:
    settings = load(list(flags), {})
    return plan_mesh(settings, choose_models([], []), 1, tmp_path, tmp_path, state)


def test_auth_starts_first_and_stops_last(tmp_path: Path) -> None:
    names = [group.name for group in planned(tmp_path, StateFolder(tmp_path)).groups]
    assert names[0] == "auth"
    assert names[-1] == "gateway"


def test_gateway_asks_for_no_key_without_a_state_folder(tmp_path: Path) -> None:
    plan = planned(tmp_path, None)
    assert plan.auth is None
    assert not any("gateway.auth" in argument for argument in plan.gateway.arguments)


def test_passwords_of_database_and_redis_are_on_no_command_line(tmp_path: Path) -> None:
    url, redis_url = "postgresql://ann:hidden@host/auth", "redis://:hidden@host/0"
    flags = (f"--auth.database_url={url}", f"--auth.redis_url={redis_url}")
    plan = planned(tmp_path, StateFolder(tmp_path), *flags)
    specs = [spec for group in plan.groups for spec in group.processes]
    assert not any("hidden" in argument for spec in specs for argument in spec.arguments)
    auth = plan.groups[0].processes[0]
    assert dict(auth.environment) == {
        "INFERMESH_AUTH__DATABASE_URL": url,
        "INFERMESH_AUTH__REDIS_URL": redis_url,
    }


def test_gateway_knows_the_meshs_auth_service_and_those_it_was_told_of(tmp_path: Path) -> None:
    plan = planned(tmp_path, StateFolder(tmp_path), "--gateway.auth=127.0.0.1:8031")
    assert plan.auth is not None
    assert plan.gateway_config.auth == (plan.auth.address, "127.0.0.1:8031")
