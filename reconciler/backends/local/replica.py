"""One engine from start to end: its processes, whether it is ready, how it drains, why it failed.

    STARTING -> READY <-> NOT_READY          probes decide
    any of them -> FAILED                    it ended, or was not ready for too long; started again
                                             by the backend, as a new replica
    any of them -> DRAINING -> gone          released or timed out: SIGTERM, time, SIGKILL

Not here: which replicas there should be (rollout), or their order (backend).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from reconciler.again import backoff_s
from reconciler.backends.local import log_writer
from reconciler.backends.local.exit_watch import ExitWatch, reap
from reconciler.backends.local.processes import (
    Mark,
    ProcessId,
    foreign_listener,
    identify_child,
    kill_session,
    send,
    spawn,
)
from reconciler.backends.local.state import ReplicaProcesses, ReplicaRecord, StateDir
from reconciler.backends.probe import Prober, follow
from reconciler.backends.secret_values import redact
from reconciler.core.observed import ObservedReplica, Phase

log = logging.getLogger("detoserve.local")


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """How engines on this machine are treated; what a Function says comes on top."""

    host: str = "127.0.0.1"
    restart_base_s: float = 0.5
    """The pause before the first restart; it doubles with every further failure."""
    restart_cap_s: float = 60.0
    restart_jitter: float = 0.2
    healthy_after_s: float = 60.0
    """An engine that was ready for so long starts with a clean slate when it crashes."""
    unserved_grace_s: float = 5.0
    """Between SIGTERM and SIGKILL for an engine that never got a request."""
    log_size_bytes: int = 8 * 2**20
    """Of the current log; one older file of that size is kept beside it."""
    tail_lines: int = 5


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every replica of a backend shares. `secrets` are a template's values, to hide them."""

    settings: ReplicaSettings
    state: StateDir
    mark: Mark
    prober: Prober
    changed: Callable[[Replica], None]
    secrets: Callable[[ReplicaRecord], Sequence[str]]


