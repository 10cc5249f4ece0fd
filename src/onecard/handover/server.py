"""A model over HTTP, as OpenAI's clients ask for it.

transformers' own server (`transformers serve`, 5.23) was tried first. It loads what it serves by name, so that a model
in memory with its adapter merged cannot be given to it. It takes `n` and `logprobs` and ignores them, chooses the
likeliest token whatever `temperature` says unless the folder's generation_config samples, lets prompts outgrow the
context, answers a malformed list of messages with a 500, and ends streams without `[DONE]`.
So this is FastAPI on uvicorn, with the generation that `onecard generate` has.

    request ─► pydantic model ─► prompt ids ─► one thread that writes ─► body, or events as the text comes
"""

import asyncio
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from onecard.errors import InputError, OnecardError
from onecard.handover.gate import LOCAL_ORIGINS, BodyLimit, is_of_this_machine
from onecard.handover.replies import ChatReply, CompletionReply, Reply, RequestRefusedError, event
from onecard.handover.requests import ChatRequest, CompletionRequest, WritingRequest
from onecard.handover.worker import Job, Worker
from onecard.handover.writer import Prompt, Writer, Written
from onecard.model.generate import Sampling

_POLL_S = 0.25
_GRACE_S = 5
_PATHS = "ask POST /v1/chat/completions, POST /v1/completions, GET /v1/models or GET /health"


@dataclass(frozen=True)
class ServerSettings:
    """How a model is served: its name for clients, and what a request that does not say gets.

    `is_private`: for this machine alone, so that requests under a name of the internet are refused.
    """

    name: str
    sampling: Sampling
    api_key: str | None = field(default=None, repr=False)
    allow_origins: tuple[str, ...] = ()
    is_private: bool = False


class Service:
    """Turns requests into jobs of the worker, and what comes of them into replies."""

    def __init__(self, writer: Writer, worker: Worker, settings: ServerSettings) -> None:
        self._writer, self._worker, self._settings = writer, worker, settings
        self._encoding = threading.Lock()

    def check_caller(self, request: Request) -> None:
        """Refuses a request without the key that the server was given, or of a page that may not ask."""
        expected = self._settings.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if expected is not None and not secrets.compare_digest(given.encode(), expected.encode()):
            raise RequestRefusedError(401, "the API key is missing or wrong", code="invalid_api_key")
        host = request.headers.get("host", "")
        if (
            expected is None
            and self._settings.is_private
            and not is_of_this_machine(host, self._settings.allow_origins)
        ):
            raise RequestRefusedError(
                403, f"this server is for its own machine, not for {host}: --allow-origin or --api-key let others in"
            )

    def check_model(self, name: str) -> None:
        if name != self._settings.name:
            message = f"there is no model {name!r} here: this server has {self._settings.name!r}"
            raise RequestRefusedError(404, message, code="model_not_found", param="model")

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        self.check_model(asked.model)
        self._refuse_endless([asked.prompt])
        prompt = await run_in_threadpool(self._encode, lambda: self._writer.encode_text(asked.prompt))
        return await self._respond(asked, prompt, CompletionReply(asked.model), request)

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        self.check_model(asked.model)
        if self._writer.template is None:
            raise RequestRefusedError(
                400, f"{asked.model} has no chat template: it goes on with text. Use /v1/completions", param="messages"
            )
        turns = [message.turn() for message in asked.messages]
        self._refuse_endless([turn.content for turn in turns])
        prompt = await run_in_threadpool(self._encode, lambda: self._writer.encode_chat(turns))
        return await self._respond(asked, prompt, ChatReply(asked.model), request)

    def _refuse_endless(self, texts: Sequence[str]) -> None:
        try:
            self._writer.refuse_endless(texts)
        except InputError as error:
            raise RequestRefusedError(400, str(error), code="context_length_exceeded") from error

    def _encode(self, encode: Callable[[], Prompt]) -> Prompt:
        with self._encoding:
            return encode()

    async def _respond(self, asked: WritingRequest, prompt: Prompt, reply: Reply, request: Request) -> Response:
        job = Job(prompt, self._sampling(asked, prompt), asked.stop)
        self._worker.submit(job)
        if asked.stream:
            chunks = _events(job, reply, request, with_usage=asked.includes_usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        watch = asyncio.create_task(_cancel_when_left(job, request))
        try:
            async for item in job.results():
                written = item
        finally:
            job.cancel()
            watch.cancel()
        assert isinstance(written, Written)
        return JSONResponse(reply.whole(written, len(prompt.ids)))

    def _sampling(self, asked: WritingRequest, prompt: Prompt) -> Sampling:
        sampling, context = asked.sampling(self._settings.sampling), self._writer.context
        sampling.check()
        num_asked = len(prompt.ids) + (asked.limit or 1)
        if num_asked > context:
            raise RequestRefusedError(
                400,
                f"this model's context is {context:,} tokens, and the request takes {num_asked:,}:"
                f" {len(prompt.ids):,} of text and {asked.limit or 1:,} to write. Shorten the text or lower max_tokens",
                code="context_length_exceeded",
            )
        return self._writer.limit(sampling, prompt)


def make_app(service: Service, settings: ServerSettings) -> FastAPI:
    """Makes the web application: three paths under /v1, /health, and errors in OpenAI's form."""
    app = FastAPI(title="onecard", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.allow_origins),
        allow_origin_regex=LOCAL_ORIGINS,
        allow_methods=["*"],
        allow_headers=["*"],
    )
    model = {"id": settings.name, "object": "model", "created": 0, "owned_by": "onecard"}
    guarded: dict[str, Any] = {"dependencies": [Depends(service.check_caller)]}

    @app.get("/health")
    def tell_health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", **guarded)
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", **guarded)
    def show_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @app.post("/v1/completions", **guarded)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await service.complete(asked, request)

    @app.post("/v1/chat/completions", **guarded)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await service.chat(asked, request)

    app.add_exception_handler(Exception, _explain)
    for kind in (RequestRefusedError, RequestValidationError, OnecardError, HTTPException):
        app.add_exception_handler(kind, _explain)
    return app


