"""Which resolved addresses an endpoint may have: no way from a YAML file to a metadata service.

Pure. Not here: resolving names (upstream.pool).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network


@lru_cache(maxsize=4096)
def is_allowed(address: str, cidrs: tuple[str, ...]) -> bool:
    """Whether a connection to this IP address may be opened.

    With an allowlist, exactly what is in it; without one, anything but unspecified, multicast and
    link-local addresses, which is where clouds keep their metadata services.
    """
    ip = ip_address(address.split("%", 1)[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if cidrs:
        return any(ip in ip_network(cidr, strict=False) for cidr in cidrs)
    return not (
        ip.is_link_local or ip.is_multicast or ip.is_unspecified or str(ip) == "fd00:ec2::254"
    )


def all_allowed(addresses: Sequence[str], cidrs: tuple[str, ...]) -> bool:
    """Whether a name that resolves to these may be connected to.

    One bad address condemns the name: which of several a look-up returns first is not ours to say.
    """
    return all(is_allowed(address, cidrs) for address in addresses)