class Replica:
    """Construct, then exactly one of `start`, `adopt`, `could_not_start`. `changed` tells of news."""

    def __init__(self, record: ReplicaRecord, around: Surroundings) -> None:
        self.record = record
        self.phase = Phase.STARTING
        self.detail = ""
        self.due_at = 0.0
        """On the loop's clock: when a FAILED one may be started again."""
        self._around = around
        self._loop = asyncio.get_running_loop()
        self._processes: ReplicaProcesses | None = None
        self._watches: list[ExitWatch] = []
        self._probing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ready_since: float | None = None
        self._port_is_ours = False
        self._served = False
        self._released = False
        self._failed_why = ""

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def has_process(self) -> bool:
        return self._processes is not None

    @property
    def url(self) -> str:
        return f"http://{self._around.settings.host}:{self.record.port}"

    def observed(self) -> ObservedReplica:
        never_served = self.phase is Phase.DRAINING and not self._served
        return ObservedReplica(
            id=self.id,
            phase=self.phase,
            spec_digest=self.record.spec_digest,
            url=None if never_served or self.phase is Phase.FAILED else self.url,
            detail=self.detail,
            restarts=self.record.restarts,
        )

    def start(self, program: str, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        """Starts the engine and who writes its log. The record must be on disk already.

        Raises:
            OSError: it cannot be started; no engine is left of the attempt.
        """
        around, mark = self._around, self._around.mark
        path, size_bytes = around.state.log_path(self.id), around.settings.log_size_bytes
        writer_argv = [sys.executable, "-I", "-S", log_writer.__file__, str(path), str(size_bytes)]
        null = os.open(os.devnull, os.O_RDWR)
        read_end, write_end = os.pipe()
        try:
            writer = identify_child(
                spawn(sys.executable, writer_argv, mark.environ(), stdin=read_end, output=null)
            )
            self._watches.append(ExitWatch(writer, lambda: self._log_is_whole(writer)))
            marked = {**environ, **mark.environ(self.id)}
            engine = identify_child(spawn(program, argv, marked, stdin=null, output=write_end))
        finally:
            for descriptor in (null, read_end, write_end):
                os.close(descriptor)
        try:
            self._watches.append(ExitWatch(engine, self._ended))
        except OSError:
            # What cannot be watched must not run: nobody would know when it ends.
            kill_session(engine)
            raise
        self._processes = ReplicaProcesses(engine, writer)
        with self._tolerated("its process"):
            around.state.write_processes(self.id, self._processes)
        self._begin()

    def adopt(self, processes: ReplicaProcesses) -> None:
        """Takes over a process that an earlier reconciler started; it notices nothing."""
        self._processes = processes
        self._watches.append(ExitWatch(processes.engine, self._ended))
        # Ready until it is found not to be: who streams from it now must not lose it.
        self._served = self._port_is_ours = self.record.ready
        if self.record.draining:
            self._served = True
            self._drain(self.record.drain_timeout_s)
            return
        if self.record.ready:
            self.phase, self._ready_since = Phase.READY, self._loop.time()
        self._begin()

    def could_not_start(self, why: str, *, pause: bool = True) -> None:
        """No process came of it: FAILED. Without `pause` it may be started again at once."""
        self._fail(why, count=pause)

    def drain(self, timeout_s: float) -> None:
        """No new requests; ends when released or after `timeout_s`. One that never served ends now."""
        if self.phase is Phase.DRAINING:
            return
        self.record = replace(self.record, draining=True, drain_timeout_s=timeout_s)
        if self._processes is not None:
            self._remember()
        self._drain(timeout_s)

    def release(self) -> None:
        """It may stop: SIGTERM to the engine, and SIGKILL to all of its session at the timeout."""
        if self.phase is not Phase.DRAINING or self._released or self._processes is None:
            return
        self._released = True
        self.detail = "stopping"
        send(self._processes.engine, signal.SIGTERM)
        grace_s = max(self.record.drain_timeout_s, self._around.settings.unserved_grace_s)
        if not self._served:
            grace_s = self._around.settings.unserved_grace_s
        self._after(grace_s, self._kill)
        self._around.changed(self)

    def close(self) -> None:
        """Forgets the process, which goes on."""
        self._still()
        for watch in self._watches:
            watch.close()
        self._watches.clear()

    def _begin(self) -> None:
        self._probing = asyncio.create_task(
            follow(
                self._ask,
                self.record.template.readiness,
                ready=self.phase is Phase.READY,
                report=self._answered,
            )
        )
        if self.phase is not Phase.READY:
            self._after(self.record.template.readiness.initial_delay, self._too_slow)

    async def _ask(self) -> str | None:
        readiness = self.record.template.readiness
        why = await self._around.prober.ask(self.url + readiness.path, readiness.timeout)
        if why is not None or self._port_is_ours or self._processes is None:
            return why
        engine = self._processes.engine
        holder = await asyncio.to_thread(foreign_listener, self.record.port, engine)
        self._port_is_ours = holder is None
        return None if holder is None else f"port {self.record.port} is held by {holder}"

    def _answered(self, ready: bool, why: str) -> None:
        phase = Phase.STARTING if self.phase is Phase.STARTING else Phase.NOT_READY
        phase = Phase.READY if ready else phase
        self.detail = why if phase is not Phase.STARTING else f"not ready yet: {why}"
        if phase is self.phase:
            return
        self.phase = phase
        self._served = True
        if ready:
            self._cancel_timer()
            self._ready_since = self._loop.time()
        else:
            self._after(self.record.template.readiness.initial_delay, self._too_slow)
        was_ready = self.record.was_ready or ready
        self.record = replace(self.record, ready=ready, was_ready=was_ready)
        self._remember()
        self._around.changed(self)

    def _too_slow(self) -> None:
        limit_s = self.record.template.readiness.initial_delay
        self._fail(f"not ready for {limit_s:g} s: {self.detail.removeprefix('not ready yet: ')}")
        self._kill()

    def _ended(self) -> None:
        assert self._processes is not None
        engine, self._processes = self._processes.engine, None
        # Its workers go with it, also where it was killed and could not tell them.
        kill_session(engine)
        how = reap(engine)
        self._still()
        if self.phase not in (Phase.DRAINING, Phase.FAILED):
            self._fail(how if self.record.ready else f"{how} before it was ready")
        self._around.changed(self)

    def _fail(self, why: str, *, count: bool = True) -> None:
        self._still()
        settings, now = self._around.settings, self._loop.time()
        healthy = (
            self._ready_since is not None and now - self._ready_since >= settings.healthy_after_s
        )
        failures = (0 if healthy else self.record.failures) + (1 if count else 0)
        self.record = replace(self.record, failures=failures, ready=False)
        self.phase, self._failed_why = Phase.FAILED, why
        pause_s = backoff_s(
            failures,
            base_s=settings.restart_base_s,
            cap_s=settings.restart_cap_s,
            jitter_fraction=settings.restart_jitter,
        )
        self.due_at = now + (pause_s if count else 0.0)
        self.detail = self._explain()
        log.warning("%s: %s", self.id, why)
        self._remember()
        self._around.changed(self)

    def _explain(self) -> str:
        """Why it failed; with its last words only if it never served: later ones may hold prompts."""
        if self._served:
            return f"{self._failed_why}; its log: {self.id}.log"
        tail = self._around.state.log_tail(self.id, lines=self._around.settings.tail_lines)
        if not tail:
            return self._failed_why
        return f"{self._failed_why}; last output: {redact(tail, self._around.secrets(self.record))}"

    def _log_is_whole(self, writer: ProcessId) -> None:
        reap(writer)
        if self.phase is Phase.FAILED and self._failed_why:
            self.detail = self._explain()
            self._around.changed(self)

    def _drain(self, timeout_s: float) -> None:
        self._still()
        self._served = self._served or self.phase in (Phase.READY, Phase.NOT_READY)
        self.phase = Phase.DRAINING
        self.detail = "finishes its requests"
        if self._served:
            self._after(timeout_s, self.release)
        else:
            self.release()
        self._around.changed(self)

    def _kill(self) -> None:
        if self._processes is not None:
            kill_session(self._processes.engine)

    def _remember(self) -> None:
        with self._tolerated("its state"):
            self._around.state.write_replica(self.record)

    @contextlib.contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        """A disk that does not take a note must not end what runs; marks and probes make up for it."""
        try:
            yield
        except OSError as error:
            log.warning("%s: %s cannot be recorded: %s", self.id, what, error.strerror)

    def _still(self) -> None:
        self._cancel_timer()
        if self._probing is not None:
            self._probing.cancel()
            self._probing = None

    def _after(self, delay_s: float, call: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(delay_s, call)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
