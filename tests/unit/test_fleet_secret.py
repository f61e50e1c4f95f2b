from __future__ import annotations

import stat

from reconciler.up.fleet_secret import secret_file
from router.fleet.secret import fleet_secret
from router.settings import Settings


def test_it_is_made_once_and_is_its_owners_alone(tmp_path):
    path = secret_file(tmp_path)
    made = path.read_text()
    assert len(made.strip()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret_file(tmp_path).read_text() == made
    assert fleet_secret(Settings(routes=tmp_path, secret_file=path), "") != fleet_secret(
        Settings(routes=tmp_path), ""
    )
