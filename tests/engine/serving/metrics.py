"""Reading /metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass

import requests
from prometheus_client.parser import text_string_to_metric_families


@dataclass
class Metrics:
    """The metrics of one model on a server."""

    url: str
    model: str

    def value(self, name: str, **labels: str) -> float:
        """Return the value of `vllm:name` with these labels."""
        wanted = {"model_name": self.model} | labels
        text = requests.get(f"{self.url}/metrics", timeout=60).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"vllm:{name}" and wanted.items() <= sample.labels.items():
                    return sample.value
        raise AssertionError(f"there is no {name} with {wanted}")

    def wait(self, seconds: float, name: str, value: float) -> None:
        """Wait until the metric has the value; fail after `seconds`."""
        until = time.monotonic() + seconds
        while self.value(name) != value:
            assert time.monotonic() < until, f"{name} is still {self.value(name)}"
