"""The allow-list against the protos: complete, and as narrow as the map of the mesh says."""

import importlib
import pkgutil

import infermesh.v1
from infermesh.security.allow_list import ALLOWED, may_call
from infermesh.security.identities import Identity

PUBLIC = "infermesh.v1.InferenceService"


def rpcs_of_the_protos() -> set[str]:
    """Every method of every service but the public one."""
    found = set()
    for module in pkgutil.iter_modules(infermesh.v1.__path__):
        if module.name.endswith("_pb2"):
            file = importlib.import_module(f"infermesh.v1.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                if service.full_name != PUBLIC:
                    found |= {f"/{service.full_name}/{one.name}" for one in service.methods}
    return found


def test_every_rpc_of_the_protos_has_a_row_and_every_row_an_rpc() -> None:
    assert {method for method in ALLOWED if "/infermesh." in method} == rpcs_of_the_protos()


def test_what_has_no_row_is_refused() -> None:
    assert not any(may_call(identity, "/infermesh.v1.ShardService/New") for identity in Identity)


def test_nobody_may_nothing() -> None:
    assert not any(may_call(None, method) for method in ALLOWED)


def test_services_that_call_nobody_may_only_ask_for_health() -> None:
    for identity in (Identity.AUTH, Identity.CACHE, Identity.SHARD):
        allowed = {method for method in ALLOWED if may_call(identity, method)}
        assert allowed == {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}


def test_a_service_that_is_broken_into_can_neither_make_keys_nor_see_the_server() -> None:
    for method, allowed in ALLOWED.items():
        if "AuthAdmin" in method or "channelz" in method or "reflection" in method:
            assert allowed == {Identity.OPERATOR}


def test_only_the_scheduler_speaks_to_shards_and_only_the_gateway_opens_sessions() -> None:
    shard = [allowed for method, allowed in ALLOWED.items() if "ShardService" in method]
    assert shard == [{Identity.SCHEDULER}] * 3
    assert ALLOWED["/infermesh.v1.SchedulerService/Session"] == {Identity.GATEWAY}
    assert ALLOWED["/infermesh.v1.AuthService/Lease"] == {Identity.GATEWAY}
