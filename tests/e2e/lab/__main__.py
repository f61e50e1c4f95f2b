"""`python -m tests.e2e.lab up | down | env`: the lab for people."""

from __future__ import annotations

import sys
import time

from tests.e2e.lab.lab import Lab


def main(command: str) -> None:
    match command:
        case "up":
            began = time.monotonic()
            lab = Lab.found() or Lab.start()
            print(f"the lab is up after {time.monotonic() - began:.0f} s; in a shell:")
            print(environment(lab))
        case "down":
            if (found := Lab.found()) is not None:
                found.stop()
            print("the lab is down")
        case "env":
            if (found := Lab.found()) is None:
                raise SystemExit("no lab is up: just lab-up")
            print(environment(found))
        case _:
            raise SystemExit(__doc__)


def environment(lab: Lab) -> str:
    return "\n".join(
        f"export {name}='{value}'"
        for name, value in lab.at.environ.items()
        if name.startswith(("SKYPILOT", "HOME", "DETOSERVE"))
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
