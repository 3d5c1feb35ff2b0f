"""Twenty prompts of many kinds, and one paragraph to measure perplexity on."""

from __future__ import annotations


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


_STORY = (
    "The lighthouse keeper had lived on the island for thirty years. Every evening he climbed the "
    "one hundred and twelve steps, trimmed the wick and wrote a line into his book: the wind, the "
    "sea, the ships that passed. On the day the supply boat did not come, he wrote nothing. "
)
_SOURCE = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
"""

PROMPTS = (
    "The capital of France is",
    "Water boils at 100 degrees",
    "Once upon a time, in a small village by the sea,",
    _chat("Name three colours."),
    _chat("What is the capital of Italy?"),
    _chat("Translate 'good morning' into German, please!"),
    _chat('Résumé of "naïve café" in one line?'),
    "def fib(n):\n    if n < 2:\n        return",
    "for (int i = 0; i < n; ++i) {\n    sum += a[i];\n",
    "SELECT name, COUNT(*) FROM users WHERE",
    _SOURCE,
    "東京は日本の首都です。",
    "北京是中国的首都。上海",
    "서울은 대한민국의 수도이다.",
    "🚀🌍 Top emoji of the year: 😂 ❤️ 🤣",
    "Weather today ☀️, tomorrow 🌧️ and",
    "1. apples\n2. bananas\n3.",
    "- eggs\n- milk\n- bread\n-",
    _STORY * 3,
    _chat(_STORY * 2 + "\nSummarise this story in one sentence."),
)

PARAGRAPH = (
    "Photosynthesis is the process by which green plants and some other organisms use sunlight to "
    "make food from carbon dioxide and water. It takes place in the chloroplasts of the leaves, "
    "which contain the green pigment chlorophyll. Oxygen is released into the air as a by-product, "
    "and the sugars that are made give the plant the energy that it needs to grow."
)