def run_server(app: FastAPI, listening: socket.socket, worker: Worker) -> None:
    """Serves until Ctrl+C."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S)
    try:
        _Server(config, worker).run(sockets=[listening])
    except KeyboardInterrupt:  # which uvicorn raises again after it has closed
        pass
    finally:
        worker.close()


class _Server(uvicorn.Server):
    """Ends the texts at hand before it waits for their clients."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._worker.stop()
        super().handle_exit(sig, frame)


async def _events(job: Job, reply: Reply, request: Request, *, with_usage: bool) -> AsyncIterator[str]:
    """Streams a reply; ends the job where its client has left, also one that waits for its turn."""
    watch = asyncio.create_task(_cancel_when_left(job, request))
    try:
        for body in reply.first():
            yield event(body)
        async for item in job.results():
            bodies = (
                [reply.piece(item)]
                if isinstance(item, str)
                else reply.last(item, len(job.prompt.ids), with_usage=with_usage)
            )
            for body in bodies:
                yield event(body)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(_refusal_of(error).body())
    finally:
        job.cancel()
        watch.cancel()


async def _cancel_when_left(job: Job, request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_POLL_S)
    job.cancel()


async def _explain(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError) and "json" not in request.headers.get("content-type", ""):
        refusal = RequestRefusedError(415, "the body must be JSON: send the header Content-Type: application/json")
    else:
        refusal = _refusal_of(error)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


def _refusal_of(error: Exception) -> RequestRefusedError:
    match error:
        case RequestRefusedError():
            return error
        case OnecardError():
            return RequestRefusedError(400, str(error))
        case HTTPException(status_code=400):
            return RequestRefusedError(400, "the body cannot be read: send JSON in UTF-8")
        case HTTPException(status_code=404):
            return RequestRefusedError(404, f"there is nothing at this path: {_PATHS}")
        case HTTPException(status_code=405):
            return RequestRefusedError(405, f"this path takes another method: {_PATHS}")
        case HTTPException():
            return RequestRefusedError(error.status_code, str(error.detail))
        case RequestValidationError():
            return _refusal_of_fields(error)
    return RequestRefusedError(500, f"the server failed: {type(error).__name__}: {error}")


def _refusal_of_fields(error: RequestValidationError) -> RequestRefusedError:
    """Tells all problems of a request together."""
    problems, params = [], []
    for problem in error.errors():
        # Of a field that takes text or a list, pydantic adds which of the two it means.
        place = ".".join(str(part) for part in problem["loc"] if part != "body" and "[" not in str(part))
        message = str(problem["msg"]).removeprefix("Value error, ")
        if problem["type"] == "json_invalid":
            place, message = "", f"the body is not JSON: {problem['ctx']['error']} at character {place}"
        elif place:
            params.append(place.split(".")[0])
        problems.append(f"{place}: {message}" if place else message)
    return RequestRefusedError(400, "; ".join(problems), param=params[0] if params else None)
