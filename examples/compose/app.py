"""Send one prompt to the model, with the URL, model name and API key from Compose."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path


def main() -> None:
    body = {
        "model": os.environ["MODEL"],
        "messages": [{"role": "user", "content": "Say hi in five words."}],
        "max_tokens": 32,
    }
    request = urllib.request.Request(
        f"{os.environ['BASE_URL']}/chat/completions",
        data=json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {Path(os.environ['KEY_FILE']).read_text().strip()}",
        },
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    print("the model says:", answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
