from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from agent.simulated.generation import Limits, Output, generate
from agent.simulated.tokens import decode, encode

prompts = st.text(max_size=50).map(lambda text: encode("p" + text))


def answer(
    prompt: str = "Hello",
    *,
    seed: int = 0,
    choice: int = 0,
    mean_tokens: int = 64,
    **limits: object,
) -> Output:
    given_limits = Limits(**{"max_tokens": 1000, **limits})  # type: ignore[arg-type]
    return generate(encode(prompt), given_limits, seed=seed, choice=choice, mean_tokens=mean_tokens)


@given(prompts, st.integers(-(2**70), 2**70), st.integers(1, 200), st.integers(1, 100))
def test_same_request_same_answer_within_its_limits(
    prompt: object, seed: int, max_tokens: int, mean: int
) -> None:
    limits = Limits(max_tokens=max_tokens)
    outputs = [generate(prompt, limits, seed=seed, mean_tokens=mean) for _ in range(2)]  # type: ignore[arg-type]
    assert outputs[0] == outputs[1]
    output = outputs[0]
    assert 1 <= len(output.tokens) <= max_tokens
    assert decode(output.tokens) == output.text
    if output.finish_reason == "length":
        assert len(output.tokens) == max_tokens
    else:
        assert mean // 2 < len(output.tokens) <= mean // 2 + mean


def test_seed_prompt_and_choice_each_make_another_text() -> None:
    texts = {answer().text, answer(seed=1).text, answer("Hallo").text, answer(choice=1).text}
    assert len(texts) == 4


def test_a_shorter_limit_gives_the_beginning_of_the_longer_text() -> None:
    long, short = answer(ignore_eos=True), answer(max_tokens=5)
    assert short.finish_reason == "length"
    assert long.text.startswith(short.text)
    assert len(long.tokens) == 1000
    assert long.finish_reason == "length"


def test_the_text_ends_by_itself_unless_told_otherwise() -> None:
    own = answer(mean_tokens=20)
    assert own.finish_reason == "stop"
    assert own.stop_reason is None
    assert own.text.endswith("end.")
    forced = answer(mean_tokens=20, min_tokens=100)
    assert len(forced.tokens) == 100


def test_the_first_stop_string_to_be_completed_ends_the_text() -> None:
    text = answer(ignore_eos=True).text
    early, late = text[42:47], text[200:207]
    output = answer(ignore_eos=True, stop=[late, early])
    assert output.finish_reason == "stop"
    assert output.stop_reason == early
    assert output.text == text[: text.find(early)]
    # the token that completed the stop string was generated, though its text is cut
    assert len(output.tokens) == -(-(text.find(early) + 5) // 4)
    kept = answer(ignore_eos=True, stop=[late, early], include_stop=True)
    assert kept.text == text[: text.find(early) + 5]
    assert answer(stop=["never said"]).stop_reason is None


@given(st.integers(1, 7), st.integers(0, 60), st.integers(1, 9))
def test_pieces_make_up_the_text(step: int, start: int, length: int) -> None:
    whole = answer(ignore_eos=True, max_tokens=40).text
    output = answer(ignore_eos=True, max_tokens=40, stop=[whole[start : start + length]])
    cuts = [*range(0, len(output.tokens), step), len(output.tokens)]
    pieces = [output.text_between(a, b) for a, b in itertools.pairwise(cuts)]
    assert "".join(pieces) == output.text
