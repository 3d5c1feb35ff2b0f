"""The routes POST /tokenize and /detokenize.

Source: vLLM's API server (entrypoints/serve/tokenize), whose fields and responses these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, StrictBool, StrictInt, StrictStr

from modelpack_engine.errors import RequestError
from modelpack_engine.worker.threads import in_thread, prepare
from modelpack_server.api.bodies import Body, SparseBody, compute, large_response
from modelpack_server.api.model_use import check_generates, preloadable, unless_gone
from modelpack_server.api.openai.chat import spec_of
from modelpack_server.api.openai.requests import ChatRequest, Message, ToolFields
from modelpack_server.api.paths import add_route
from modelpack_server.conversation.chat import prompt_ids
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.pool.pool import ModelPool


class TokenizeRequest(SparseBody):
    """The body of POST /tokenize: a text, or a conversation that the chat template renders."""

    model: Annotated[StrictStr, Field(min_length=1)]
    prompt: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[ToolFields] | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool = False
    return_token_strs: StrictBool = False
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other or are not supported."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("expected one of 'prompt' and 'messages'", param="prompt")
        if self.chat_template is not None:
            raise RequestError("chat_template is not supported", param="chat_template")
        if self.messages is None:
            return
        if self.add_special_tokens:
            raise RequestError(
                "add_special_tokens requires prompt: the chat template adds special tokens",
                param="add_special_tokens",
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message cannot be combined with add_generation_prompt",
                param="continue_final_message",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise RequestError(
                "continue_final_message requires an assistant message at the end",
                param="continue_final_message",
            )

    def spec(self, model: ServedModel) -> ChatSpec:
        """Return the chat request with these messages; raises `RequestError`."""
        spec = spec_of(
            ChatRequest.model_construct(
                model=self.model, messages=self.messages, tools=self.tools,
                chat_template_kwargs=self.chat_template_kwargs,
            ),
            model,
        )  # fmt: skip
        if self.continue_final_message:
            return replace(spec, continues=True)
        begins_reply = self.add_generation_prompt is not False
        options = {**spec.template_options, "add_generation_prompt": begins_reply}
        return replace(spec, template_options=options)


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: Annotated[StrictStr, Field(min_length=1)]
    tokens: list[StrictInt]


def router(pool: ModelPool) -> APIRouter:
    """Return the routes and their aliases."""
    routes = APIRouter(tags=["vLLM"], route_class=preloadable(pool))

    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Return the tokens of a text or of a conversation's prompt."""
        body.check()

        async def work() -> Response:
            async with pool.lease(body.model) as model:
                check_generates(model, body.model)
                tokens = await tokens_of(body, model)
                return await large_response(partial(tokenized, body, model, tokens))

        return await unless_gone(request, work())

    async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
        """Return the text of tokens."""

        async def work() -> str:
            async with pool.lease(body.model) as model:
                check_generates(model, body.model)
                return await in_thread(text_of, body.tokens, model)

        return {"prompt": await unless_gone(request, work())}

    add_route(routes, "/tokenize", tokenize, bare=True)
    add_route(routes, "/detokenize", detokenize, bare=True)
    return routes


async def tokens_of(body: TokenizeRequest, model: ServedModel) -> list[int]:
    """Return the tokens of a request. Raises `ContextLengthError`, for long texts only."""
    text = body.prompt
    if text is None:
        return await prompt_ids(model, await compute(body.spec, model))
    adds = body.add_special_tokens is not False
    encode = partial(model.encode, text, param="prompt", add_special_tokens=adds)
    return await prepare(len(text), encode)


def tokenized(body: TokenizeRequest, model: ServedModel, tokens: Sequence[int]) -> dict[str, Any]:
    """Return the response object."""
    texts = [model.tokenizer.token_text(token) for token in tokens]
    return {
        "count": len(tokens),
        "max_model_len": model.max_model_len,
        "tokens": tokens,
        "token_strs": texts if body.return_token_strs else None,
    }


def text_of(tokens: Sequence[int], model: ServedModel) -> str:
    """Return the text of tokens; raises `RequestError` for too many, or for unknown ids."""
    if len(tokens) > model.max_model_len:
        raise RequestError(
            f"tokens has {len(tokens)} items, the limit is {model.max_model_len}", param="tokens"
        )
    for token in tokens:
        if not 0 <= token < model.tokenizer.num_ids:
            raise RequestError(f"no such token id: {token}", param="tokens")
    return model.tokenizer.decode(tokens, skip_special_tokens=False)
