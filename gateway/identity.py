"""Who calls: the value that every stage after the gate decides by.

Without an auth service any key, or none, is the local tenant, which is safe on this machine only.
"""

from dataclasses import dataclass

from infermesh.errors import PermissionDenied
from infermesh.quota import Limits

INFERENCE, EMBEDDINGS, MODELS = "inference", "embeddings", "models"


@dataclass(frozen=True, slots=True)
class Principal:
    """On whose behalf a request runs.

    Attributes:
        scopes: what its key may do.
        models: names that the key may use; empty: all.
        reuse_policy: which answers may be reused; empty: the gateway's setting.
        semantic_cache: answers may be found by meaning.
        weight: share of service among tenants.
    """

    tenant: str
    key_id: str = ""
    scopes: frozenset[str] = frozenset({INFERENCE, EMBEDDINGS, MODELS})
    models: frozenset[str] = frozenset()
    limits: Limits = Limits()  # noqa: RUF009  # a frozen value
    weight: float = 1.0
    semantic_cache: bool = False
    reuse_policy: str = ""

    def sharing_domain(self, user: str) -> str:
        """Who may share computed state with this caller: its tenant, narrowed to an end user."""
        return f"{self.tenant}/{user}" if user else self.tenant

    def require(self, scope: str) -> None:
        """Raises PermissionDenied where the key lacks a scope."""
        if scope not in self.scopes:
            has = ", ".join(sorted(self.scopes))
            raise PermissionDenied(f"this API key lacks the scope {scope}; it has {has}")

    def sees(self, *names: str) -> bool:
        """The key may use a model of any of these names."""
        return not self.models or any(name in self.models for name in names)

    def require_model(self, *names: str) -> None:
        """Raises PermissionDenied where the key may use a model by none of its names."""
        if not self.sees(*names):
            raise PermissionDenied(f"this API key may not use the model {names[0]}", param="model")


LOCAL = Principal(tenant="local", semantic_cache=True)
