"""`modelpack smoke`: test a model; report as JSON, JUnit's XML or an in-toto attestation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpack.artifacts.reference import is_model_id
from modelpack.cli.help import command
from modelpack.cli.options import (
    DOWNLOAD,
    Settings,
    common_options,
    model_argument,
    remote_options,
    transfer_options,
    trust_options,
    variant_option,
)
from modelpack.cli.output import note, show_json, shown_progress
from modelpack.cli.trust import private_key
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack_server.cli.engine_options import (
    ENGINE_HEADINGS,
    MORE_OPTIONS,
    adapter_option,
    engine_options,
    merge_option,
    pull_draft,
)
from modelpack_server.cli.load_display import LoadDisplay
from modelpack_server.cli.model_sources import Found, ModelSources
from modelpack_server.cli.run import picture_parts

if TYPE_CHECKING:
    from modelpack.artifacts.model import Model
    from modelpack.store.layout import LayoutStore
    from modelpack_server.smoke_test import SmokeReport

#: A function that attaches the report to a model.
Attestation = Callable[["SmokeReport", "Model", RemoteOptions, Settings], None]


def attestation_of(
    name: str, attest: bool, key: str | None, local: bool, clean: bool
) -> Attestation | None:
    """Return the function that attaches the report; raise `UsageError` for conflicting options."""
    if not attest:
        if key is not None or local:
            raise UsageError("--key and --local require --attest")
        return None
    if key is None:
        raise UsageError("--attest requires --key")
    if local and clean:
        raise UsageError("--local cannot be combined with --clean, whose store is deleted")
    if is_model_id(name.strip()) and not local:
        raise UsageError(f"{name} is an id, not a reference to a registry", hint="give --local")
    signer = private_key(key)

    def attach(
        report: SmokeReport, tested: Model, remote: RemoteOptions, settings: Settings
    ) -> None:
        from modelpack.operations.signatures import attest as attach_signed
        from modelpack.trust.sigstore import TEST_RESULT

        store = settings.store() if local else None
        predicate = test_result(report)
        digest = attach_signed(tested, TEST_RESULT, predicate, signer, store=store, remote=remote)
        note(settings, f"attached the report to {tested.digest}: {digest}")

    return attach


def test_result(report: SmokeReport) -> dict[str, Any]:
    """Return the predicate: the fields of in-toto's test results, and the whole report."""
    passed = [check.name for check in report.checks if check.problem is None]
    failed = [check.name for check in report.checks if check.problem is not None]
    (failed if report.error is not None else passed).insert(0, "loads and answers")
    return {
        "result": "PASSED" if report.passed else "FAILED",
        "configuration": [{"name": "modelpack smoke", "uri": "urn:modelpack:smoke"}],
        "passedTests": passed,
        "failedTests": failed,
        "report": report.to_json(),
    }


@command(headings=ENGINE_HEADINGS, more=MORE_OPTIONS)
@model_argument()
@click.option("--prompt", help="Send this prompt. By default, ask for the capital of France, what "
              "is in the picture, or what is heard.")  # fmt: skip
@click.option(
    "--image", "images", multiple=True, metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Send this picture before the prompt (repeatable).",
)  # fmt: skip
@click.option(
    "--audio", "sounds", multiple=True, metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Send this sound before the prompt (repeatable).",
)  # fmt: skip
@adapter_option("Test MODEL with this LoRA adapter.")
@merge_option
@click.option("--expect", metavar="REGEX", help="Require the response to match this pattern.")
@click.option("--min-tps", type=click.FloatRange(min=0),
              help="Require this many tokens per second.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True,
              help="Generate at most this many tokens.")  # fmt: skip
@click.option("--clean", is_flag=True, help="Pull into an empty store that is deleted afterwards.")
@click.option(
    "--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Also write the checks to FILE as JUnit's XML.",
)  # fmt: skip
@click.option(
    "--attest", is_flag=True,
    help="Attach the report to the model in its registry, signed with --key.",
)  # fmt: skip
@click.option("--key", metavar="KEY",
              help="Sign with this private key, for --attest, as `sign`.")  # fmt: skip
