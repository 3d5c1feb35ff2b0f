"""The requests that are most expensive for a server to read, sent from a separate process.

`python worst_requests.py HOST:PORT MODEL ROUNDS` sends all of them at once, ROUNDS times, and
writes a line of JSON: the number of replies by status.
"""

from __future__ import annotations

import http.client
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

MIB = 2**20


def _chat(model: str, content: str) -> bytes:
    return _body(model, messages=json.dumps([{"role": "user", "content": content}]))


def _body(model: str, **fields: str) -> bytes:
    """Return a body from fields that are JSON texts."""
    rest = "".join(f',"{name}":{value}' for name, value in fields.items())
    return f'{{"model":"{model}"{rest}}}'.encode()


def _many(item: str, size: int) -> str:
    """Return an array of `item` with about `size` bytes."""
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


def requests_to(model: str) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Yield the name, the path and the body of each request."""
    chat, complete = "/v1/chat/completions", "/v1/completions"
    message, say = '{"role":"user","content":"x"}', '[{"role":"user","content":"x"}]'
    turn = '{"role":"user","content":"' + "x" * 200 + '"}'  # 4,000 of them exceed the context
    table: dict[str, tuple[str, Callable[[], bytes]]] = {
        "digits": (chat, lambda: _chat(model, "7" * (16 * MIB))),
        "one word": (chat, lambda: _chat(model, "a" * (8 * MIB))),
        "blanks": (chat, lambda: _chat(model, " " * (8 * MIB))),
        "emoji": (chat, lambda: _chat(model, "\U0001f600" * MIB)),
        "escapes": (chat, lambda: _body(model, messages='[{"role":"user","content":"'
                                        + "\\u00e9" * (2 * MIB) + '"}]')),
        "ids": (complete, lambda: _body(model, prompt=_many("7", 30 * MIB))),
        "lists of ids": (complete, lambda: _body(model, prompt=_many("[7]", 8 * MIB))),
        "no ids": (complete, lambda: _body(model, prompt=_many("1.5", 6 * MIB))),
        "context": ("/api/generate", lambda: _body(model, prompt='"x"', context=_many("7", MIB))),
        "messages": (chat, lambda: _body(model, messages=_many(message, 30 * MIB))),
        "fewer messages": (chat, lambda: _body(model, messages=_many(turn, 940_000))),
        "Anthropic messages": ("/v1/messages", lambda: _body(
            model, max_tokens="9", messages=_many(turn, 940_000))),
        "count tokens": ("/v1/messages/count_tokens", lambda: _chat(model, "7" * (8 * MIB))),
        "count input tokens": ("/v1/responses/input_tokens", lambda: _body(
            model, input=_many(turn, 940_000))),
        "tokenize": ("/tokenize", lambda: _body(model, prompt='"' + "7" * (8 * MIB) + '"')),
        "tokenize messages": ("/tokenize", lambda: _chat(model, "a" * (8 * MIB))),
        "detokenize": ("/detokenize", lambda: _body(model, tokens=_many("7", 30 * MIB))),
        "Ollama messages": ("/api/chat", lambda: _body(model, messages=_many(turn, 940_000))),
        "items": ("/v1/responses", lambda: _body(model, input=_many(turn, 940_000))),
        "input": ("/v1/responses", lambda: _body(model, input='"' + "7" * (8 * MIB) + '"')),
        "nested": (chat, lambda: b'{"model":' + b"[" * (8 * MIB)),
        "nested objects": (chat, lambda: b'{"a":' * MIB),
        "inputs": ("/v1/embeddings", lambda: _body(model, input=_many('"x"', 8 * MIB))),
        "embed": ("/api/embed", lambda: _body(model, input=_many('"x"', 8 * MIB))),
        "documents": ("/v1/rerank", lambda: _body(
            model, query='"x"', documents=_many('"x"', 8 * MIB))),
        "tools": (chat, lambda: _body(model, messages=say, tools=_many("{}", 4 * MIB))),
        "schema": (chat, lambda: _body(model, messages=say, response_format=(
            '{"type":"json_schema","json_schema":{"name":"x","schema":{"enum":'
            + _many('"x"', 8 * MIB) + "}}}"))),
        "stops": (chat, lambda: _body(model, messages=say, stop=_many("7", 4 * MIB))),
        "long stop": (chat, lambda: _body(model, messages=say, stop='"' + "x" * (4 * MIB) + '"')),
        "biases": (chat, lambda: _body(model, messages=say, logit_bias=(
            "{" + ",".join(f'"{i}":"x"' for i in range(300_000)) + "}"))),
        "base64": (chat, lambda: _body(model, messages=(
            '[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:'
            + "A" * (32 * MIB) + '"}}]}]'))),
        "wrong model": (chat, lambda: _chat("m" * (8 * MIB), "x")),
        "number": (chat, lambda: _body(model, messages=say, seed="7" * MIB)),
    }  # fmt: skip
    for name, (path, body) in table.items():
        yield name, path, body


def send(address: str, path: str, body: bytes) -> str:
    """Send a request and return the status of its reply, or the error."""
    connection = http.client.HTTPConnection(address, timeout=300)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if len(response.read()) > 4096:
            return "a long reply"
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()
    return str(response.status)


def main(address: str, model: str, rounds: str) -> None:
    """Send all requests concurrently, several times."""
    made = [(path, body()) for _, path, body in requests_to(model)]
    with ThreadPoolExecutor(len(made)) as senders:
        work = [senders.submit(send, address, *one) for _ in range(int(rounds)) for one in made]
        print(json.dumps(Counter(each.result() for each in work)))


if __name__ == "__main__":
    main(*sys.argv[1:])
