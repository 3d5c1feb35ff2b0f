"""Structured output: text that follows a JSON schema, a regular expression or a grammar.

`llguidance` does the work: it compiles grammars, and tells which tokens they allow next.
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
    "Constraint",
    "Grammar",
    "GrammarMask",
    "GrammarVocabulary",
    "ReasoningBlock",
    "compile_constraint",
    "grammar_vocabulary",
    "tool_grammar",
]
