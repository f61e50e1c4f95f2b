from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from reconciler.errors import Stalled
from reconciler.publish.signing_key import load_or_create
from schemas.wire.envelope import public_key_hex


def test_a_key_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "routes.pem"
    first = public_key_hex(load_or_create(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert public_key_hex(load_or_create(path)) == first
    assert [p.name for p in path.parent.iterdir()] == ["routes.pem"]


def test_many_that_start_together_end_with_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = pool.map(lambda _: public_key_hex(load_or_create(tmp_path / "k")), range(16))
    assert len(set(keys)) == 1


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k"
    load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(Stalled, match="chmod 600"):
        load_or_create(path)


def test_a_damaged_file_is_neither_used_nor_replaced(tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_text("not a key")
    path.chmod(0o600)
    with pytest.raises(Stalled, match="not an unencrypted PEM private key"):
        load_or_create(path)
    assert path.read_text() == "not a key"


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k"
    pem = generate_private_key(SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    path.write_bytes(pem)
    path.chmod(0o600)
    with pytest.raises(Stalled, match="not an Ed25519 key"):
        load_or_create(path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Stalled, match="signing key"):
        load_or_create(tmp_path / "file" / "k")
