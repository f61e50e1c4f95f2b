"""The API key that `detoserve up` makes for the repo it makes, and shows again on the same machine.

The key itself lies in the state directory, readable by its owner alone; Git has its hash.
Not here: keys of a repo that somebody else made (`detoserve keys create`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from reconciler.core.config import ObjectKey
from reconciler.edit.tenant_file import add_key
from reconciler.edit.work_tree import WorkTree, write_atomically
from reconciler.errors import SourceInvalid
from reconciler.sources.loader import load_directory
from reconciler.up.config_repo import ConfigRepo
from schemas import api_keys
from schemas.tenant import Tenant


def api_key_for(repo: ConfigRepo, path: str, state_dir: Path) -> str | None:
    """A key that the repo's tenants have: the one kept here, or a new one, committed. Else None.

    One is made only in a repo that `up` made, and only while nobody in it has a key.

    Raises:
        SourceInvalid: the repo just made cannot be edited or committed to.
    """
    file = state_dir / "api-key.json"
    try:
        loaded = load_directory(repo.path / path)
    except SourceInvalid:
        return None  # nothing to read yet: what the reconciler says of it is better placed
    tenants = [obj.value for obj in loaded.objects.values() if isinstance(obj.value, Tenant)]
    hashes = {key.sha256 for tenant in tenants for key in tenant.spec.keys}
    known = _read(file)
    if known is not None and api_keys.digest(known).hex() in hashes:
        return known
    # A key of ours that Git does not know is left of an `up` that was killed before it committed.
    if not repo.ours or not tenants or (hashes and not repo.created):
        return None
    tenant = tenants[0].metadata.name
    key = api_keys.create()
    tree = WorkTree.open(repo.path, path)
    tenant_file = tree.file_of(ObjectKey("Tenant", tenant))
    entry = {"id": key.id, "sha256": key.sha256}
    # Kept before it is in Git: a key that Git knows and nobody has would be of no use.
    _write(file, key.text)
    write_atomically(tenant_file, add_key(tenant_file.read_text(), tenant, entry))
    tree.commit(tenant_file, f"Add key {key.id} for tenant {tenant}")
    return key.text


def _read(file: Path) -> str | None:
    try:
        key = json.loads(file.read_text())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) else None


def _write(file: Path, key: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump({"key": key}, out)
