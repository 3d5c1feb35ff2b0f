"""Every call that makes the bytes of a model runnable says who is trusted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Functions that fetch or open a model; `remote` says who has to have signed it.
CHECKING = {
    *("find_model", "find_any_part", "open_model", "open_embedder", "draft_files", "with_drafter"),
    *("model_directory", "kept_bundle", "pull_locked", "smoke_test", "StoreCatalogue"),
    *("pull", "bundle", "resolve", "convert", "package", "complete"),
}
#: Those with a name that other things have as methods: only calls of the bare name are meant.
BARE = {"pull", "bundle", "resolve", "convert", "package", "complete"}
#: Those that only Python programs call.
PUBLIC = {"open_embedder", "model_directory"}
#: Functions that open the files of a model that somebody else has checked.
OPENING = {"stored_files", "from_model"}
#: Calls without `remote`, and why.
EXCEPTIONS = {
    ("engine/modelpack_server/stored_models.py", "open_model"): "rank 0 checked that digest",
    ("modelpack/deploy/vllm_plugin.py", "resolve"): "a function of that module",
    ("modelpack/registry/manifests.py", "resolve"): "a function of that module: one request",
    ("engine/modelpack_server/api/traces.py", "complete"): "of traces",
    ("engine/modelpack_server/cli/model_sources.py", "package"): "a file; loading checks the model",
}
OPENERS = {
    "engine/modelpack_engine/models/files.py": "itself",
    "engine/modelpack_server/stored_models.py": "after find_model",
    "engine/modelpack_server/cli/model_sources.py": "after find_model or find_base",
    "engine/modelpack_server/pool/store_catalogue.py": "to know how large the weights are",
    "engine/modelpack_server/api/ollama/models.py": "to show them",
}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield the calls of these functions, by file and name."""
    words = re.compile(rf"\b(?:{'|'.join(sorted(CHECKING | OPENING))})[(,]")
    for top in ("modelpack", "engine"):
        for path in sorted((ROOT / top).rglob("*.py")):
            text = path.read_text()
            tree = ast.parse(text)
            verbs = dict(_verbs_in(tree))
            if not verbs and not words.search(text):
                continue
            modules = set(_modules_in(tree))
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                of, name = _called(node.func)
                if name == "to_thread":  # which calls its first argument
                    of, name = _called(node.args[0])
                if of == "":
                    name = verbs.get(name, name)
                if name in CHECKING | OPENING and (name not in BARE or of in modules | {""}):
                    yield path.relative_to(ROOT).as_posix(), name, node


def _verbs_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield what a file calls a verb that it imports under another name, and the verb."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "modelpack.operations."
        ):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)


def _modules_in(tree: ast.Module) -> Iterator[str]:
    """Yield what modules of the verbs are called in a file."""
    yield "modelpack"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "modelpack.operations":
            yield from (alias.asname or alias.name for alias in node.names)


def _called(function: ast.expr) -> tuple[str | None, str]:
    """Return the name of a function, and of what it is an attribute; "" for a bare name."""
    if isinstance(function, ast.Name):
        return "", function.id
    if isinstance(function, ast.Attribute):
        value = function.value
        return value.id if isinstance(value, ast.Name) else None, function.attr
    return None, ""


def says_who(call: ast.Call) -> bool:
    """Return whether a call passes on who is trusted: by name, or as an argument called so."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "remote"]
    given += [one for one in call.args if "remote" in ast.dump(one)]
    return any(not (isinstance(one, ast.Constant) and one.value is None) for one in given)


def test_every_call_says_who_is_trusted() -> None:
    found = [(path, name, call) for path, name, call in calls() if name in CHECKING]
    assert {name for _, name, _ in found} >= CHECKING - PUBLIC
    silent = {
        f"{path}:{call.lineno}: {name}"
        for path, name, call in found
        if not says_who(call) and (path, name) not in EXCEPTIONS
    }
    assert not silent


def test_files_are_opened_in_few_places() -> None:
    places = {path for path, name, _ in calls() if name in OPENING}
    assert places <= OPENERS.keys()
