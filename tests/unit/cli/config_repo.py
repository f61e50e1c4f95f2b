"""A config repo as text in tests, loaded without a disk, and planned."""

from __future__ import annotations

from collections.abc import Sequence

from reconciler.cli.live_state import predicted
from reconciler.cli.plan_view import PlanView, plan_view
from reconciler.core.compile import compile_workloads, platform_of
from reconciler.core.last_good import Effective
from reconciler.core.observed import Observation, Unknown
from reconciler.core.plan import PlanPolicy, plan
from reconciler.sources.config_file import parse_config_file
from reconciler.sources.yaml_document import Limits

BASE = """\
apiVersion: detoserve.ai/v1alpha1
kind: Cluster
metadata: {name: here}
spec:
  provider: {type: local}
---
apiVersion: detoserve.ai/v1alpha1
kind: Cluster
metadata: {name: west}
spec:
  provider: {type: kubernetes, context: west}
  gpus: [{type: H100, count: 32, pricePerHour: 2.5}]
---
apiVersion: detoserve.ai/v1alpha1
kind: Tenant
metadata: {name: acme}
spec:
  models: ["*"]
  keys: [{id: web, sha256: "%s"}]
---
apiVersion: detoserve.ai/v1alpha1
kind: Function
metadata: {name: chat}
spec:
  model: {uri: "sim://chat"}
  runtime: {engine: simulated, args: [--a=1, --b=2]}
  scaling: {minReplicas: 2}
---
apiVersion: detoserve.ai/v1alpha1
kind: Function
metadata: {name: big}
spec:
  model: {uri: "hf://org/big"}
  runtime: {engine: vllm, tensorParallel: 4}
  resources: {gpu: {types: [H100], count: 4}}
---
apiVersion: detoserve.ai/v1alpha1
kind: Deployment
metadata: {name: chat}
spec: {function: chat, shared: true, placement: {cluster: here}}
---
apiVersion: detoserve.ai/v1alpha1
kind: Deployment
metadata: {name: big}
spec: {function: big, shared: true, replicas: 2, placement: {cluster: west}}
""" % ("a" * 64)


def effective_of(text: str, path: str = "all.yaml") -> Effective:
    """What a repo of this one file holds; the text must be valid."""
    file = parse_config_file(path, text.encode(), Limits())
    assert not file.failed, file.problems
    return Effective("rev", "digest", {o.key: o for o in file.objects}, (), frozenset())


def planned(
    before: str,
    after: str,
    *,
    observed: Sequence[Observation | Unknown] | None = None,
    problems: Sequence[object] = (),
) -> PlanView:
    """The view of going from one repo to another."""
    old, new = effective_of(before), effective_of(after)
    world = predicted(old) if observed is None else observed
    desired = compile_workloads(new)
    known = frozenset(key.name for key in old.objects if key.kind == "Deployment")
    policy = PlanPolicy(platform_of(new.objects).prune, known=known, revision="0123456789abcdef")
    return plan_view(
        plan(desired, world, policy, now=0.0),
        world,
        desired,
        new.objects,
        objects_before=old.objects,
        labels=("main", "the files in ."),
    )
