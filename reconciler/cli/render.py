"""`detoserve render`: what backends and routers would be told, without telling them.

Secrets stay references and keys stay hashes. Not here: compiling (core.compile, core.routes), or how
a backend starts an engine (backends).
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from reconciler.cli.problem_lines import problem_line
from reconciler.cli.reading import is_url, open_reading
from reconciler.cli.terminal import (
    ANSWER_IS_NO,
    answer,
    answer_json,
    command_app,
    fail,
    note,
    painter,
)
from reconciler.cli.yaml_text import yaml_text
from reconciler.core.compile import compile_workloads
from reconciler.core.engine_command import Place, engine_argv
from reconciler.core.routes import compile_routes
from reconciler.core.skypilot.render import service_task
from reconciler.core.suggest import suggestion
from reconciler.core.workload import Workload
from reconciler.errors import Stalled
from schemas.function import Readiness
from schemas.wire.routing import RoutingTable

app = command_app()

OWNER: Final = "detoserve"
"""Stands for the mark of the reconciler that sends a task."""
EXAMPLE_PORT: Final = 8000
"""Stands where each start takes a free port."""


class Output(StrEnum):
    """How it is written on stdout."""

    YAML = "yaml"
    JSON = "json"


@app.command()
def render(
    where: Annotated[
        str,
        typer.Argument(
            metavar="PATH|REPO", help="Folder as it stands; with --ref, a repository or its URL."
        ),
    ] = ".",
    deployment: Annotated[
        str | None,
        typer.Argument(
            metavar="DEPLOYMENT", help="Only this one. [default: all]", show_default=False
        ),
    ] = None,
    ref: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH", help="Of this branch, tag or commit. [default: the files as they are]"
        ),
    ] = None,
    path: Annotated[
        str,
        typer.Option(
            metavar="SUBDIR",
            help="Where in it the config stands. [default: all of it]",
            show_default=False,
        ),
    ] = "",
    routes: Annotated[
        bool,
        typer.Option(
            "--routes", help="The routing table as routers get it, before any replica is up."
        ),
    ] = False,
    output: Annotated[Output, typer.Option("--output", "-o", help="yaml or json.")] = Output.YAML,
) -> None:
    """Show what each backend would be told to run, or what routers would be told.

    For a local cluster: the very command, its environment and its probe; for one of SkyPilot's: the
    service as SkyPilot gets it. Exit codes: 0 fine,
    1 the repo has errors (what is valid is shown), 2 it cannot be read.
    """
    if deployment is None and not is_url(where) and not Path(where).is_dir():
        where, deployment = ".", where
    if routes and deployment is not None:
        fail("--routes shows the whole table; leave the deployment out")
    with open_reading(where, ref, path) as reading:
        wanted = reading.effective()
        errors = [p for p in wanted.problems if p.severity == "error"]
        for problem in errors:
            placed = replace(problem, location=reading.place(problem.location))
            note(problem_line(placed, painter(sys.stderr)))
    desired = compile_workloads(wanted)
    if routes:
        table = compile_routes(wanted.objects, desired, (), None, revision=wanted.revision)
        _show([routes_data(table)], output)
    else:
        workloads = sorted(desired.workloads.values(), key=lambda w: w.name)
        if deployment is not None:
            name = deployment.removeprefix("Deployment/")
            names = [w.deployment for w in workloads]
            workloads = [w for w in workloads if w.deployment == name]
            if not workloads:
                fail(
                    f"there is no valid and placed Deployment/{name} in {where}; {suggestion(name, names)}"
                )
        _show([workload_data(w, python=sys.executable) for w in workloads], output)
    if errors:
        raise typer.Exit(ANSWER_IS_NO)


def workload_data(workload: Workload, *, python: str) -> dict[str, Any]:
    """What its backend would be told, as plain data. `python` runs engines that are built in."""
    data: dict[str, Any] = {
        "deployment": workload.deployment,
        "workload": workload.name,
        "cluster": workload.cluster,
        "backend": workload.backend,
        "replicas": workload.replicas,
        "specDigest": workload.spec_digest,
        "servedName": workload.template.served_name,
    }
    match workload.backend:
        case "local":
            data |= _local(workload, python)
        case "external":
            data["endpoints"] = [endpoint.url for endpoint in workload.template.endpoints]
            data["probe"] = _probe(workload.template.readiness)
        case _:
            data |= _skypilot(workload)
    return data


def routes_data(table: RoutingTable) -> dict[str, Any]:
    """The table as plain data, with hashes in hex and what is at its default left out."""
    data = _hex(msgspec.to_builtins(table, builtin_types=(bytes,)))
    # The publisher's to fill in.
    for name in ("generation", "published_at", "lease"):
        data.pop(name, None)
    return dict(data)


def _local(workload: Workload, python: str) -> dict[str, Any]:
    runtime = workload.template.runtime
    place = Place("127.0.0.1", EXAMPLE_PORT, f"{workload.name}-example", python)
    try:
        argv = engine_argv(workload.template, place)
    except Stalled as error:
        return {"stalled": str(error)}
    return {
        "command": shlex.join(argv),
        "argv": argv,
        "note": f"port {EXAMPLE_PORT} and the replica's name are examples; each start has its own",
        "env": dict(runtime.env),
        "secrets": {
            name: ref.model_dump(by_alias=True, exclude_none=True)
            for name, ref in runtime.secrets.items()
        },
        "probe": _probe(workload.template.readiness),
        "rollout": workload.rollout.model_dump(
            mode="json", by_alias=True, exclude={"gates", "steps"}
        ),
    }


def _skypilot(workload: Workload) -> dict[str, Any]:
    """The very task that SkyPilot gets; values of secrets are filled in when it is sent."""
    try:
        task = service_task(workload, OWNER)
    except Stalled as error:
        return {"stalled": str(error)}
    secrets = {
        name: ref.model_dump(by_alias=True, exclude_none=True)
        for name, ref in workload.template.runtime.secrets.items()
    }
    return {"secrets": secrets, "task": task} if secrets else {"task": task}


def _probe(readiness: Readiness) -> dict[str, Any]:
    return readiness.model_dump(mode="json", by_alias=True)


def _hex(value: Any) -> Any:
    match value:
        case bytes():
            return value.hex()
        case dict():
            return {key: _hex(item) for key, item in value.items()}
        case list() | tuple():
            return [_hex(item) for item in value]
        case _:
            return value


def _show(documents: list[dict[str, Any]], output: Output) -> None:
    if output is Output.JSON:
        answer_json(documents)
    else:
        answer(yaml_text(documents))
