"""Texts that tokenisers split differently: scripts, emoji, digits, spaces, code, specials."""

from __future__ import annotations

TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n \n\t\t\n",
    "Hello world",
    " Hello  world   ",
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～",
    "The quick brown fox jumps over the lazy dog.",
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like tea? "
    "We'Ve a'lL",
    "naïve café, Ærøskøbing, Łódź, straße, Ünïcödé, e\u0301 (combining)",
    "Быстрая коричневая лиса прыгает. Η γρήγορη καφέ αλεπού. הַשּׁוּעָל הַחוּם. الثعلب البني السريع",
    "東京は日本の首都です。北京是中国的首都。서울은 대한민국의 수도이다.",
    "हिन्दी में लिखा हुआ पाठ, ภาษาไทยไม่มีช่องว่าง, កាន់តែពិសេសអាច",
    "🚀 (normal) 😶‍🌫️ (several in one) ✅ 🦙🦙 👩‍👩‍👧‍👦 🏳️‍🌈",
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 1,234,567.89 ½ ² ٣",
    "def fib(n):\n    if n < 2:\n\t\treturn n\n    return fib(n-1) + fib(n - 2)  # recursive\n",
    "for (int i = 0; i < n; ++i) { a[i] ^= ~b[i] & 0xFF; } // x86\r\n\r\n",
    '<html><body class="a-b_c">&nbsp;<!-- x --></body></html>',
    '{"key": [1, 2.5e-3, null], "nested": {"a": "b\\n"}}',
    "https://example.org/path?q=a+b&c=%20#frag me@example.org $HOME ~/.ssh C:\\Windows",
    "======= ------- ....... !!!!!! ?????? ''''''```````\"\"\"\"......",
    "ALLCAPS camelCase PascalCase snake_case kebab-case iPhone McDonald's XMLHttpRequest "
    "HTTPServer",
    "tabs\tand\u00a0no-break\u2003em\u3000ideographic\u200bzero-width spaces",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<|im_end|><|im_end|>",
    "<s>not special</s> <unk> <pad> [INST] x [/INST] <0x41> ▁ Ġ",
    "<tool>x</tool>  <tool> <to",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "line one\nline two\n\n\nline five   \n   indented",
    "1  12   123    1234     12345",
    "Ankara'da, Ali'nin, give'm 'to, O'tool.\n\n\n",
    "\u0000\u0001\u001b[0m\u007f\ufffd\ufeff",
)

#: What random texts consist of: letters of each category, digits, marks, signs, spaces, controls.
PIECES = (
    *("the", "Hello", "WORLD", "iPhone", "é", "É", "e\u0301", "Быс", "ЛИСА", "ß", "ǅ", "ʰ", "Ħ"),
    *("1", "12", "123", "1234", "1234567", "3.14", "1,000", "½", "²", "٣٤٥٦", "१२३४", "Ⅷ", "①"),
    *("'s", "'ll", "'Ve", "'RE", "’s", "y'all", "b", "Z", "if", "x=", "ª", "Ⓐ", "𝒜", "☃", "😁"),
    *("東京", "日本の", "カタカナ", "々", "〇", "㐀", "豈", "𠀀", "ｱ", "한국어", "ㄱ", "ㄅ"),
    *("，", "。"),
    *("「", "…", "“", "—", "！", "ไทย", "ລາວ", "မြန်", "ខ្មែរ", "हिन्दी", "العربية", "،", "۔", "שׁ"),
    *("👩\u200d👩\u200d👧", "€", "$", "+", "<", "=", "^", "~", "|", "`", "_", "-", "(", "]", "{"),
    *("/", "\\", "#", "*", "!", ".", "...", ",", ":", ";", '"', "'", "&", "%", "@", "\0", "\x1b"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x85", "\xa0", "\u2003"),
    *("\u3000", "\u2028", "\u200b", "\ufeff", "\ufffd", "\u0301", "\u0e31", "\u093e", "\u0378"),
)

#: Prompts for models with real weights.
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fib(n):\n    if n < 2:\n        return",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Water boils at 100 degrees",
    "The opposite of hot is",
)
