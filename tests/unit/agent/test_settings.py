from __future__ import annotations

import pytest

from agent.simulated.settings import EngineSettings, KVEventSettings


def test_the_cache_must_hold_one_request_of_full_length() -> None:
    with pytest.raises(ValueError, match="raise the blocks to 63 or lower max_model_len"):
        EngineSettings(max_model_len=1000, num_blocks=62, block_size=16)
    assert EngineSettings(max_model_len=1000, num_blocks=63, block_size=16).kv_cache_tokens == 1008


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"served_model_names": ()}, "at least one"),
        ({"served_model_names": ("a", "a")}, "named twice"),
        ({"served_model_names": ("a",), "lora_modules": ("a",)}, "named twice"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_queued_reqs": 0}, "leave it out"),
        ({"shutdown_timeout_s": -1.0}, "negative"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineSettings(**wrong)  # type: ignore[arg-type]


def test_the_key_is_not_shown() -> None:
    assert "sk-secret" not in repr(EngineSettings(api_key="sk-secret"))


def test_replay_needs_a_buffer() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        KVEventSettings(endpoint="tcp://*:1", buffer_steps=0)
