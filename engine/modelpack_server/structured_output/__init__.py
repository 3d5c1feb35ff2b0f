"""Structured output: text that follows a JSON schema, a regular expression or a grammar.

`llguidance` compiles the grammars and computes the tokens that they allow next.
"""

from modelpack_server.structured_output.grammar import (
    Constraint,
    Grammar,
    GrammarMask,
    GrammarVocabulary,
    ReasoningBlock,
    compile_constraint,
    grammar_vocabulary,
)
from modelpack_server.structured_output.tools import tool_grammar

__all__ = [
    "Constraint", "Grammar", "GrammarMask", "GrammarVocabulary", "ReasoningBlock",
    "compile_constraint", "grammar_vocabulary", "tool_grammar",
]  # fmt: skip
