"""The simulated engine as a process: every setting as a flag and an environment variable.

Prints one JSON line to stdout when it listens, and logs to stderr. SIGTERM or SIGINT: finish what
is in flight, refuse the rest, leave; a second one: leave at once.

Exit codes: 0 all requests were finished, 1 cannot listen, 2 bad settings, 3 requests were cut off
by the shutdown timeout, 128 + n a second signal n.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from typing import Annotated

import typer
import uvloop

from agent.signals import stop_on_signals
from agent.simulated.faults import FaultPlan, parse_assignments
from agent.simulated.server import running_engine
from agent.simulated.settings import EngineSettings, EventFormat, KVEventSettings
from agent.simulated.timing import TimeModel

ENV_PREFIX = "DETOSERVE_SIM"
CONTEXT = {"auto_envvar_prefix": ENV_PREFIX, "max_content_width": 100}
"""Click settings: each option --some-name is also read from DETOSERVE_SIM_SOME_NAME."""

_CANNOT_LISTEN = 1
_CUT_OFF = 3
_INSTANT = "instant"
_LOG = logging.getLogger("agent.simulated")
_DEFAULTS = EngineSettings()
_TIME = TimeModel()


def simulate(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _DEFAULTS.host,
    port: Annotated[
        int,
        typer.Option(help="Port; 0 is any free one.", min=0, max=65535),
    ] = _DEFAULTS.port,
    served_model_name: Annotated[
        list[str],
        typer.Option(help="Name of the model; repeat for aliases. Answers carry the first."),
    ] = list(_DEFAULTS.served_model_names),  # noqa: B006 - never changed
    lora_module: Annotated[
        list[str] | None,
        typer.Option(help="Name of a LoRA adapter; may repeat."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that /v1 and /faults ask for. Prefer the variable: flags show in ps.",
            show_default=False,
        ),
    ] = None,
    max_model_len: Annotated[
        int, typer.Option(help="Tokens of prompt and answer together.")
    ] = _DEFAULTS.max_model_len,
    block_size: Annotated[
        int, typer.Option(help="Tokens in a cache block.")
    ] = _DEFAULTS.block_size,
    num_gpu_blocks_override: Annotated[
        int | None,
        typer.Option(
            "--num-gpu-blocks-override",
            "--num-blocks",
            help=f"Blocks in the cache; if left out {_DEFAULTS.num_blocks}, or more where"
            " max-model-len needs more.",
        ),
    ] = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Reuse blocks of equal prefixes.")
    ] = _DEFAULTS.enable_prefix_caching,
    max_num_seqs: Annotated[
        int, typer.Option(help="Sequences that run at once.")
    ] = _DEFAULTS.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Token budget of a step.")
    ] = _DEFAULTS.max_num_batched_tokens,
    max_num_queued_reqs: Annotated[
        int | None,
        typer.Option(
            help="Sequences in flight, running ones too, beyond which requests get 503; no bound"
            " if left out."
        ),
    ] = None,
    stream_interval: Annotated[
        int, typer.Option(help="Tokens in a streamed chunk.")
    ] = _DEFAULTS.stream_interval,
    prefill_tokens_per_s: Annotated[
        float, typer.Option(help="Prompt tokens computed a second.")
    ] = _TIME.prefill_tokens_per_s,
    attention_tokens: Annotated[
        float,
        typer.Option(
            help="Context length at which a prompt token costs twice what it does at the start."
        ),
    ] = _TIME.attention_tokens,
    itl_s: Annotated[
        float,
        typer.Option(help="Seconds between tokens of a lone answer."),
    ] = _TIME.itl_s,
    itl_batch_size: Annotated[
        float,
        typer.Option(help="Running answers that add one such time to each step."),
    ] = _TIME.itl_batch_size,
    speed: Annotated[
        str,
        typer.Option(help="Divides all times; 0 or 'instant' is no waiting at all."),
    ] = str(_TIME.speed),
    output_tokens: Annotated[
        int,
        typer.Option(help="Mean length of an answer that ends itself."),
    ] = _DEFAULTS.output_tokens,
    ignore_eos: Annotated[
        bool,
        typer.Option(help="Answers go on to max_tokens, always."),
    ] = _DEFAULTS.ignore_eos,
    seed: Annotated[
        int,
        typer.Option(help="Equal seeds answer equal prompts equally."),
    ] = _DEFAULTS.seed,
    embedding_dimensions: Annotated[
        int, typer.Option(help="Length of embeddings.")
    ] = _DEFAULTS.embedding_dimensions,
    kv_events_endpoint: Annotated[
        str | None,
        typer.Option(
            help="ZMQ endpoint events are published on, as tcp://*:5557 (bound: it has a *) or"
            " tcp://127.0.0.1:5557 (dialled). tcp://127.0.0.1:* is any free port. Off if left out."
        ),
    ] = None,
    kv_events_replay_endpoint: Annotated[
        str | None,
        typer.Option(help="ZMQ endpoint to replay from; bound."),
    ] = None,
    kv_events_topic: Annotated[str, typer.Option(help="ZMQ topic.")] = "",
    kv_events_buffer_steps: Annotated[int, typer.Option(help="Batches kept for replay.")] = 10_000,
    kv_events_format: Annotated[
        EventFormat,
        typer.Option(help="'map' as vLLM 0.32, 'array' as 0.16."),
    ] = "map",
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help=f"NAME=VALUE, as POST /faults takes them; may repeat. Names:"
            f" {', '.join(FaultPlan.__struct_fields__)}."
        ),
    ] = None,
    start_delay_s: Annotated[
        float,
        typer.Option(help="Seconds before it listens, as if a model were loaded."),
    ] = _DEFAULTS.start_delay_s,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            "--shutdown-timeout",
            help="Seconds that requests in flight get to finish after SIGTERM.",
        ),
    ] = _DEFAULTS.shutdown_timeout_s,
) -> None:
    """Run a simulated inference engine: vLLM's HTTP API, metrics and KV events, without a model.

    It prints one JSON line when it listens: {"event": "ready", "url": "http://...", ...}.
    """
    try:
        settings = EngineSettings(
            host=host,
            port=port,
            served_model_names=tuple(served_model_name),
            lora_modules=tuple(lora_module or ()),
            api_key=api_key or None,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_gpu_blocks_override
            if num_gpu_blocks_override is not None
            else max(_DEFAULTS.num_blocks, -(-max_model_len // max(1, block_size))),
            enable_prefix_caching=enable_prefix_caching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_queued_reqs=max_num_queued_reqs,
            stream_interval=stream_interval,
            time=TimeModel(
                prefill_tokens_per_s=prefill_tokens_per_s,
                attention_tokens=attention_tokens,
                itl_s=itl_s,
                itl_batch_size=itl_batch_size,
                speed=_speed(speed),
            ),
            output_tokens=output_tokens,
            ignore_eos=ignore_eos,
            seed=seed,
            embedding_dimensions=embedding_dimensions,
            kv_events=None
            if kv_events_endpoint is None
            else KVEventSettings(
                endpoint=kv_events_endpoint,
                replay_endpoint=kv_events_replay_endpoint,
                topic=kv_events_topic,
                buffer_steps=kv_events_buffer_steps,
                format=kv_events_format,
            ),
            faults=parse_assignments(fault or []),
            start_delay_s=start_delay_s,
            shutdown_timeout_s=shutdown_timeout,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    sys.exit(uvloop.run(serve(settings)))


def _speed(text: str) -> float:
    if text == _INSTANT:
        return 0.0
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"speed is {text!r}; it must be a number or {_INSTANT!r}") from None


async def serve(settings: EngineSettings) -> int:
    """Runs an engine until a signal ends it; returns the exit code."""
    stop = stop_on_signals()

    if settings.start_delay_s:
        _LOG.info("ready in %g s", settings.start_delay_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), settings.start_delay_s)
            return 0
    try:
        async with running_engine(settings, end_process=os._exit) as engine:
            ready = {
                "event": "ready",
                "url": engine.url,
                "pid": os.getpid(),
                "models": settings.model_names,
                "kv_event_sources": engine.kv_event_sources,
            }
            print(json.dumps(ready), flush=True)  # noqa: T201 - what a supervisor reads
            _LOG.info("listening on %s", engine.url)
            await stop.wait()
            _LOG.info("stopping: finishing %d requests", engine.stats["in_flight"])
            if await engine.drain(timeout_s=settings.shutdown_timeout_s):
                return 0
            _LOG.warning("cutting off %d requests", engine.stats["in_flight"])
            return _CUT_OFF
    except OSError as error:
        _LOG.error("cannot listen on %s port %d: %s", settings.host, settings.port, error)
        return _CANNOT_LISTEN
