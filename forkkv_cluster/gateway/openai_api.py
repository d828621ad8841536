"""The OpenAI-compatible HTTP API: a FastAPI application over one ``GatewayService``.

    GET  /v1/models  /health  /version  /metrics
    POST /v1/completions  /v1/chat/completions  /tokenize  /detokenize
    POST /v1/load_lora_adapter  /v1/unload_lora_adapter  (vLLM's names)

``model`` names the base model or an adapter; ``branch`` in the body runs the request as a turn of a session's branch.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from forkkv_cluster.core.errors import ForkKVError, Internal, InvalidArgument, unexpected
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.request import token_array
from forkkv_cluster.gateway.branch_turns import draw_seed
from forkkv_cluster.gateway.choices import ChoiceEvents, choice_commands, prompt_events, silenced, whole_usage
from forkkv_cluster.gateway.commands import GenerateCommand, TurnDelta, TurnEvent, TurnFinished, TurnPromptLogprobs
from forkkv_cluster.gateway.identity import authenticate
from forkkv_cluster.gateway.openai_format import (
    ChatFormat,
    CompletionFormat,
    ResponseFormat,
    TokenText,
    adapter_body,
    error_body,
    error_headers,
)
from forkkv_cluster.gateway.openai_types import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    LoadAdapterBody,
    TokenizeRequest,
    UnloadAdapterBody,
)
from forkkv_cluster.gateway.service import GatewayService
from forkkv_cluster.gateway.tool_format import ToolChatFormat
from forkkv_cluster.observability.metrics import render

logger = logging.getLogger(__name__)

router = APIRouter()


def build_http_app(get_service: Callable[[], GatewayService]) -> FastAPI:
    """``get_service`` is asked on every request: the application is built before its gateway is."""
    app = FastAPI(title="ForkKV Cluster", docs_url=None, redoc_url=None)
    app.state.get_service = get_service
    app.add_exception_handler(ForkKVError, _on_error)
    app.add_exception_handler(Exception, _on_error)  # Starlette raises it again, for the server's log.
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.include_router(router)
    return app


async def _gateway(request: Request) -> GatewayService:
    service: GatewayService = request.app.state.get_service()
    await service.start()
    return service


Gateway = Annotated[GatewayService, Depends(_gateway)]


async def _caller(request: Request, gateway: Gateway) -> str | None:
    return authenticate(gateway.config.gateway.api_tokens, request.headers.get("authorization"))


Caller = Annotated[str | None, Depends(_caller)]


@router.get("/health")
async def health(gateway: Gateway) -> Response:
    """200 once a worker has answered, 503 before."""
    return JSONResponse({"status": "ok"})


@router.get("/version")
async def version(gateway: Gateway) -> Response:
    return JSONResponse({"version": gateway.version})


@router.get("/metrics")
async def metrics(gateway: Gateway) -> Response:
    """Prometheus text. No token is needed, as scrapers carry none; it names no tenant."""
    return Response(render(await gateway.status(), gateway.metrics), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
async def models(gateway: Gateway, caller: Caller) -> Response:
    base = {"id": gateway.model.name, "object": "model", "created": 0, "owned_by": "forkkv"}
    data = [{**base, "max_model_len": gateway.model.max_model_len, "root": gateway.model.name, "parent": None}]
    for info in await gateway.list_adapters():
        entry = {**base, "id": info.name, "root": info.path, "parent": gateway.model.name}
        said = {"trained_for": info.trained_for} if info.trained_for is not None else {}
        data.append({**entry, **said, "forkkv": adapter_body(info)})
    return JSONResponse({"object": "list", "data": data})


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, gateway: Gateway, caller: Caller) -> Response:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidArgument("prompt", body.prompt, "and messages exclude each other", "Send exactly one of both.")
    if body.messages is not None:
        tokens = gateway.tokenization.encode_chat([message.plain() for message in body.messages])
    else:
        tokens = gateway.tokenization.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
    return JSONResponse({"count": len(tokens), "max_model_len": gateway.model.max_model_len, "tokens": tokens.tolist()})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, gateway: Gateway, caller: Caller) -> Response:
    tokens = token_array(body.tokens, name="tokens", vocab_size=gateway.model.vocab_size)
    return JSONResponse({"prompt": gateway.tokenization.decode(tokens)})


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapterBody, gateway: Gateway, caller: Caller) -> Response:
    """Load a PEFT directory on every worker. The same weights under the same name again are no error."""
    info = await gateway.load_adapter(body.lora_name, body.lora_path, body.sharing)
    return PlainTextResponse(f"Success: LoRA adapter '{info.name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadAdapterBody, gateway: Gateway, caller: Caller) -> Response:
    """Forget it on every worker; requests that run on it finish."""
    await gateway.unload_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/v1/completions")
async def completions(body: CompletionRequest, gateway: Gateway, caller: Caller) -> Response:
    def make(commands: list[GenerateCommand], *head: Any, **options: Any) -> ResponseFormat:
        echoes = body.echoed(commands, gateway.tokenization, gateway.model.vocab_size)
        return CompletionFormat(*head, echoes=echoes, **options)

    return await _respond(gateway, caller, body, "cmpl", make, is_silent=body.is_silent)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatCompletionRequest, gateway: Gateway, caller: Caller) -> Response:
    dialect = body.tool_dialect(gateway.tokenization)

    def make(commands: list[GenerateCommand], *head: Any, **options: Any) -> ResponseFormat:
        if dialect is None:
            return ChatFormat(*head, **options)
        return ToolChatFormat(*head, dialect=dialect, is_single=body.parallel_tool_calls is False, **options)

    return await _respond(gateway, caller, body, "chatcmpl", make)


async def _respond(
    gateway: GatewayService,
    caller: str | None,
    body: GenerationRequest,
    prefix: str,
    make_format: Callable[..., ResponseFormat],
    *,
    is_silent: bool = False,
) -> Response:
    adapter = await _adapter_name(gateway, caller, body)
    n = 1 if body.n is None else body.n
    commands = body.commands(adapter, gateway.tokenization)
    choices = [choice_commands(command, n, draw_seed()) for command in commands]
    form = make_format(
        commands,
        new_id(prefix),
        body.model,
        int(time.time()),
        _token_text(gateway, body),
        n=n,
        has_prompt_logprobs=body.prompt_logprobs is not None,
    )
    events = prompt_events(choices, lambda command: gateway.generate(caller, command))
    events = silenced(events) if is_silent else events
    num_choices = n * len(commands)
    if not body.stream:
        return JSONResponse(await _collect(events, form, num_choices))
    # The first token comes before the status line, so that a refused request gets the status it deserves.
    beginning: list[tuple[int, TurnEvent]] = []
    while not beginning or not isinstance(beginning[-1][1], TurnDelta | TurnFinished):
        beginning.append(await anext(events))
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    lines = _server_sent_events(_chain(beginning, events), form, num_choices, n if include_usage else None)
    return StreamingResponse(lines, media_type="text/event-stream")


def _token_text(gateway: GatewayService, body: GenerationRequest) -> TokenText:
    if body.return_tokens_as_token_ids:
        return lambda token: f"token_id:{token}"
    return lambda token: gateway.tokenization.decode([token])


async def _adapter_name(gateway: GatewayService, caller: str | None, body: GenerationRequest) -> str | None:
    """The adapter that ``model`` names; None for the base model. On a branch it must be the branch's own."""
    adapter = None if body.model == gateway.model.name else body.model
    if body.branch is None:
        await gateway.resolve_adapter(adapter)
        return adapter
    branch = (await gateway.get_session(caller, body.branch.session)).branch(body.branch.branch)
    own = branch.adapter.name if branch.adapter is not None else None
    if adapter != own:
        problem = f"is not what the branch runs on, {own or gateway.model.name!r}"
        raise InvalidArgument("model", body.model, problem, "Name that one.")
    return adapter


