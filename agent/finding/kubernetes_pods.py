"""Engines that run as pods of the agent's own Kubernetes cluster, found by label.

Lists the pods each time it is asked: a watch that is missed or cut has no word for it, a list has.
Only pods that are ready count. Needs the extra `agent-kubernetes`. Not here: the names routers know
them by, which follow from their URLs (finding.joined).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from agent.finding import Address, FindingFailed

PORT_NAME: Final = "http"
_TIMEOUT_S: Final = (2.0, 5.0)
"""(connect, read)"""


class KubernetesPods:
    """Ready pods with a label, as engines at their own addresses."""

    def __init__(
        self, selector: str, *, namespace: str = "", port: int = 0, api: Any = None
    ) -> None:
        """`port` 0: the container port named http, or the only one a pod has.

        `api`: a CoreV1Api; by default that of the pod the agent runs in, or of the kubeconfig.

        Raises:
            FindingFailed: no Kubernetes client is installed, or no cluster configured.
        """
        self._selector = selector
        self._namespace = namespace
        self._port = port
        self._api = api if api is not None else _api()

    async def engines(self) -> Sequence[Address]:
        """Raises: FindingFailed: the API server does not answer as it should."""
        try:
            pods = await asyncio.to_thread(self._list)
        except Exception as error:  # noqa: BLE001 - urllib3's and the client's have no common base
            status = getattr(error, "status", None)
            detail = f"answers {status}" if status else f"does not answer: {type(error).__name__}"
            raise FindingFailed(f"the Kubernetes API {detail}") from None
        return [address for pod in pods if (address := self._address(pod)) is not None]

    def _list(self) -> list[Any]:
        options = {"label_selector": self._selector, "_request_timeout": _TIMEOUT_S}
        if self._namespace:
            found = self._api.list_namespaced_pod(self._namespace, **options)
        else:
            found = self._api.list_pod_for_all_namespaces(**options)
        return list(found.items)

    def _address(self, pod: Any) -> Address | None:
        status = pod.status
        ready = any(c.type == "Ready" and c.status == "True" for c in status.conditions or ())
        port = self._port or _engine_port(pod)
        if not status.pod_ip or not ready or not port or pod.metadata.deletion_timestamp:
            return None
        host = f"[{status.pod_ip}]" if ":" in status.pod_ip else status.pod_ip
        return Address(f"http://{host}:{port}")


def _engine_port(pod: Any) -> int:
    ports = [port for container in pod.spec.containers for port in container.ports or ()]
    named = [port for port in ports if port.name == PORT_NAME]
    chosen = named or (ports if len(ports) == 1 else [])
    return int(chosen[0].container_port) if chosen else 0


def _api() -> Any:
    try:
        from kubernetes import client, config  # noqa: PLC0415 - heavy, and seldom wanted
    except ImportError:
        raise FindingFailed(
            "finding pods needs the Kubernetes client: install detoserve[agent-kubernetes]"
        ) from None
    try:
        try:
            config.load_incluster_config()  # type: ignore[no-untyped-call]
        except config.ConfigException:
            config.load_kube_config()  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError, TypeError) as error:
        raise FindingFailed(f"no Kubernetes cluster is configured here: {error}") from None
    return client.CoreV1Api()
