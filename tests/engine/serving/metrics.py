"""Reading /metrics."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import requests

_LINE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)\{(?P<labels>.*)\} (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass
class Metrics:
    """Those of one model on a server."""

    url: str
    model: str

    def value(self, name: str, **labels: str) -> float:
        """Return the value of `vllm:name` with these labels."""
        wanted = {"model_name": self.model} | labels
        for line in requests.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            found = _LINE.fullmatch(line)
            if found is None or found["name"] != f"vllm:{name}":
                continue
            if wanted.items() <= dict(_LABEL.findall(found["labels"])).items():
                return float(found["value"])
        raise AssertionError(f"there is no {name} with {wanted}")

    def wait(self, seconds: float, name: str, value: float) -> None:
        """Return once the metric has the value; fail after so many seconds."""
        until = time.monotonic() + seconds
        while self.value(name) != value:
            assert time.monotonic() < until, f"{name} is still {self.value(name)}"
