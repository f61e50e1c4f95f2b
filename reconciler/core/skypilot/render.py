"""A Workload as a SkyPilot service: the task that is sent, as plain data. Pure.

Values of secrets are not in it: `secrets` names them, and the backend fills them in when it sends.
Not here: how an engine is started (engines), or where its model comes from (models).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final

from reconciler.core.skypilot import engines
from reconciler.core.skypilot.models import model_source
from reconciler.core.skypilot.service import DEPLOYMENT, NAMESPACE, OWNER, SPEC
from reconciler.core.workload import Template, Workload
from reconciler.errors import Stalled
from schemas.cluster import CloudProvider, KubernetesProvider, SlurmProvider

PORT: Final = 8000
# Processes on a Slurm node share its ports: each service has its own there.
SLURM_PORTS: Final = range(20_000, 30_000)
_GB: Final = 1024**3


def check(workload: Workload) -> None:
    """Raises Stalled where it can never run as written; says what to do instead."""
    service_task(workload, "")


def service_task(workload: Workload, owner: str) -> dict[str, Any]:
    """What SkyPilot is told to run.

    Raises:
        Stalled: it can never run as written; says what to do instead.
    """
    template, port = workload.template, port_of(workload)
    _check_secrets(workload)
    model = model_source(template)
    start = engines.start(template, model, workload.name, port)
    own = engines.env_of(template, workload.name, port)
    task: dict[str, Any] = {
        "name": workload.name,
        "envs": {
            OWNER: owner,
            DEPLOYMENT: workload.deployment,
            SPEC: workload.spec_digest,
            **_namespace(template),
            **start.env,
            **own,
        },
    }
    if secrets := sent_secrets(template):
        task["secrets"] = dict.fromkeys(secrets)
    task["resources"] = _resources(workload, port)
    task["service"] = _service(workload, port)
    if config := _config(workload):
        task["config"] = config
    if model.setup:
        task["setup"] = "set -e\n" + "\n".join(model.setup) + "\n"
    task["run"] = start.script
    return task


def _namespace(template: Template) -> dict[str, str]:
    namespace = template.scheduling.namespace
    return {NAMESPACE: namespace} if namespace else {}


def sent_secrets(template: Template) -> list[str]:
    """Variables whose values go through SkyPilot; those in Kubernetes Secrets stay there."""
    return [n for n, ref in template.runtime.secrets.items() if ref.kubernetes_secret is None]


def port_of(workload: Workload) -> int:
    """The same for the life of a workload, from its name alone."""
    if not isinstance(workload.provider, SlurmProvider):
        return PORT
    digest = hashlib.blake2b(workload.name.encode(), digest_size=4).digest()
    # Steps of 64 leave room for workers of a disaggregated replica beside it.
    steps = len(SLURM_PORTS) // 64
    return SLURM_PORTS.start + 64 * (int.from_bytes(digest, "big") % steps)


def _check_secrets(workload: Workload) -> None:
    if isinstance(workload.provider, KubernetesProvider):
        return
    for name, ref in workload.template.runtime.secrets.items():
        if ref.kubernetes_secret is not None:
            raise Stalled(
                f"secret {name}: cluster {workload.cluster} is {workload.provider.type} and has no "
                "Kubernetes Secrets; use fromEnv or fromFile"
            )


def _resources(workload: Workload, port: int) -> dict[str, Any]:
    template, wants = workload.template, workload.template.resources
    resources: dict[str, Any] = {"infra": infra_of(workload)}
    on_slurm = isinstance(workload.provider, SlurmProvider)
    # Slurm runs containers only with a plugin that not every cluster has: there it must be asked for.
    image = template.runtime.image if on_slurm else engines.image_of(template)
    if image is not None:
        resources["image_id"] = f"docker:{image}"
    if wants.cpu is not None:
        resources["cpus"] = f"{wants.cpu:g}+"
    if wants.memory is not None:
        resources["memory"] = f"{math.ceil(wants.memory / _GB)}+"
    if wants.disk is not None:
        resources["disk_size"] = math.ceil(wants.disk / _GB)
    resources["ports"] = port
    if template.scheduling.spot != "never":
        resources["use_spot"] = True
    if wants.gpu is not None:
        choices = [f"{kind}:{wants.gpu.count}" for kind in wants.gpu.types]
        if len(choices) == 1:
            resources["accelerators"] = choices[0]
        else:
            # Best first: SkyPilot takes the next only where the one before cannot be had.
            resources["ordered"] = [{"accelerators": choice} for choice in choices]
    return resources


def infra_of(workload: Workload) -> str:
    """Where, as SkyPilot names it.

    Raises:
        Stalled: it is no place of SkyPilot's.
    """
    match workload.provider:
        case KubernetesProvider(context=context):
            return f"k8s/{context}"
        case SlurmProvider(cluster=cluster, partition=partition):
            return "/".join(filter(None, ("slurm", cluster, partition)))
        case CloudProvider(cloud=cloud, region=region, zone=zone):
            return "/".join(filter(None, (cloud, region, zone)))
        case other:
            raise Stalled(
                f"cluster {workload.cluster} is {other.type}, which SkyPilot does not run"
            )


def _service(workload: Workload, port: int) -> dict[str, Any]:
    probe = workload.template.readiness
    service: dict[str, Any] = {
        "readiness_probe": {
            "path": probe.path,
            "initial_delay_seconds": math.ceil(probe.initial_delay),
            "timeout_seconds": math.ceil(probe.timeout),
            "endpoint_probe_interval_seconds": math.ceil(probe.interval),
            "consecutive_failure_threshold_timeout": math.ceil(
                probe.failure_threshold * probe.interval
            ),
        },
    }
    if workload.template.scheduling.spot == "allowed":
        service["replica_policy"] = {
            "min_replicas": workload.replicas,
            "max_replicas": workload.replicas,
            "dynamic_ondemand_fallback": True,
        }
    else:
        service["replicas"] = workload.replicas
    service["ports"] = port
    return service


def _config(workload: Workload) -> dict[str, Any]:
    """What of SkyPilot's own configuration a task may set."""
    scheduling = workload.template.scheduling
    config: dict[str, Any] = {}
    if scheduling.workspace:
        config["active_workspace"] = scheduling.workspace
    if pod := _pod(workload):
        config["kubernetes"] = {"pod_config": pod}
    return config


def _pod(workload: Workload) -> dict[str, Any]:
    scheduling, runtime = workload.template.scheduling, workload.template.runtime
    pod: dict[str, Any] = {}
    spec: dict[str, Any] = {}
    if scheduling.queue:
        pod["metadata"] = {"labels": {"kai.scheduler/queue": scheduling.queue}}
        if scheduling.topology:
            pod["metadata"]["annotations"] = {
                "kai.scheduler/topology": scheduling.topology,
                "kai.scheduler/topology-preferred-placement": "kubernetes.io/hostname",
            }
        spec["schedulerName"] = "kai-scheduler"
    stay = {n: r.kubernetes_secret for n, r in runtime.secrets.items() if r.kubernetes_secret}
    if stay:
        spec["containers"] = [{"env": [_from_secret(n, ref) for n, ref in stay.items()]}]
    if spec:
        pod["spec"] = spec
    return pod


def _from_secret(name: str, reference: str) -> dict[str, Any]:
    secret, _, key = reference.partition("/")
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
