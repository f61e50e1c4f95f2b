"""The OpenAI API: chat completions, completions and embeddings, models, and the tokenizer beside it.

Tools become part of the prompt, and are never called. `logprobs`, `response_format`, `tool_choice`
and sampling parameters are accepted and ignored: logprobs are null.

Not here: the other endpoints and the server's lifetime (server), what requests say (inputs), what
answers look like (answers), and what all requests pass first (gate).
"""

from __future__ import annotations

import asyncio
import time
import uuid

from aiohttp import web

from agent.simulated import embedding
from agent.simulated.answers import (
    DONE,
    ApiError,
    ChatFormat,
    Format,
    TextFormat,
    embedding_list,
    error_event,
    model_list,
)
from agent.simulated.delivery import Delivery
from agent.simulated.engine import Engine
from agent.simulated.gate import Cut, Gate, engine_dead
from agent.simulated.generation import generate
from agent.simulated.inputs import chat_prompt, check_model, limits_of, parse, prompts
from agent.simulated.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    StreamOptions,
    TokenizeRequest,
)
from agent.simulated.scheduler import EngineBusyError, Phase, Sequence
from agent.simulated.state import ServerState
from agent.simulated.tokens import Tokens, decode, encode

_STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_NO_STREAM_OPTIONS = StreamOptions()


