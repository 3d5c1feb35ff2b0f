"""Structured output: text that follows a JSON schema, a regular expression or a grammar.

`llguidance` does the work: it compiles grammars, and tells which tokens they allow next.
"""

from modelpack_server.structured_output.constraint import Constraint, ReasoningBlock
from modelpack_server.structured_output.grammar import Grammar, GrammarMask, compile_constraint
from modelpack_server.structured_output.tools import tool_grammar
from modelpack_server.structured_output.vocabulary import GrammarVocabulary, grammar_vocabulary

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
