"""Programs that run once to their end, as supervised processes: told a job, it is run, and never twice.

What was started is on disk, and so is how it ended (job_runner), so a reconciler that comes back finds
either a process, or its end. A job that fails is tried again as often as it says; another spec, or
another `run`, is another job. Not here: replicas that serve (fleet).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import msgspec

from reconciler.again import backoff_s
from reconciler.backends.local import job_runner, log_writer
from reconciler.backends.local.exit_watch import ExitWatch, reap
from reconciler.backends.local.launch import prepare
from reconciler.backends.local.processes import (
    Mark,
    ProcessId,
    boot_id,
    identify_child,
    is_alive,
    kill_session,
    send,
    spawn,
)
from reconciler.backends.local.state import StateDir, WorkloadRecord
from reconciler.core.observed import ObservedReplica, ObservedWorkload, Phase
from reconciler.core.plan import template_data
from reconciler.core.workload import Workload
from reconciler.errors import Stalled

_RUN_FILE: Final = "run.json"
_AGAIN_BASE_S: Final = 1.0
_AGAIN_CAP_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt. `code` is None while it runs; `why` where there is no code to tell."""

    digest: str
    attempt: int
    pid: int
    start_ticks: int
    boot: str
    state: Literal["running", "succeeded", "failed"] = "running"
    detail: str = ""

    @property
    def process(self) -> ProcessId:
        return ProcessId(self.pid, self.start_ticks, self.boot)

    @property
    def alive(self) -> bool:
        return self.boot == boot_id() and is_alive(self.process)


@dataclass(slots=True)
class _Held:
    record: WorkloadRecord
    run: Run | None = None
    watch: ExitWatch | None = None
    log_watch: ExitWatch | None = None
    timer: asyncio.TimerHandle | None = None
    problem: str = ""
    """Why it could not be started."""

    def quiet(self) -> None:
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        if self.log_watch is not None:
            self.log_watch.close()
            self.log_watch = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