async def _collect(events: ChoiceEvents, form: ResponseFormat, num_choices: int) -> dict[str, Any]:
    deltas: list[list[TurnDelta]] = [[] for _ in range(num_choices)]
    ends: dict[int, TurnFinished] = {}
    async with aclosing(events):
        async for index, event in events:
            if isinstance(event, TurnDelta):
                deltas[index].append(event)
            elif isinstance(event, TurnPromptLogprobs):
                form.take_prompt(index, event.part)
            elif isinstance(event, TurnFinished):
                ends[index] = event
    if len(ends) < num_choices:
        raise Internal("a turn ended without its last event.")
    return form.whole([(deltas[index], ends[index]) for index in range(num_choices)])


async def _server_sent_events(
    events: ChoiceEvents, form: ResponseFormat, num_choices: int, usage_of: int | None
) -> AsyncGenerator[str, None]:
    """``data:`` lines; an error after the beginning is one, too, and ends the stream without [DONE].

    ``usage_of`` are the choices of each prompt, where a last chunk with the usage is wanted.
    """
    ends: dict[int, TurnFinished] = {}
    for index in range(num_choices):
        for body in form.opening(index):
            yield _data(body)
    try:
        async with aclosing(events):
            async for index, event in events:
                for body in _bodies(form, index, event):
                    yield _data(body)
                if isinstance(event, TurnFinished):
                    ends[index] = event
    except Exception as error:
        if not isinstance(error, ForkKVError):
            logger.exception("unexpected error in a stream")
        yield _data(error_body(_failure(error)))
        return
    if usage_of is not None:
        yield _data(form.usage_chunk(whole_usage([ends[index] for index in sorted(ends)], usage_of)))
    yield "data: [DONE]\n\n"


