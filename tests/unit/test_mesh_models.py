"""Several models in one mesh: their names, aliases, processes and share of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from infermesh.config import ConfigError, Settings
from infermesh.mesh.models import DEMO_MODEL, ModelChoice, check_aliases, choose_models
from infermesh.mesh.plan import MeshPlan, ProcessSpec, plan_mesh

TWO = (ModelChoice("/models/a", "a"), ModelChoice("org/b", "b"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def planned(models: tuple[ModelChoice, ...], replicas: int, tmp_path: Path) -> MeshPlan:
    return plan_mesh(Settings(), models, replicas, tmp_path, tmp_path)


def processes(plan: MeshPlan, name: str) -> tuple[ProcessSpec, ...]:
    return next(group.processes for group in plan.groups if group.name == name)


def test_models_are_named_after_folder_repository_or_as_given(folder: Path) -> None:
    chosen = choose_models([str(folder), "org/one@main", f"x={folder}", "y=org/two"], [])
    assert chosen == (
        ModelChoice(str(folder), "tiny"),
        ModelChoice("org/one@main", "org/one"),
        ModelChoice(str(folder), "x"),
        ModelChoice("org/two", "y"),
    )


def test_model_is_the_demo_when_none_is_given() -> None:
    assert choose_models([], []) == (ModelChoice(str(DEMO_MODEL), "infermesh-demo"),)


def test_folder_is_taken_as_it_stands_when_its_path_has_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert choose_models([str(folder)], []) == (ModelChoice(str(folder), "a=b"),)


def test_served_names_follow_the_order_of_models(folder: Path) -> None:
    chosen = choose_models([str(folder), "org/two"], ["one", "two"])
    assert [choice.name for choice in chosen] == ["one", "two"]


@pytest.mark.parametrize(
    ("models", "names", "said"),
    [
        (["org/a", "org/a@v2"], [], "two models would be served as org/a"),
        (["org/a", "org/b"], ["one"], "1 times for 2 models"),
        (["=org/a"], [], "MODEL or NAME=MODEL"),
        (["x="], [], "MODEL or NAME=MODEL"),
        (["x=nowhere"], [], "no model at nowhere"),
    ],
)
def test_models_are_refused_when_names_clash_or_miss(
    models: list[str], names: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_models(models, names)


@pytest.mark.parametrize("alias", ["x=c", "x", "=a", "b=a"])
def test_alias_is_refused_when_it_names_no_model_or_hides_one(alias: str) -> None:
    with pytest.raises(ConfigError, match="alias"):
        check_aliases([alias], TWO)


def test_alias_is_accepted_when_its_model_is_served() -> None:
    check_aliases(["gpt-4o=a", "x=b"], TWO)


def test_every_replica_of_every_model_has_a_shard_and_a_scheduler_of_its_own(
    tmp_path: Path,
) -> None:
    plan = planned(TWO, 2, tmp_path)
    schedulers = processes(plan, "schedulers")
    said = [
        (f"--scheduler.model={source}", f"--scheduler.replica_id={name}-{copy}")
        for source, name in (("/models/a", "a"), ("org/b", "b"))
        for copy in range(2)
    ]
    for index, (process, wanted) in enumerate(zip(schedulers, said, strict=True)):
        own = f"--scheduler.shard=unix:{tmp_path}/shard-{index}.sock"
        assert {*wanted, own} <= set(process.arguments)
    assert len(set(plan.scheduler_addresses)) == 4
    assert plan.model_names == ("a", "b")


@pytest.mark.parametrize(("models", "replicas", "shards"), [(TWO, 3, 6), (TWO[:1], 2, 2)])
def test_every_shard_knows_how_many_share_the_machine(
    models: tuple[ModelChoice, ...], replicas: int, shards: int, tmp_path: Path
) -> None:
    for process in processes(planned(models, replicas, tmp_path), "shards"):
        assert f"--shard.local_shards={shards}" in process.arguments
