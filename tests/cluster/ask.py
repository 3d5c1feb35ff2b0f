"""Send chat requests through a Service, each on a connection of its own; print what came back.

    python ask.py ADDRESS HOST MODEL COUNT DONE [CLIENTS TOKENS]

Sends at least COUNT requests by four threads, with sixteen prompts in turn, and goes on until the
file DONE exists. With CLIENTS and TOKENS, that many threads complete prompts by so many tokens:
servers let more of these wait than of chats. Prints JSON: the numbers of answers and of failed
requests, and the first failures.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
from pathlib import Path

PROMPTS = 16


def main() -> None:
    address, host, model, count, done, *more = sys.argv[1:]
    clients, tokens = map(int, more or (4, 2))
    path = "/v1/completions" if more else "/v1/chat/completions"

    def asked(text: str) -> dict[str, object]:
        return {"prompt": text} if more else {"messages": [{"role": "user", "content": text}]}

    bodies = [
        json.dumps({"model": model, "max_tokens": tokens, **asked(f"Hello {number}")}).encode()
        for number in range(PROMPTS)
    ]
    headers = {"Host": host, "Content-Type": "application/json"}
    lock, answers, failures = threading.Lock(), 0, list[str]()

    def ask(body: bytes) -> str | None:
        connection = http.client.HTTPConnection(address, timeout=60)
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                return f"{response.status} {content[:200]!r}"
            return None if json.loads(content)["usage"]["completion_tokens"] else "no tokens"
        except (OSError, ValueError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            connection.close()

    def work() -> None:
        nonlocal answers
        while True:
            with lock:
                sent = answers + len(failures)
                if sent >= int(count) and Path(done).exists():
                    return
            failure = ask(bodies[sent % PROMPTS])
            with lock:
                if failure is None:
                    answers += 1
                else:
                    failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"answers": answers, "failed": len(failures), "failures": failures[:20]}))


if __name__ == "__main__":
    main()
