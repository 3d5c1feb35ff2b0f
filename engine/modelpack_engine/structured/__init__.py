"""Structured output: text that follows a JSON schema, a regular expression or a grammar.

`llguidance` does the work: it compiles grammars, and tells which tokens they allow next.
"""

from modelpack_engine.structured.constraint import Constraint, ReasoningBlock
from modelpack_engine.structured.grammar import Grammar, GrammarMask, compile_constraint
from modelpack_engine.structured.tools import tool_grammar
from modelpack_engine.structured.vocabulary import GrammarVocabulary, grammar_vocabulary

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
