"""Valid objects as YAML text, for tests that are about something else."""

from __future__ import annotations

HEAD = "apiVersion: detoserve.ai/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n"


def function(name: str = "chat", *, model: str = "", more: str = "") -> str:
    extra = f", {model}" if model else ""
    return (
        HEAD.format(kind="Function", name=name)
        + f'  model: {{uri: "sim://m"{extra}}}\n'
        + "  runtime: {engine: simulated}\n"
        + more
    )


def cluster(name: str = "local", *, provider: str = "type: local", more: str = "") -> str:
    return HEAD.format(kind="Cluster", name=name) + f"  provider: {{{provider}}}\n" + more


def tenant(name: str = "acme", *, models: str = '"*"', more: str = "") -> str:
    return HEAD.format(kind="Tenant", name=name) + f"  models: [{models}]\n" + more


def deployment(
    name: str = "chat",
    *,
    function: str = "chat",
    tenants: str = "",
    placement: str = "cluster: local",
    more: str = "",
) -> str:
    whom = f"tenants: [{tenants}]" if tenants else "shared: true"
    return (
        HEAD.format(kind="Deployment", name=name)
        + f"  function: {function}\n  {whom}\n  placement: {{{placement}}}\n"
        + more
    )


def platform(name: str = "main") -> str:
    return HEAD.format(kind="Platform", name=name) + "  intervals: {poll: 10s}\n"
