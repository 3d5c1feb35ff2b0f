"""The routes below /v1/conversations: lists of items that responses continue and extend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.exceptions import HTTPException

from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body, BodyRoute, SparseBody, compute
from modelpack_server.api.openai.replies import list_object
from modelpack_server.api.openai.requests import Metadata, Order, PageLimit
from modelpack_server.api.openai.responses.memory import Conversation, ResponseMemory
from modelpack_server.api.openai.responses.requests import Item, items_of
from modelpack_server.api.paths import add_route
from modelpack_server.gateway.caller import caller_of

#: Docker Model Runner's, in addition to the common prefixes.
PREFIXES = ("/engines",)
#: The limit of items in one request, as at OpenAI.
MAX_NEW_ITEMS = 20
#: The limit of items in a conversation, after which it accepts no input.
MAX_ITEMS = 10_000


class ConversationRequest(SparseBody):
    """The body of POST /v1/conversations."""

    items: list[dict[str, Any]] = Field(default_factory=list)
    metadata: Metadata = Field(default_factory=dict)


class MetadataRequest(Body):
    """The body of POST /v1/conversations/{name}."""

    metadata: Metadata | None


class ItemsRequest(Body):
    """The body of POST /v1/conversations/{name}/items."""

    items: list[dict[str, Any]]


def conversation_routes(kept: ResponseMemory) -> APIRouter:
    """Return the routes over the conversations in `kept`, each for its owner."""
    routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute)

    async def new_items(given: list[dict[str, Any]], owner: str | None) -> list[Item]:
        if len(given) > MAX_NEW_ITEMS:
            raise RequestError(
                f"items has {len(given)} items, the limit is {MAX_NEW_ITEMS} at a time",
                param="items",
            )
        return await compute(items_of, given, partial(kept.item, owner), "items")

    async def create_conversation(body: ConversationRequest, request: Request) -> dict[str, Any]:
        """Create a conversation."""
        owner = caller_of(request.scope).owner
        items = await new_items(body.items, owner)
        check_new((), items, "items")
        return (await compute(kept.create, owner, body.metadata, items)).json()

    async def retrieve_conversation(name: str, request: Request) -> dict[str, Any]:
        """Return a conversation without its items."""
        return found_conversation(kept, caller_of(request.scope).owner, name).json()

    async def update_conversation(
        name: str, body: MetadataRequest, request: Request
    ) -> dict[str, Any]:
        """Replace the metadata of a conversation."""
        owner = caller_of(request.scope).owner
        changed = await compute(kept.describe, owner, name, body.metadata or {})
        if changed is None:
            raise _unknown(name)
        return changed.json()

    async def delete_conversation(name: str, request: Request) -> dict[str, Any]:
        """Delete a conversation; stored responses keep its items."""
        if not kept.remove_conversation(caller_of(request.scope).owner, name):
            raise _unknown(name)
        return {"id": name, "object": "conversation.deleted", "deleted": True}

    async def create_items(name: str, body: ItemsRequest, request: Request) -> dict[str, Any]:
        """Append items to a conversation; return them."""
        owner = caller_of(request.scope).owner
        found = found_conversation(kept, owner, name)
        if not body.items:
            raise RequestError("items is empty", param="items")
        items = await new_items(body.items, owner)
        await compute(check_new, found.items, items, "items")
        extended = await compute(kept.extend, owner, name, items)
        if extended is None:
            raise _unknown(name)
        return page(extended.items[-len(items) :], len(items), "asc", None)

    async def list_items(
        name: str,
        request: Request,
        limit: PageLimit = 20,
        order: Order = "desc",
        after: str | None = None,
    ) -> dict[str, Any]:
        """List the items of a conversation, one page per request."""
        found = found_conversation(kept, caller_of(request.scope).owner, name)
        return page(found.items, limit, order, after)

    async def retrieve_item(name: str, item: str, request: Request) -> Item:
        """Return an item of a conversation."""
        found = found_conversation(kept, caller_of(request.scope).owner, name).item(item)
        if found is None:
            raise _unknown_item(name, item)
        return found

    async def delete_item(name: str, item: str, request: Request) -> dict[str, Any]:
        """Remove an item from a conversation; return the conversation."""
        owner = caller_of(request.scope).owner
        found_conversation(kept, owner, name)
        changed = await compute(kept.remove_item, owner, name, item)
        if changed is None:
            raise _unknown_item(name, item)
        return changed.json()

    for tail, endpoint, method in (
        ("/conversations", create_conversation, "POST"),
        ("/conversations/{name}", retrieve_conversation, "GET"),
        ("/conversations/{name}", update_conversation, "POST"),
        ("/conversations/{name}", delete_conversation, "DELETE"),
        ("/conversations/{name}/items", create_items, "POST"),
        ("/conversations/{name}/items", list_items, "GET"),
        ("/conversations/{name}/items/{item}", retrieve_item, "GET"),
        ("/conversations/{name}/items/{item}", delete_item, "DELETE"),
    ):
        add_route(routes, tail, endpoint, methods=[method], bare=True, prefixes=PREFIXES)
    return routes


def page(inputs: Sequence[Item], limit: int, order: Order, after: str | None) -> dict[str, Any]:
    """Return a page of items. Raises `RequestError` for an unknown id."""
    items = list(inputs) if order == "asc" else list(reversed(inputs))
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise RequestError(f"no such item: {after!r}", param="after")
    rest = items[ids.index(after) + 1 :] if after is not None else items
    shown = rest[:limit]
    return list_object(shown, has_more=len(shown) < len(rest))


def found_conversation(kept: ResponseMemory, owner: str | None, name: str) -> Conversation:
    """Return a conversation; raise a 404 if the owner has none with this id."""
    found = kept.conversation(owner, name)
    if found is None:
        raise _unknown(name)
    return found


def check_new(before: Sequence[Item], items: Sequence[Item], where: str) -> None:
    """Raise `RequestError` if a conversation cannot have `items` after `before`.

    `where` is the field of the items.
    """
    ids = {item["id"] for item in before}
    for i, item in enumerate(items):
        if item["id"] in ids:
            raise RequestError(
                f"the conversation already has an item {item['id']!r}", param=f"{where}[{i}].id"
            )
        ids.add(item["id"])
    if len(ids) > MAX_ITEMS:
        raise RequestError(
            f"the conversation would have {len(ids)} items, the limit is {MAX_ITEMS}",
            param=where,
            hint="create another conversation",
        )


def _unknown(name: str) -> HTTPException:
    return HTTPException(404, f"no such conversation: {name!r}; it may have expired")


def _unknown_item(name: str, item: str) -> HTTPException:
    return HTTPException(404, f"no such item in the conversation {name!r}: {item!r}")
