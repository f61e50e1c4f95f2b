"""A simulated inference engine: vLLM's HTTP API, metrics, KV events and failure modes, without a model.

What is real: HTTP and its errors, the tokenizer, the prefix cache and its evictions, the scheduler,
the order and content of KV events, cancellation, draining. What is simulated: time (`timing`) and
the text (`generation`).

    settings     every setting, validated
    tokens       text <-> token ids, the chat template          pure
    generation   which tokens a request is answered with        pure
    embedding    which vector a text is answered with           pure
    prefix_cache blocks: reuse, pins, eviction                  pure
    timing       how long a step takes                          pure
    scheduler    which sequences a step serves                  pure (time is passed in)
    metrics      counters and histograms, in Prometheus text    pure
    faults       misbehaviour on demand                         pure
    kv_events    what the cache stores and forgets, as vLLM encodes it        pure
    kv_publisher the same over ZMQ, with replay
    engine       drives the scheduler in real time
    protocol     what requests may say
    openai_api   the handlers of the OpenAI API
    server       the HTTP server, its lifetime, the handlers beside the API
    command      flags and environment; the process
"""
