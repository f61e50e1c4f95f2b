"""Sends what is due for a service, and puts SkyPilot's refusals into words.

What is sent is written down before, and its id after, so that no crash in between makes two of it.
Not here: what is due (core.skypilot.steps), and when to try again (backend).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from reconciler.backends.secret_values import redact, resolve
from reconciler.backends.skypilot.api import Refusal, SkyPilotApi
from reconciler.backends.skypilot.notes import Flight, Notes, Verb
from reconciler.core.plan import template_data
from reconciler.core.skypilot import steps
from reconciler.core.skypilot.render import service_task
from reconciler.core.workload import Workload
from reconciler.errors import ReconcileError

log = logging.getLogger("detoserve.skypilot")

_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
# What SkyPilot says no to whatever the time; anything else may go away by itself.
_FOR_A_HUMAN: Final = frozenset(
    {
        "InvalidRequest",
        "InvalidSkyPilotConfigError",
        "NoCloudAccessError",
        "NoWorkspaceAccessError",
        "NotSupportedError",
        "PermissionDeniedError",
        "ResourcesUnavailableError",
        "UserRequestRejectedByPolicy",
        "ValueError",
    }
)
_PATHS: Final[Mapping[Verb, str]] = {
    "up": "/serve/up",
    "update": "/serve/update",
    "down": "/serve/down",
}
Goal = Workload | steps.Removal


class Outbox:
    """`environ` is where secrets are looked up."""

    def __init__(
        self, api: SkyPilotApi, notes: Notes, owner: str, environ: Mapping[str, str]
    ) -> None:
        self._api = api
        self._notes = notes
        self._owner = owner
        self._environ = environ

    async def prepare(self, goal: Goal, step: steps.Step) -> tuple[Verb, dict[str, Any]]:
        """What to send; a new template has passed SkyPilot's optimizer.

        Raises:
            Refusal: SkyPilot says that it cannot run.
            Stalled: it cannot run as written, or a secret is missing.
            BackendUnreachable: SkyPilot did not say.
        """
        if not isinstance(goal, Workload):
            return "down", {"service_names": [goal.name], "purge": False}
        body = self._body(goal)
        if not isinstance(step, steps.Update) or step.rolls:
            await self._api.check(_yaml(service_task(goal, self._owner) | {"secrets": {}}))
        if isinstance(step, steps.Update):
            return "update", {**body, "mode": step.mode}
        return "up", body

    async def send(self, goal: Goal, verb: Verb, body: Mapping[str, Any]) -> None:
        """Sends it; the note has its request then.

        Raises:
            Refusal: it was not taken on.
            BackendUnreachable: whether it was taken on is not known.
            OSError: it could not be written down, and was not sent.
        """
        name, note = goal.name, self._notes.of(goal.name)
        flight = Flight(verb, goal.deployment, "", 0)
        if isinstance(goal, Workload):
            flight = Flight(verb, goal.deployment, goal.spec_digest, goal.replicas)
            note = msgspec.structs.replace(
                note,
                template=template_data(goal.template),
                template_digest=goal.spec_digest,
                drain_timeout_s=goal.rollout.drain_timeout,
            )
        await self._notes.write(name, msgspec.structs.replace(note, flight=flight), sync=True)
        log.info("%s: asking SkyPilot: %s", name, verb)
        try:
            request_id = await self._api.submit(_PATHS[verb], body)
        except Refusal:
            await self._notes.landed(name)
            raise
        flight = msgspec.structs.replace(flight, request_id=request_id)
        await self._notes.write(name, msgspec.structs.replace(note, flight=flight), sync=True)

    def secrets(self, workload: Workload) -> dict[str, str]:
        """Values for SkyPilot; those in Kubernetes stay there.

        Raises:
            Stalled: one is missing.
        """
        named = workload.template.runtime.secrets
        sent = {n: ref for n, ref in named.items() if ref.kubernetes_secret is None}
        return resolve(sent, self._environ)

    def words(self, goal: Goal | None, verb: str, error: Refusal) -> str:
        """A refusal for people, without the values of secrets that SkyPilot may have repeated."""
        text = plain(str(error))
        if isinstance(goal, Workload):
            try:
                text = redact(text, self.secrets(goal).values())
            except ReconcileError:
                text = "its text is not shown, as the secrets in it cannot be told any more"
        return f"SkyPilot refused to {verb}: {error.kind}: {text}"

    def _body(self, workload: Workload) -> dict[str, Any]:
        """What says what to run; it holds the values of secrets, and goes nowhere else."""
        task = service_task(workload, self._owner)
        if values := self.secrets(workload):
            task["secrets"] = values
        body: dict[str, Any] = {"service_name": workload.name, "task": _yaml(task)}
        if namespace := workload.template.scheduling.namespace:
            body["override_skypilot_config"] = {"kubernetes": {"namespace": namespace}}
        return body


def for_a_human(error: Refusal) -> bool:
    """Trying again alone changes nothing."""
    return error.kind in _FOR_A_HUMAN


def plain(text: str) -> str:
    """Without colours and line breaks, and not endless."""
    return " ".join(_ANSI.sub("", text).split())[:500]


def _yaml(task: Mapping[str, Any]) -> str:
    """JSON is YAML."""
    return msgspec.json.encode(task).decode()