class OpenAIApi:
    """The handlers, over one engine."""

    def __init__(self, engine: Engine, state: ServerState) -> None:
        self._engine = engine
        self._gate = Gate(engine, state)
        self._state = state
        self._started_s = state.started_s
        self._settings = engine.settings

    def routes(self) -> list[web.RouteDef]:
        inference = self._gate.inference
        return [
            web.get("/v1/models", self.models),
            web.post("/v1/chat/completions", inference(self.chat)),
            web.post("/v1/completions", inference(self.completions)),
            web.post("/v1/embeddings", inference(self.embeddings)),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
        ]

    async def models(self, request: web.Request) -> web.Response:  # noqa: ARG002 - a handler
        settings = self._settings
        return _json(
            model_list(
                settings.served_model_names,
                settings.lora_modules,
                created=int(self._started_s),
                max_model_len=settings.max_model_len,
            )
        )

    async def chat(self, request: web.Request, cut: Cut | None) -> web.StreamResponse:
        body = parse(await request.read(), ChatRequest)
        model, lora = check_model(body.model, self._settings)
        form = ChatFormat(_answer_id("chatcmpl", request), int(time.time()), model)
        prompt = chat_prompt(body.messages, body.tools)
        return await self._generate(request, body, form, [prompt], lora, cut)

    async def completions(self, request: web.Request, cut: Cut | None) -> web.StreamResponse:
        body = parse(await request.read(), CompletionRequest)
        model, lora = check_model(body.model, self._settings)
        form = TextFormat(_answer_id("cmpl", request), int(time.time()), model)
        all_prompts = prompts(body.prompt, param="prompt")
        return await self._generate(request, body, form, all_prompts, lora, cut)

    async def embeddings(self, request: web.Request, cut: Cut | None) -> web.StreamResponse:
        body = parse(await request.read(), EmbeddingRequest)
        model, lora = check_model(body.model, self._settings)
        inputs = prompts(body.input, param="input")
        longest = max(map(len, inputs))
        if longest > self._settings.max_model_len:
            raise ApiError(
                400,
                f"This model's maximum context length is {self._settings.max_model_len} tokens."
                f" However, your request contains {longest} input tokens."
                " Please reduce the length of the input.",
                param="input_tokens",
            )
        dimensions = body.dimensions or self._settings.embedding_dimensions
        if dimensions > self._settings.embedding_dimensions:
            raise ApiError(
                400,
                f"dimensions is {dimensions}; this model has"
                f" {self._settings.embedding_dimensions} at most",
                param="dimensions",
            )
        wake = asyncio.Event()
        sequences = [
            Sequence(prompt=tokens, lora=lora, embeds=True, notify=wake.set) for tokens in inputs
        ]
        self._submit(sequences)
        try:
            await self._all_ended(sequences, wake)
        finally:
            self._engine.abort(sequences)
        vectors = [embedding.embed(decode(tokens), dimensions=dimensions) for tokens in inputs]
        encoded: list[list[float] | str] = [
            embedding.to_base64(vector) if body.encoding_format == "base64" else vector
            for vector in vectors
        ]
        answer = embedding_list(
            encoded,
            answer_id=_answer_id("embd", request),
            created=int(time.time()),
            model=model,
            tokens=sum(map(len, inputs)),
        )
        return await self._send(request, answer, cut)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = parse(await request.read(), TokenizeRequest)
        check_model(body.model, self._settings)
        if body.messages is not None:
            tokens = chat_prompt(
                body.messages, body.tools, add_generation_prompt=body.add_generation_prompt
            )
        elif body.prompt is not None:
            tokens = encode(body.prompt)
        else:
            raise ApiError(400, "either 'prompt' or 'messages' is needed", param="prompt")
        return web.json_response(
            {
                "count": len(tokens),
                "max_model_len": self._settings.max_model_len,
                "tokens": tokens.tolist(),
                "token_strs": [decode([token]) for token in tokens]
                if body.return_token_strs
                else None,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = parse(await request.read(), DetokenizeRequest)
        check_model(body.model, self._settings)
        return web.json_response({"prompt": decode(body.tokens)})

    # -- what the inference endpoints share --------------------------------------------------------

    async def _generate(
        self,
        request: web.Request,
        body: ChatRequest | CompletionRequest,
        form: Format,
        all_prompts: list[Tokens[int]],
        lora: str,
        cut: Cut | None,
    ) -> web.StreamResponse:
        limits = limits_of(body, max(map(len, all_prompts)), self._settings)
        choices = body.n or 1
        seed = self._settings.seed if body.seed is None else body.seed
        wake = asyncio.Event()
        sequences = [
            Sequence(
                prompt=prompt,
                output=generate(
                    prompt,
                    limits,
                    seed=seed,
                    choice=choice,
                    mean_tokens=self._settings.output_tokens,
                ),
                cache_salt=body.cache_salt or "",
                lora=lora,
                notify=wake.set,
            )
            for prompt in all_prompts
            for choice in range(choices)
        ]
        echo = isinstance(body, CompletionRequest) and body.echo
        delivery = Delivery(sequences, choices, echo)
        self._submit(sequences)
        try:
            if body.stream:
                options = body.stream_options or _NO_STREAM_OPTIONS
                return await self._stream(request, delivery, form, options, wake, cut)
            await self._all_ended(sequences, wake)
            whole = form.whole(delivery.pieces(), delivery.usage())
            response = await self._send(request, whole, cut)
            # Written here, so that it counts only if it went out.
            await response.prepare(request)
            await response.write_eof()
            self._state.handed_out(request_id(request), delivery.usage())
            return response
        finally:
            self._engine.abort(sequences)  # no effect on those that have ended

    async def _stream(
        self,
        request: web.Request,
        delivery: Delivery,
        form: Format,
        options: StreamOptions,
        wake: asyncio.Event,
        cut: Cut | None,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        await response.prepare(request)
        interval = self._settings.stream_interval
        every_usage = options.continuous_usage_stats
        opened = False
        while not delivery.sent_all:
            await wake.wait()
            wake.clear()
            chunks = []
            for piece in delivery.new_pieces(interval):
                if not opened:
                    opened = True
                    begun = delivery.running_usage(piece.choice)._replace(completion_tokens=0)
                    chunks += form.opening(len(delivery.sequences), begun if every_usage else None)
                usage = delivery.running_usage(piece.choice) if every_usage else None
                chunks.append(form.chunk(piece, usage))
            if cut is not None:
                await cut.write(request, response, chunks)
            elif chunks:
                await response.write(b"".join(chunks))
                self._state.handed_out(request_id(request), delivery.sent_usage)
            if delivery.aborted:  # the engine died, and the head is out already
                await response.write(error_event(engine_dead()) + DONE)
                return response
        if cut is not None:  # the answer was shorter than the cut
            cut.chunks = 0
            await cut.write(request, response, [])
        tail = form.usage_chunk(delivery.usage()) if options.include_usage else b""
        await response.write(tail + DONE)
        return response

    async def _send(self, request: web.Request, body: bytes, cut: Cut | None) -> web.StreamResponse:
        if cut is None:
            return _json(body)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(body)
        await response.prepare(request)
        cut.chunks = 1
        await cut.write(request, response, [body[: len(body) // 2]])
        return response

    def _submit(self, sequences: list[Sequence]) -> None:
        try:
            self._engine.submit(sequences)
        except EngineBusyError as error:
            raise ApiError(
                503,
                "The engine is currently busy and cannot accept new requests. Please try again"
                " later or on a different instance.",
                kind="Service Unavailable",
            ) from error

    @staticmethod
    async def _all_ended(sequences: list[Sequence], wake: asyncio.Event) -> None:
        while not all(sequence.ended for sequence in sequences):
            await wake.wait()
            wake.clear()
        if any(sequence.phase is Phase.ABORTED for sequence in sequences):
            raise engine_dead()


def request_id(request: web.Request) -> str:
    """As the client chose it; empty where it did not."""
    return request.headers.get("X-Request-Id", "")


def _answer_id(prefix: str, request: web.Request) -> str:
    return f"{prefix}-{request_id(request) or uuid.uuid4().hex}"


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
