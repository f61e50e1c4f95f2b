"""Which ceilings a request stands under, what it is taken to need, and how a client is told it is too much.

Of a tenant, of one of its keys, of a function; and the tenant's budget of the month. Not here: counting
(shares), or what a request needed in the end (usage).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from router.core.errors import Refusal
from router.core.shares import Failing, Level, Limit
from schemas.wire import redis_keys, routing

NANO: Final = 10**9
ANSWER_TOKENS: Final = 256
"""What an answer is taken to have where its request sets no bound."""
_BYTES_A_TOKEN: Final = 4
_BOUNDS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_AUDIO: Final = frozenset({"transcription", "translation"})
_ANSWERLESS: Final = frozenset({"embeddings", "rerank", "score", "tokenize"})
_NO_LIMITS: Final = routing.Limits()
_NO_BUDGET: Final = routing.Budget()


def month_of(unix_s: float) -> str:
    """`2026-11`, in UTC."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m")


def month_end(unix_s: float) -> float:
    """Unix seconds at which the month ends, in UTC."""
    at = datetime.fromtimestamp(unix_s, UTC)
    years, month = divmod(at.month, 12)
    return datetime(at.year + years, month + 1, 1, tzinfo=UTC).timestamp()


def limited(table: routing.RoutingTable) -> bool:
    """Whether the table sets any limit or budget at all."""
    return any(f.limits != _NO_LIMITS for f in table.functions) or any(
        t.limits != _NO_LIMITS
        or (t.budget.monthly_usd, t.budget.monthly_tokens) != (None, None)
        or any(k.limits != _NO_LIMITS for k in t.keys)
        for t in table.tenants
    )


def _of(limits: routing.Limits, level: Level, name: str) -> Iterator[Limit]:
    base = f"{redis_keys.LIMIT}{level}:{name}:"
    if limits.requests_per_minute is not None:
        yield Limit(base + "requests", "requests", level, limits.requests_per_minute, 0)
    if limits.tokens_per_minute is not None:
        yield Limit(base + "tokens", "tokens", level, limits.tokens_per_minute, 1)
    if limits.concurrent is not None:
        yield Limit(base + "concurrent", "concurrent", level, limits.concurrent, 0)


def limits_of(
    tenant: routing.Tenant, key: routing.Key, function: routing.Function, month: str
) -> tuple[Limit, ...]:
    """Every ceiling a request stands under, the narrowest last asked first."""
    budget, name = tenant.budget, tenant.name
    ledger = redis_keys.usage_month(month)
    out = [
        *_of(key.limits, "key", f"{name}/{key.id}"),
        *_of(tenant.limits, "tenant", name),
        *_of(function.limits, "function", function.name),
    ]
    if budget.monthly_usd is not None:
        key_name = redis_keys.budget(name, month, "nano_usd")
        ceiling = round(budget.monthly_usd * NANO)
        out.append(Limit(key_name, "budget_usd", "tenant", ceiling, 2, name, ledger))
    if budget.monthly_tokens is not None:
        key_name = redis_keys.budget(name, month, "tokens")
        ceiling = budget.monthly_tokens
        out.append(Limit(key_name, "budget_tokens", "tenant", ceiling, 1, name, ledger))
    return tuple(out)


def estimated(
    task: str, body_bytes: int, parsed: Mapping[str, Any], max_model_len: int | None
) -> tuple[int, int]:
    """Tokens of a request's prompt and of its answer at most, until the engine says.

    By the size of the body, and by the bound that it sets on the answer. `parsed` is the body, as far
    as it is known; a form's size says nothing of what is said in its audio.
    """
    prompt = 0 if task in _AUDIO else -(-body_bytes // _BYTES_A_TOKEN)
    if max_model_len is not None:
        prompt = min(prompt, max_model_len)
    if task in _ANSWERLESS:
        return prompt, 0
    answer = ANSWER_TOKENS
    for name in _BOUNDS:
        if name in parsed:
            bound = parsed[name]
            if type(bound) is int and bound >= 0:
                answer = bound
                break
    choices = parsed.get("n")
    if type(choices) is int and choices > 1:
        answer *= choices
    return prompt, answer


def price_nano_usd(price: routing.Price, input_tokens: int, output_tokens: int) -> int:
    """What so many tokens cost at most: nothing of the prompt in a cache. USD a million is nano-USD x 1000."""
    return math.ceil((price.input * input_tokens + price.output * output_tokens) * 1000)


# What clients are told

_WORDS: Final = {
    "requests": ("requests per min (RPM)", "requests"),
    "tokens": ("tokens per min (TPM)", "tokens"),
    "concurrent": ("concurrent requests", "requests"),
}
_SLOT_WAIT_S: Final = 1.0
_TOKENS_WAIT_S: Final = 1.0


def over_limit(
    failing: Failing, model: str, month_ends_in_s: float, remaining: int | None
) -> Refusal:
    """429, as OpenAI says it. A ceiling of the function tells nothing of what others use.

    `remaining`: of the share that is out; None: nobody can tell.
    """
    share, amount = failing.share, failing.amount
    limit = share.limit
    if limit.role in ("budget_usd", "budget_tokens"):
        return Refusal(
            429,
            "You exceeded your current quota: this account's budget of the month is used up, or held "
            "by requests that still run. It begins anew with the month, in UTC.",
            "insufficient_quota",
            "insufficient_quota",
            retry_after_s=month_ends_in_s,
        )
    what, kind = _WORDS[limit.role]
    whose = {"tenant": "this account", "key": "this API key", "function": "all accounts"}
    own = limit.level != "function"
    head = f"Rate limit reached for `{model}` on {what} of {whose[limit.level]}"
    if failing.never:
        return Refusal(
            429,
            f"Request too large for `{model}` on {what} of {whose[limit.level]}: Limit {limit.limit}, "
            f"Requested {amount}. Ask for fewer tokens.",
            kind,
            "rate_limit_exceeded",
            elsewhere=not own,
        )
    wait_s = failing.wait_s
    if wait_s is None:
        wait_s = _SLOT_WAIT_S if limit.role == "concurrent" else _TOKENS_WAIT_S
    numbers = f"Limit {limit.limit}"
    if own and remaining is not None:
        numbers += f", Used {max(0, limit.limit - remaining)}"
    return Refusal(
        429,
        f"{head}: {numbers}, Requested {amount}. Please try again in {shown_duration(wait_s)}.",
        kind,
        "rate_limit_exceeded",
        retry_after_s=wait_s,
        retry=True,
        more_headers=rate_headers(limit, remaining or 0, wait_s) if own else (),
        elsewhere=not own,
    )


def shown_duration(seconds: float) -> str:
    """As OpenAI writes them: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{max(1, math.ceil(seconds * 1000))}ms"
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"


def rate_headers(limit: Limit, remaining: int, reset_s: float) -> tuple[tuple[str, str], ...]:
    """`x-ratelimit-*` of a rate that is out; none for what has no such header."""
    if limit.role not in ("requests", "tokens"):
        return ()
    return (
        (f"x-ratelimit-limit-{limit.role}", str(limit.limit)),
        (f"x-ratelimit-remaining-{limit.role}", str(remaining)),
        (f"x-ratelimit-reset-{limit.role}", shown_duration(reset_s)),
    )