@dataclass(slots=True)
class LocalJobs:
    """All jobs of one owner and place. `news` is called when an observation would differ."""

    state: StateDir
    mark: Mark
    news: Callable[[], None]
    environ: Mapping[str, str]
    host: str
    log_size_bytes: int
    held: dict[str, _Held] = field(default_factory=dict)

    def check(self, workload: Workload) -> None:
        """Raises Stalled for what can never be run here."""
        prepare(
            workload.template, host=self.host, port=0, replica=workload.name, inherited=self.environ
        )

    def take(self, record: WorkloadRecord) -> None:
        """A job that is promised on disk: begins it, or finds what became of it."""
        name = record.workload.name
        held = self.held.get(name)
        if held is None:
            held = self.held[name] = _Held(record, self._read(name))
            if held.run is not None and held.run.alive:
                self._watch(held, held.run)
        held.record = record
        self.converge(name)

    def converge(self, name: str) -> None:
        """The next step of one job."""
        held = self.held.get(name)
        if held is None:
            return
        workload, run = held.record.workload, held.run
        if held.timer is not None:
            held.timer.cancel()
            held.timer = None
        if run is not None and run.state == "running" and not run.alive:
            run = held.run = self._ended(name, run)
            if run.state == "failed" and workload.replicas == 0:
                # It was suspended, which is no failure of its own: it begins anew when it may.
                run = held.run = None
                (self.state.workloads / name / _RUN_FILE).unlink(missing_ok=True)
            else:
                self._write(name, run)
            if held.watch is not None:
                held.watch.close()
                held.watch = None
            self.news()
        running = run is not None and run.state == "running"
        wanted = not held.record.deleting and workload.replicas > 0
        if running and run is not None and (not wanted or run.digest != workload.spec_digest):
            self._stop(held, run)
        elif held.record.deleting and not running:
            held.quiet()
            del self.held[name]
            self.state.remove_workload(name)
            self.news()
        elif wanted and not running:
            self._start_if_due(held)

    def observed(self) -> dict[str, ObservedWorkload]:
        return {name: _observed(held) for name, held in sorted(self.held.items())}

    def close(self) -> None:
        """Forgets all of them; they run on."""
        for held in self.held.values():
            held.quiet()
        self.held.clear()

    def _start_if_due(self, held: _Held) -> None:
        workload, run = held.record.workload, held.run
        job = workload.template.job
        assert job is not None
        if run is None or run.digest != workload.spec_digest:
            self._start(held, 1)
        elif run.state == "failed" and run.attempt <= job.retries:
            pause_s = backoff_s(
                run.attempt,
                base_s=_AGAIN_BASE_S,
                cap_s=_AGAIN_CAP_S,
            )
            loop = asyncio.get_running_loop()
            held.timer = loop.call_later(pause_s, self._again, workload.name, run)

    def _again(self, name: str, after: Run) -> None:
        held = self.held.get(name)
        if held is not None and held.run == after and not held.record.deleting:
            held.timer = None
            if held.record.workload.spec_digest == after.digest and held.record.workload.replicas:
                self._start(held, after.attempt + 1)

    def _start(self, held: _Held, attempt: int) -> None:
        workload = held.record.workload
        job = workload.template.job
        assert job is not None
        name, run_id = workload.name, f"{workload.name}-{workload.spec_digest[:8]}-{attempt}"
        held.problem = ""
        try:
            launch = prepare(
                workload.template, host=self.host, port=0, replica=run_id, inherited=self.environ
            )
            exit_file = self._exit_file(name, workload.spec_digest, attempt)
            exit_file.unlink(missing_ok=True)
            argv = [
                *(sys.executable, "-I", "-S", job_runner.__file__, str(exit_file)),
                *(str(job.timeout), launch.program, *launch.argv[1:]),
            ]
            process, writer = self._spawn(run_id, argv, launch.environ)
            if held.log_watch is not None:
                held.log_watch.close()
            held.log_watch = ExitWatch(writer, lambda: _forget(writer))
        except Stalled as error:
            held.problem = str(error)
        except OSError as error:
            held.problem = f"it cannot be started: {error.strerror or error}"
        else:
            run = held.run = Run(
                workload.spec_digest, attempt, process.pid, process.start_ticks, process.boot
            )
            self._write(name, run)
            self._watch(held, run)
        self.news()

    def _spawn(
        self, run_id: str, argv: list[str], environ: Mapping[str, str]
    ) -> tuple[ProcessId, ProcessId]:
        """The job's process, and who writes its log."""
        path, marks = self.state.log_path(run_id), self.mark.environ()
        writer = [sys.executable, "-I", "-S", log_writer.__file__, str(path)]
        null = os.open(os.devnull, os.O_RDWR)
        read_end, write_end = os.pipe()
        try:
            log_pid = spawn(
                sys.executable,
                [*writer, str(self.log_size_bytes)],
                marks,
                stdin=read_end,
                output=null,
            )
            pid = spawn(sys.executable, argv, {**environ, **marks}, stdin=null, output=write_end)
            return identify_child(pid), identify_child(log_pid)
        finally:
            for descriptor in (null, read_end, write_end):
                os.close(descriptor)

    def _watch(self, held: _Held, run: Run) -> None:
        name = held.record.workload.name
        loop = asyncio.get_running_loop()

        def ended() -> None:
            reap(run.process)
            loop.call_soon(self.converge, name)

        held.watch = ExitWatch(run.process, ended)

    def _stop(self, held: _Held, run: Run) -> None:
        send(run.process, signal.SIGTERM)
        loop = asyncio.get_running_loop()
        grace_s = held.record.workload.rollout.drain_timeout
        held.timer = loop.call_later(grace_s, kill_session, run.process)

    def _ended(self, name: str, run: Run) -> Run:
        try:
            told = msgspec.json.decode(
                self._exit_file(name, run.digest, run.attempt).read_bytes(), type=_Exit
            )
        except (OSError, msgspec.DecodeError):
            return replace(run, state="failed", detail="it ended without a word of how")
        if told.code == 0 and not told.why:
            return replace(run, state="succeeded")
        detail = told.why or f"it ended with {_words(told.code)}"
        tail = self.state.log_tail(f"{name}-{run.digest[:8]}-{run.attempt}", lines=3)
        return replace(run, state="failed", detail=f"{detail}: {tail}" if tail else detail)

    def _exit_file(self, name: str, digest: str, attempt: int) -> Path:
        return self.state.workloads / name / f"exit-{digest[:8]}-{attempt}.json"

    def _read(self, name: str) -> Run | None:
        try:
            return msgspec.json.decode(
                (self.state.workloads / name / _RUN_FILE).read_bytes(), type=Run
            )
        except (OSError, msgspec.DecodeError):
            return None

    def _write(self, name: str, run: Run) -> None:
        path = self.state.workloads / name / _RUN_FILE
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(run))
        fresh.replace(path)


class _Exit(msgspec.Struct):
    code: int | None = None
    why: str = ""


def _forget(ended: ProcessId) -> None:
    reap(ended)


def _words(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}"
    return f"code {code}"


def _observed(held: _Held) -> ObservedWorkload:
    workload, run = held.record.workload, held.run
    replicas: tuple[ObservedReplica, ...] = ()
    if held.problem:
        phase, detail = Phase.FAILED, held.problem
        replicas = (ObservedReplica(workload.name, phase, workload.spec_digest, None, detail),)
    elif run is not None:
        phases = {"running": Phase.RUNNING, "succeeded": Phase.SUCCEEDED, "failed": Phase.FAILED}
        job, phase, detail = workload.template.job, phases[run.state], run.detail
        if run.state == "failed" and job is not None and run.attempt <= job.retries:
            phase, detail = Phase.PENDING, f"to be tried again: {detail}"
        replicas = (
            ObservedReplica(
                id=f"{workload.name}-{run.digest[:8]}-{run.attempt}",
                phase=phase,
                spec_digest=run.digest,
                detail=detail,
                restarts=run.attempt - 1,
            ),
        )
    return ObservedWorkload(
        name=workload.name,
        deployment=workload.deployment,
        spec_digest=workload.spec_digest,
        replicas_wanted=workload.replicas,
        replicas=replicas,
        deleting=held.record.deleting,
        template=template_data(workload.template),
    )