@click.option("--local", is_flag=True,
              help="With --attest: attach to the model in the local store.")  # fmt: skip
@engine_options
@remote_options
@transfer_options(*DOWNLOAD)
@trust_options
@variant_option
@common_options
def smoke(
    settings: Settings,
    model: str,
    prompt: str | None,
    images: tuple[Path, ...],
    sounds: tuple[Path, ...],
    adapters: tuple[tuple[str, str], ...],
    merge: bool,
    expect: str | None,
    min_tps: float | None,
    max_tokens: int,
    clean: bool,
    junit: Path | None,
    attest: bool,
    key: str | None,
    local: bool,
    config: Callable[[], Any],
    remote: RemoteOptions,
) -> int:
    """Load MODEL, run a prompt and check the response; print a JSON report. Exit code 1: failed."""
    from modelpack_server import open_model
    from modelpack_server.smoke_test import PROMPTS, smoke_test
    from modelpack_server.stored_models import looks_for_drafter

    if prompt is None:
        prompt = PROMPTS["picture" if images else "sound" if sounds else "text"]
    if merge and not adapters:
        raise UsageError("--merge requires --adapter")
    if len(adapters) > 1:
        raise UsageError(f"a test has one adapter, got {len(adapters)}")
    if attest and adapters:
        raise UsageError(
            "--attest cannot be combined with --adapter", hint="the report would be the base's"
        )
    # A wrong password or file fails before the model is loaded.
    pictures = picture_parts(images, sounds)
    attestation = attestation_of(model, attest, key, local, clean)
    with _store(settings, clean) as store:
        engine = config()
        drafter = looks_for_drafter(engine)
        with shown_progress(settings) as progress:
            opened = open_model(
                model, drafter=drafter, store=store, remote=remote, progress=progress
            )
        pull_draft(engine, store, settings, remote)
        tested = opened.model
        del opened  # smoke_test loads the stored files itself
        placed = replace(settings, store_root=str(store.root))
        with ModelSources(placed, remote, merges_adapters=merge) as sources:
            for name, typed in adapters:
                sources.add_adapter(name, typed, [Found(tested, model)])
            report = smoke_test(
                model, store, engine, prompt=prompt, expect=expect, min_tokens_per_second=min_tps,
                max_tokens=max_tokens, pictures=pictures, adapters=sources.adapters, remote=remote,
                on_progress=LoadDisplay(settings).report,
            )  # fmt: skip
    show_json(report.to_json())
    if junit is not None:
        junit.write_bytes(junit_xml(report))
    if attestation is not None:
        attestation(report, tested, remote, settings)
    return 0 if report.passed else 1


@contextmanager
def _store(settings: Settings, clean: bool) -> Iterator[LayoutStore]:
    if not clean:
        yield settings.store()
        return
    from modelpack.store.layout import LayoutStore

    with tempfile.TemporaryDirectory(prefix="modelpack-smoke-") as directory:
        yield LayoutStore(directory)


def junit_xml(report: SmokeReport) -> bytes:
    """Return the report as JUnit's XML: one case for loading, and one for each check."""
    from xml.etree import ElementTree

    name = report.reference or report.digest
    failed = [check for check in report.checks if check.problem is not None]
    suite = ElementTree.Element(
        "testsuite", name="modelpack smoke", tests=str(1 + len(report.checks)),
        failures=str(len(failed)), errors=str(int(report.error is not None)), skipped="0",
    )  # fmt: skip

    def case(title: str, seconds: float = 0.0) -> ElementTree.Element:
        return ElementTree.SubElement(
            suite, "testcase", classname=_printable(name), name=title, time=f"{seconds:.3f}"
        )

    loading = case("loads and answers", report.load_seconds)
    if report.error is not None:
        ElementTree.SubElement(loading, "error", message=_printable(report.error))
    for check in report.checks:
        element = case(check.name)
        if check.problem is not None:
            failure = ElementTree.SubElement(element, "failure", message=_printable(check.problem))
            failure.text = _printable(report.answer or "")
    text = bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
    return text + b"\n"


def _printable(text: str) -> str:
    """Return `text` with the characters that XML cannot hold replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