def _bodies(form: ResponseFormat, index: int, event: TurnEvent) -> list[dict[str, Any]]:
    """What one event streams."""
    if isinstance(event, TurnPromptLogprobs):
        form.take_prompt(index, event.part)
    elif isinstance(event, TurnDelta):
        return form.chunks(index, event)
    elif isinstance(event, TurnFinished):
        return form.ending(index, event)
    return []


async def _chain(beginning: list[tuple[int, TurnEvent]], events: ChoiceEvents) -> ChoiceEvents:
    async with aclosing(events):
        for event in beginning:
            yield event
        async for event in events:
            yield event


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _on_error(request: Request, error: Exception) -> Response:
    failure = _failure(error)
    return JSONResponse(error_body(failure), status_code=failure.http_status, headers=error_headers(failure))


def _failure(error: Exception) -> ForkKVError:
    return error if isinstance(error, ForkKVError) else unexpected(error)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    """Pydantic's complaints in OpenAI's words: the first bad field, by name."""
    assert isinstance(error, RequestValidationError)  # The handler of nothing else.
    first: dict[str, Any] = error.errors()[0]
    kind, loc = first["type"], [part for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        problem = f"is not JSON ({first['ctx']['error']} at character {loc[0]})"
        return await _on_error(request, InvalidArgument("body", error.body, problem, "Send one JSON object."))
    field = ".".join(map(str, loc if kind == "missing" else _sent_part(loc, error.body))) or "body"
    if kind == "missing":
        return await _on_error(request, InvalidArgument(field, None, "is missing", "Send it."))
    problem = "is not a known field" if kind == "extra_forbidden" else str(first["msg"]).rstrip(".")
    remedy = "Leave it out." if kind == "extra_forbidden" else "Mend it."
    return await _on_error(request, InvalidArgument(field, first.get("input"), problem, remedy))


def _sent_part(loc: Sequence[str | int], body: Any) -> list[str | int]:
    """The beginning of ``loc`` that is in the body: behind it pydantic names members of unions and parts of keys."""
    parts: list[str | int] = []
    for part in loc:
        is_there = part in body if isinstance(body, dict) else isinstance(body, list) and part in range(len(body))
        if not is_there:
            break
        parts.append(part)
        body = body[part]
    return parts
