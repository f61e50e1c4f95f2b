"""The five kinds by name. To add a kind: its module, and one line here."""

from __future__ import annotations

from typing import Final, Literal

from schemas.cluster import Cluster
from schemas.deployment import Deployment
from schemas.function import Function
from schemas.platform import Platform
from schemas.tenant import Tenant

Kind = Literal["Function", "Tenant", "Cluster", "Deployment", "Platform"]
ConfigSpec = Function | Tenant | Cluster | Deployment | Platform

MODELS: Final[dict[Kind, type[ConfigSpec]]] = {
    "Function": Function,
    "Tenant": Tenant,
    "Cluster": Cluster,
    "Deployment": Deployment,
    "Platform": Platform,
}
