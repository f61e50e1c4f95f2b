"""Hypothesis strategies for whole valid objects, as plain data: what a YAML file would hold."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from schemas.quantities import format_duration, format_size

Plain = dict[str, Any]

names = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True)
words = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
hashes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
env_names = st.from_regex(r"[A-Z_][A-Z0-9_]{0,10}", fullmatch=True)
free_text = st.text(max_size=20)
durations = st.integers(0, 366 * 86_400_000).map(lambda ms: format_duration(ms / 1000))
positive_durations = st.integers(1, 366 * 86_400_000).map(lambda ms: format_duration(ms / 1000))
sizes = st.one_of(
    st.integers(1, 2**60).map(format_size),
    st.sampled_from(["16Gi", "80GB", "1.5Ti", "512 Mi", "1024", "250k"]),
)
shares = st.floats(0, 100)
amounts = st.floats(0, 1e9)
counts = st.integers(0, 10**9)
instants = st.datetimes().map(lambda at: at.isoformat() + "Z")


def record(required: Plain | None = None, **optional: st.SearchStrategy[Any]) -> Any:
    return st.fixed_dictionaries(required or {}, optional=optional)


def lists(of: st.SearchStrategy[Any], at_least: int = 0) -> Any:
    return st.lists(of, unique=True, min_size=at_least, max_size=4)


def limits() -> Any:
    ceiling = st.none() | counts
    return record(requestsPerMinute=ceiling, tokensPerMinute=ceiling, concurrent=ceiling)


def weights() -> Any:
    weight = st.floats(0.01, 10)
    return record(kvCache=weight, session=weight, load=weight, latency=weight)


policies = st.sampled_from(["expected-latency", "linear", "least-load", "session", "round-robin"])
affinity = record(enabled=st.booleans(), ttl=positive_durations)
timeouts = record(
    connect=positive_durations, firstByte=positive_durations, betweenChunks=positive_durations
)
queue = record(maxWait=st.just("0s") | positive_durations, maxRequests=st.integers(1, 100_000))
retries = record(attempts=st.integers(0, 10), budgetPercent=shares)


def objects(kind: str, spec: st.SearchStrategy[Any]) -> st.SearchStrategy[Plain]:
    label_keys = st.from_regex(r"([a-z0-9]{1,5}/)?[A-Za-z0-9]{1,8}", fullmatch=True)
    metadata = record(
        {"name": names},
        labels=st.dictionaries(label_keys, st.just("") | names, max_size=2),
        annotations=st.dictionaries(label_keys, free_text, max_size=2),
    )
    return st.fixed_dictionaries(
        {
            "apiVersion": st.just("detoserve.ai/v1alpha1"),
            "kind": st.just(kind),
            "metadata": metadata,
            "spec": spec,
        }
    )


secrets = st.one_of(
    record({"fromEnv": env_names}),
    record({"fromFile": words.map("/run/{}".format)}),
    record({"kubernetesSecret": names.map("{}/token".format)}),
)


@st.composite
def stages(draw: st.DrawFn) -> Plain:
    gpus = draw(st.integers(1, 4))
    return {
        "replicas": draw(st.integers(1, 2)),
        "gpus": gpus,
        "tensorParallel": draw(st.integers(1, gpus)),
        "args": draw(st.lists(free_text, max_size=2)),
    }


@st.composite
def runtimes(draw: st.DrawFn) -> Plain:
    engine = draw(st.sampled_from(["vllm", "sglang", "triton", "dynamo", "llm-d", "custom"]))
    made: Plain = draw(
        record(
            version=st.none() | words,
            image=st.none() | words,
            args=st.lists(free_text, max_size=3),
            env=st.dictionaries(env_names.map("A{}".format), free_text, max_size=2),
            secrets=st.dictionaries(env_names.map("B{}".format), secrets, max_size=2),
            tensorParallel=st.integers(1, 4),
            pipelineParallel=st.integers(1, 4),
            maxModelLen=st.none() | st.integers(1, 10**6),
            prefixCaching=st.booleans(),
        )
    )
    if engine == "custom":
        made["command"] = draw(st.lists(free_text, min_size=1, max_size=3))
    if engine in ("dynamo", "llm-d") and draw(st.booleans()):
        made["disaggregation"] = {"prefill": draw(stages()), "decode": draw(stages())}
    return {"engine": engine, **made}


@st.composite
def scalings(draw: st.DrawFn) -> Plain:
    least = draw(st.integers(0, 500))
    most = draw(st.integers(max(1, least), 512))
    made: Plain = draw(record(upscaleDelay=durations, downscaleDelay=durations))
    made |= {"minReplicas": least, "maxReplicas": most}
    if draw(st.booleans()):
        metric = draw(st.sampled_from(["qps", "queueDepth", "kvUsage", "ttft", "concurrency"]))
        made |= {"metric": metric, "target": draw(st.floats(0.01, 1))}
    return made


uris = st.sampled_from(
    ["hf://org/name", "hf://org/name@refs/pr/1", "s3://b/p/q", "oci://r.example/n:1", "/m", "./m"]
)
functions = objects(
    "Function",
    record(
        {
            "model": record(
                {"uri": uris},
                format=st.sampled_from(["safetensors", "gguf"]),
                quantization=st.none() | words,
                servedName=st.none() | words,
                aliases=lists(words),
                tasks=lists(st.sampled_from(["chat", "embeddings", "rerank"]), at_least=1),
            ),
            "runtime": runtimes(),
        },
        resources=record(
            gpu=record({"types": lists(names, at_least=1), "count": st.integers(16, 64)}),
            cpu=st.floats(0.1, 1024),
            memory=sizes,
            disk=sizes,
        ),
        scaling=scalings(),
        readiness=record(
            path=words.map("/{}".format),
            initialDelay=durations,
            timeout=positive_durations,
            interval=positive_durations,
            failureThreshold=st.integers(1, 100),
        ),
        routing=record(
            policy=policies,
            weights=weights(),
            sessionAffinity=affinity,
            timeouts=timeouts,
            retries=retries,
            queue=queue,
            maxConcurrent=st.integers(1, 1000),
            fallbacks=lists(names),
        ),
        limits=limits(),
        price=record(
            inputPerMillion=amounts, outputPerMillion=amounts, cachedInputPerMillion=amounts
        ),
    ),
)


@st.composite
def gpu_shares(draw: st.DrawFn) -> Plain:
    quota = draw(st.integers(0, 100))
    return {
        "quota": quota,
        "limit": draw(st.none() | st.integers(quota, 200)),
        "overQuotaWeight": draw(amounts),
    }


globs = st.sampled_from(["*", "chat-*", "llama-?", "a[bc]"]) | names
keys = record(
    {"id": st.from_regex(r"[A-Za-z0-9_-]{1,10}", fullmatch=True), "sha256": hashes},
    expires=st.none() | instants,
    scopes=lists(st.sampled_from(["inference", "debug", "usage"]), at_least=1),
    limits=limits(),
)
tenants = objects(
    "Tenant",
    record(
        keys=st.lists(keys, max_size=3, unique_by=(lambda k: k["id"], lambda k: k["sha256"])),
        models=lists(globs),
        clusters=lists(globs),
        residency=lists(words),
        limits=limits(),
        budget=record(monthlyUSD=st.none() | amounts, monthlyTokens=counts, softPercent=shares),
        gpus=gpu_shares(),
        namespace=st.none() | names,
        priority=st.integers(-100, 100),
        weight=st.floats(0.01, 1000),
        suspend=st.booleans(),
    ),
)

providers = st.one_of(
    record({"type": st.just("local")}, maxProcesses=st.integers(1, 1024)),
    record({"type": st.just("kubernetes"), "context": words}, namespace=names),
    record({"type": st.just("slurm"), "cluster": words}, partition=words),
    record({"type": st.just("cloud"), "cloud": st.just("aws"), "region": words}, zone=words),
    record(
        {
            "type": st.just("external"),
            "endpoints": st.lists(
                record(
                    {"url": names.map("https://{}.example:8443/base".format), "function": names}
                ),
                min_size=1,
                max_size=3,
                unique_by=str,
            ),
        }
    ),
)
clusters = objects(
    "Cluster",
    record(
        {"provider": providers},
        region=words,
        rtt=durations,
        gpus=st.lists(
            record({"type": names, "count": counts}, pricePerHour=amounts),
            max_size=3,
            unique_by=lambda gpu: gpu["type"],
        ),
        kai=st.just({"enabled": False}),
        agentKeySha256=hashes,
        endpointCidrs=st.just(["10.0.0.0/8", "fd00::/8"]),
        residency=lists(words),
    ),
)

rollouts = st.one_of(
    record(
        strategy=st.sampled_from(["rolling", "blueGreen"]),
        maxSurge=st.integers(1, 64),
        drainTimeout=durations,
    ),
    record(
        {
            "strategy": st.just("canary"),
            "steps": st.lists(st.integers(1, 100), unique=True, min_size=1, max_size=4).map(
                lambda weights: [{"weightPercent": w, "hold": "5m"} for w in sorted(weights)]
            ),
        },
        gates=record(
            maxErrorPercent=shares, maxTtftIncreasePercent=amounts, minCacheHitRatioPercent=shares
        ),
    ),
)
constraints = record(
    regions=lists(words),
    residency=lists(words),
    spot=st.sampled_from(["never", "allowed", "only"]),
    maxPricePerHour=st.floats(0.01, 1000),
)
placements = st.one_of(
    record({"cluster": names}, constraints=constraints),
    record({"anyOf": lists(names, at_least=1)}, constraints=constraints),
)
deployments = objects(
    "Deployment",
    st.builds(
        lambda whose, rest: {**whose, **rest},
        st.one_of(
            record({"tenants": lists(names, at_least=1)}, shared=st.just(False)),
            record({"shared": st.just(True)}, tenants=st.just([])),
        ),
        record(
            {"function": names, "placement": placements},
            replicas=st.none() | st.integers(0, 512),
            weight=st.integers(0, 1000),
            shadow=st.none() | record({"percent": st.floats(0.01, 100)}),
            rollout=rollouts,
            suspend=st.booleans(),
        ),
    ),
)

platforms = objects(
    "Platform",
    record(
        prune=record(
            maxDeletions=counts,
            maxDeletionsPercent=shares,
            orphans=st.sampled_from(["report", "delete"]),
        ),
        intervals=record(
            poll=positive_durations, resync=positive_durations, statusDebounce=durations
        ),
        status=record(branch=st.sampled_from(["detoserve/status", "status", "a/b_c-1.2"])),
        routing=record(
            policy=policies,
            weights=weights(),
            sessionAffinity=affinity,
            timeouts=timeouts,
            retries=retries,
            queue=queue,
        ),
        auth=record(maxTableAge=positive_durations),
    ),
)

any_object = st.one_of(functions, tenants, clusters, deployments, platforms)
