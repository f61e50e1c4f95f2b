"""What SkyPilot 0.14.1 needs changed to run SkyServe in the lab. Never shipped, nowhere else active.

1. It says that ports cannot be opened on Slurm. In the lab each node has an address of its own that
   the API server and the router reach, as machines of one cluster would.
2. For the same reason it has no `query_ports` for Slurm, by which a replica's endpoint is found.
3. Before `serve status` it asks 8.8.8.8 or 1.1.1.1 whether there is a network. The lab has none; the
   API server itself is asked in their place.

A `.pth` file imports this in SkyPilot's own environment where DETOSERVE_LAB is set; each module is
changed right after it was loaded.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import time
from typing import Any

_ADDRESS_KEPT_S = 30.0


def _ports_are_reachable(clouds_slurm: Any) -> None:
    from sky.clouds import cloud

    unsupported = clouds_slurm.Slurm._CLOUD_UNSUPPORTED_FEATURES
    unsupported.pop(cloud.CloudImplementationFeatures.OPEN_PORTS, None)


def _endpoints_are_node_addresses(provision_slurm: Any) -> None:
    known: dict[str, tuple[float, str]] = {}

    def query_ports(
        cluster_name_on_cloud: str,
        ports: list[str],
        head_ip: str | None = None,
        provider_config: dict[str, Any] | None = None,
    ) -> Any:
        del head_ip  # the login node's
        from sky.provision import common

        at, address = known.get(cluster_name_on_cloud, (0.0, ""))
        if time.time() - at > _ADDRESS_KEPT_S:
            info = provision_slurm.get_cluster_info("", cluster_name_on_cloud, provider_config)
            head = info.get_head_instance()
            if head is None:
                return {}
            address = head.internal_ip
            known[cluster_name_on_cloud] = (time.time(), address)
        return common.query_ports_passthrough(ports, address)

    provision_slurm.query_ports = query_ports


def _network_is_the_lab(backend_utils: Any) -> None:
    # Nodes do not know the API server, and ask for nothing.
    server = os.environ.get("SKYPILOT_API_SERVER_ENDPOINT", "http://localhost")
    backend_utils._TEST_IP_LIST = [server]


_CHANGES = {
    "sky.clouds.slurm": _ports_are_reachable,
    "sky.provision.slurm": _endpoints_are_node_addresses,
    "sky.backends.backend_utils": _network_is_the_lab,
}


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> Any:
        change = _CHANGES.get(name)
        spec = change and importlib.machinery.PathFinder.find_spec(name, path, target)
        if not spec or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module: Any) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
