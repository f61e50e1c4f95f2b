"""The simulated engine as a process: flags, environment, signals, exit codes."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest
from openai import AsyncOpenAI

from agent.simulated.command import simulate
from agent.simulated.settings import EngineSettings, KVEventSettings
from agent.simulated.timing import TimeModel
from tests.behaviour.agent.engine_clients import get, post
from tests.behaviour.agent.engine_process import EngineProcess, engine_process, ready_line, start
from tests.support import eventually

SLOW = ("--itl-s", "0.02", "--ignore-eos")


def client_of(engine: EngineProcess) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="unused", max_retries=0)


async def draining(engine: EngineProcess) -> bool:
    return bool((await get(f"{engine.url}/stats"))[1]["draining"])


async def test_the_ready_line_says_where_and_what() -> None:
    flags = ("--served-model-name", "chat", "--served-model-name", "alias", "--speed", "instant")
    async with engine_process(*flags) as engine:
        assert engine.ready["event"] == "ready"
        assert engine.ready["pid"] == engine.process.pid
        assert engine.ready["models"] == ["chat", "alias"]
        assert engine.ready["kv_event_sources"] == []
        assert (await get(f"{engine.url}/health"))[0] == 200
        engine.process.terminate()
        assert await engine.ended() == 0  # nothing in flight: at once


async def test_sigterm_finishes_what_is_in_flight_and_refuses_the_rest() -> None:
    async with engine_process(*SLOW) as engine, client_of(engine) as client:
        stream = await client.completions.create(
            model="simulated", prompt="x", max_tokens=40, stream=True
        )
        pieces = [(await anext(aiter(stream))).choices[0].text]
        engine.process.terminate()
        await eventually(lambda: draining(engine))
        assert (await get(f"{engine.url}/health"))[0] == 200
        status, answer = await post(f"{engine.url}/v1/completions", {"prompt": "x"})
        assert status == 500
        assert answer["error"]["message"] == "cannot schedule new futures after shutdown"
        pieces += [chunk.choices[0].text async for chunk in stream]
        assert len(pieces) == 40
        assert await engine.ended() == 0


async def test_the_shutdown_timeout_cuts_off_what_is_left() -> None:
    flags = (*SLOW, "--shutdown-timeout", "0.3")
    async with engine_process(*flags) as engine, client_of(engine) as client:
        stream = await client.completions.create(
            model="simulated", prompt="x", max_tokens=5000, stream=True
        )
        await anext(aiter(stream))
        engine.process.terminate()
        with pytest.raises(openai.APIConnectionError):
            async for _ in stream:
                pass
        assert await engine.ended() == 3


async def test_a_second_signal_ends_it_at_once() -> None:
    async with engine_process(*SLOW) as engine, client_of(engine) as client:
        stream = await client.completions.create(
            model="simulated", prompt="x", max_tokens=5000, stream=True
        )
        await anext(aiter(stream))
        engine.process.terminate()
        await eventually(lambda: draining(engine))
        engine.process.terminate()
        assert await engine.ended(timeout_s=3) == 128 + signal.SIGTERM
        await stream.close()


async def test_sigint_is_as_good() -> None:
    async with engine_process("--speed", "0") as engine:
        engine.process.send_signal(signal.SIGINT)
        assert await engine.ended() == 0


async def test_the_environment_sets_what_flags_do_not() -> None:
    environ = {
        "DETOSERVE_SIM_SERVED_MODEL_NAME": "one two",
        "DETOSERVE_SIM_SPEED": "instant",
        "DETOSERVE_SIM_API_KEY": "sk-from-the-environment",
        "DETOSERVE_SIM_FAULT": "fail_next=1 status=500",
        "DETOSERVE_SIM_MAX_MODEL_LEN": "500",
        "DETOSERVE_SIM_KV_EVENTS_ENDPOINT": "tcp://127.0.0.1:*",
    }
    async with engine_process("--max-model-len", "600", environ=environ) as engine:
        assert engine.ready["models"] == ["one", "two"]
        assert engine.ready["kv_event_sources"][0]["endpoint"].startswith("tcp://127.0.0.1:")
        assert (await get(f"{engine.url}/v1/models"))[0] == 401
        async with AsyncOpenAI(
            base_url=f"{engine.url}/v1", api_key="sk-from-the-environment", max_retries=0
        ) as client:
            models = [model async for model in client.models.list()]
            assert models[0].model_dump()["max_model_len"] == 600  # a flag outranks
            with pytest.raises(openai.InternalServerError, match="simulated fault"):
                await client.completions.create(model="one", prompt="x")
        engine.process.terminate()
        _, log = await engine.process.communicate()
        assert b"sk-from" not in log


async def test_loading_delays_listening() -> None:
    process = await start("--start-delay-s", "600")
    assert process.stderr is not None
    assert b"ready in 600 s" in await process.stderr.readline()
    process.terminate()  # and can be given up
    assert await asyncio.wait_for(process.wait(), 8) == 0
    assert process.stdout is not None
    assert await process.stdout.read() == b""

    process = await start("--start-delay-s", "0.1")
    assert (await ready_line(process))["event"] == "ready"
    process.terminate()
    await process.communicate()


async def test_a_crash_on_demand() -> None:
    async with engine_process("--speed", "0") as engine:
        assert (await post(f"{engine.url}/faults", {"exit": 7}))[0] == 200
        assert await engine.ended() == 7


async def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await start("--port", str(port))
        out, log = await asyncio.wait_for(process.communicate(), 8)
    assert process.returncode == 1
    assert out == b""
    assert f"port {port}" in log.decode()
    assert "Traceback" not in log.decode()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-blocks", "10"), "one request must fit into the cache"),
        (("--speed", "fast"), "speed is 'fast'"),
        (("--fault", "fail_nxt=1"), "fail_nxt"),
        (("--kv-events-format", "xml"), "xml"),
    ],
)
async def test_bad_settings_are_said_and_end_with_2(flags: tuple[str, ...], said: str) -> None:
    process = await start(*flags)
    _, log = await asyncio.wait_for(process.communicate(), 8)
    assert process.returncode == 2
    assert said in " ".join(log.decode().replace("│", " ").split())
    assert "Traceback" not in log.decode()


async def test_a_long_context_gets_the_blocks_it_needs() -> None:
    async with engine_process("--max-model-len", "200000") as engine:
        _, page = await get(f"{engine.url}/metrics")
        assert 'num_gpu_blocks="12500"' in page


def run_agent(*arguments: str) -> str:
    command = [sys.executable, "-c", "from agent.cli import main; main()", *arguments]
    environ = os.environ | {"COLUMNS": "100"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout


def test_every_setting_is_documented_as_flag_and_variable() -> None:
    text = run_agent("simulate", "--help")
    variables = set(re.findall(r"DETOSERVE_SIM_\w+", re.sub(r"-\n +", "-", text)))
    parameters = {
        f"DETOSERVE_SIM_{name.upper()}" for name in inspect.signature(simulate).parameters
    }
    assert variables == parameters
    # every field of the settings has a parameter, under its own name or vLLM's
    renamed = {
        "served_model_names": "served_model_name",
        "lora_modules": "lora_module",
        "num_blocks": "num_gpu_blocks_override",
        "faults": "fault",
        "shutdown_timeout_s": "shutdown_timeout",
    }
    fields = {field.name for field in dataclasses.fields(EngineSettings)} - {"time", "kv_events"}
    fields |= {field.name for field in dataclasses.fields(TimeModel)}
    fields |= {f"kv_events_{field.name}" for field in dataclasses.fields(KVEventSettings)}
    assert {renamed.get(name, name) for name in fields} == set(
        inspect.signature(simulate).parameters
    )


def test_the_agent_s_command_lists_what_there_is() -> None:
    assert "simulate" in run_agent("--help")
