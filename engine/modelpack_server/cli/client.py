"""`modelpack ps`, `unload`, `configure`, `adapter` and `launch`: clients of a running server."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from modelpack.cli.help import Command, command, group
from modelpack.cli.options import Settings, common_options_without, model_argument, model_names
from modelpack.cli.output import human_size, note, show, show_json, table
from modelpack.errors import ModelpackError, NotFoundError, UsageError
from modelpack_server.cli.engine_options import preset_option
from modelpack_server.server_client import DEFAULT_HOST, call_for_text, call_server

# An error lists at most this many models of a server.
_MOST_LISTED = 8
_HEADER = ("MODEL NAME", "STATE", "REQUESTS", "CONTEXT", "MEMORY", "UNTIL")

host_option = click.option(
    "--url", "--host", "host",
    metavar="URL", envvar="MODELPACK_HOST", default=DEFAULT_HOST, show_default=True,
    help="Use the server at this URL. [env: MODELPACK_HOST; API key: MODELPACK_API_KEY]",
)  # fmt: skip


@command()
@host_option
@common_options_without("store", "progress")
def ps(settings: Settings, host: str) -> None:
    """List the models that a server has loaded; of servers such as vLLM, those that they serve."""
    answer = _loaded(host)
    if settings.json:
        show_json(answer)
        return
    if settings.quiet:
        for model in answer["models"]:
            click.echo(model["name"])
        return
    click.echo(table(_HEADER, [_row(model) for model in answer["models"]]))


@command()
@click.argument("models", metavar="[MODEL]...", nargs=-1, shell_complete=model_names)
@click.option("--all", "everything", is_flag=True, help="Unload all models.")
@click.option("--now", is_flag=True, help="Cancel running requests instead of waiting for them.")
@host_option
@common_options_without("store", "quiet", "progress")
def unload(
    settings: Settings, models: tuple[str, ...], everything: bool, now: bool, host: str
) -> None:
    """Unload MODELs from a server; their next request loads them again."""
    if everything == bool(models):
        raise UsageError("expected either models or --all", hint="name the models, or give --all")
    body = {"models": list(models), "all": everything, "wait": not now}
    answer = call_server(host, "POST", "/pool/unload", body)
    show(settings, answer, "\n".join(answer["unloaded"]))


@command(
    context_settings={"ignore_unknown_options": True},
    epilog="Flags of llama.cpp and vLLM follow --: -- --temp 0.7 --top-k 40",
)
@model_argument()
@click.option("--max-model-len", "--context-size", "context_size", type=click.IntRange(min=2),
              help="Limit the context to this many tokens.")  # fmt: skip
@preset_option
@click.option("--keep-alive", metavar="TIME",
              help="Keep the model loaded for this time after its last use, like 5m; "
              "-1: forever.")  # fmt: skip
@click.argument("flags", metavar="[-- FLAGS...]", nargs=-1, type=click.UNPROCESSED)
@host_option
@common_options_without("store", "quiet", "progress")
def configure(
    settings: Settings,
    model: str,
    context_size: int | None,
    preset: str | None,
    keep_alive: str | None,
    flags: tuple[str, ...],
    host: str,
) -> None:
    """Configure how a server loads MODEL next; without options, reset it to the defaults."""
    given = {"context_size": context_size, "preset": preset, "keep_alive": keep_alive}
    body: dict[str, Any] = {"model": model, "runtime_flags": list(flags)}
    body |= {name: value for name, value in given.items() if value is not None}
    show(settings, call_server(host, "POST", "/pool/configure", body), "")


@group()
def adapter() -> None:
    """Load, unload and list the LoRA adapters of a server."""


@adapter.command("add")
@click.argument("name")
@click.argument("source", metavar="REF|DIR")
@host_option
@common_options_without("store", "quiet", "progress")
def add_adapter(settings: Settings, name: str, source: str, host: str) -> None:
    """Load the adapter REF, or in DIR on the server's machine, as NAME.

    The server has to allow it: see `modelpack serve --allow-adapter-loading`.
    """
    if source.startswith(("/", ".", "~")) or Path(source).is_dir():
        source = os.path.abspath(Path(source).expanduser())
    _change_adapter(host, "load", {"lora_name": name, "lora_path": source})
    show(settings, {"name": name, "source": source}, name)


@adapter.command("rm")
@click.argument("name")
@host_option
@common_options_without("store", "quiet", "progress")
def remove_adapter(settings: Settings, name: str, host: str) -> None:
    """Unload the adapter NAME; requests that use it go on."""
    _change_adapter(host, "unload", {"lora_name": name})
    show(settings, {"name": name}, name)


def _change_adapter(host: str, verb: str, body: dict[str, Any]) -> None:
    try:
        call_for_text(host, "POST", f"/v1/{verb}_lora_adapter", body)
    except NotFoundError as error:
        if not str(error).startswith("no such route"):  # but no such adapter
            raise
        raise UsageError(
            f"the server at {host} loads no adapters",
            hint="start it with --allow-adapter-loading",
        ) from None


@adapter.command("ls")
@host_option
@common_options_without("store", "progress")
def list_adapters(settings: Settings, host: str) -> None:
    """List the adapters that requests can name, with their bases."""
    found = [model for model in _served(host) if "parent" in model]
    if settings.json:
        keys = {"name": "id", "base": "parent", "digest": "root"}
        rows = [{key: model[field] for key, field in keys.items()} for model in found]
        show_json({"adapters": rows})
    elif settings.quiet:
        for model in found:
            click.echo(model["id"])
    else:
        rows_shown = [(model["id"], model["parent"] or "", model["root"]) for model in found]
        click.echo(table(("ADAPTER NAME", "BASE", "DIGEST"), rows_shown))


def _loaded(host: str) -> dict[str, Any]:
    """Return the answer of `/pool`; where there is none, the models of OpenAI's API in its form."""
    try:
        return call_server(host, "GET", "/pool")
    except NotFoundError:
        models = _served(host)
    return {
        "models": [
            {"name": str(model["id"]), "context_size": model.get("max_model_len")}
            for model in models
        ]
    }


def _served(host: str) -> list[dict[str, Any]]:
    """Return the models in the list of OpenAI's API."""
    models = call_server(host, "GET", "/v1/models").get("data")
    listed = models if isinstance(models, list) else []
    return [model for model in listed if isinstance(model, dict) and "id" in model]


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    if "state" not in model:  # of another server, which says no more
        return model["name"], "loaded", "", str(model["context_size"] or ""), "", ""
    until = "pinned" if model["pinned"] else "in use" if model["users"] else "always"
    if model["expires_at"]:
        left = datetime.fromisoformat(model["expires_at"]) - datetime.now(UTC)
        until = f"{max(0, round(left.total_seconds()))} s from now"
    size, context = human_size(model["memory"]), str(model["context_size"] or "")
    return model["name"], model["state"], str(model["users"]), context, size, until


# Programs require a key even if the server does not.
_ANY_KEY = "modelpack"
_ARGUMENTS = "modelpack.arguments"
#: Stands for the directory of a program's files.
FOLDER = "{folder}"


@dataclass(frozen=True, slots=True)
class Target:
    """A model of a server, as programs need it. `context` is in tokens, None if unknown."""

    url: str
    model: str
    key: str | None = None
    context: int | None = None

    @property
    def any_key(self) -> str:
        """The API key, or a placeholder if the server requires none."""
        return self.key or _ANY_KEY


@dataclass(frozen=True, slots=True)
class Setup:
    """The environment variables to set and unset for a program, and arguments to prepend.

    `files` are texts by name, written to a directory of their own; FOLDER in variables and
    arguments stands for it. `advice` is what the user has to do in the program.
    """

    variables: dict[str, str]
    unset: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    advice: str = ""


def _claude(target: Target) -> Setup:
    """Return the setup of Claude Code: https://code.claude.com/docs/en/env-vars"""
    models = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_DEFAULT_OPUS_MODEL",
              "ANTHROPIC_DEFAULT_SONNET_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL",
              "CLAUDE_CODE_SUBAGENT_MODEL")  # fmt: skip
    return Setup(
        {
            "ANTHROPIC_BASE_URL": f"{target.url}/anthropic",
            "ANTHROPIC_AUTH_TOKEN": target.any_key,
            **dict.fromkeys(models, target.model),
            # Without it, the first line differs in every prompt, which defeats prefix caching.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        unset=("ANTHROPIC_API_KEY",),  # with both, it asks the user which one to use
    )


def _codex(target: Target) -> Setup:
    """Return the setup of Codex: https://developers.openai.com/codex/config-advanced"""
    provider = {"name": "Modelpack", "base_url": f"{target.url}/v1", "wire_api": "responses"}
    variables = {}
    if target.key is not None:
        provider["env_key"] = "MODELPACK_API_KEY"
        variables["MODELPACK_API_KEY"] = target.key
    # Web search runs on OpenAI's servers; other servers reject the tool.
    options = {"model_provider": "modelpack", "web_search": "disabled"}
    options |= {f"model_providers.modelpack.{name}": value for name, value in provider.items()}
    arguments = ["-m", target.model]
    for name, value in options.items():
        arguments += ["-c", f"{name}={json.dumps(value)}"]  # a JSON string is valid TOML
    if target.context is not None:
        arguments += ["-c", f"model_context_window={target.context}"]
    return Setup(variables, arguments=tuple(arguments))


def _opencode(target: Target) -> Setup:
    """Return the setup of OpenCode: https://opencode.ai/docs/config and /docs/providers"""
    model: dict[str, Any] = {"name": target.model}
    if target.context is not None:
        model["limit"] = {"context": target.context, "output": target.context}
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"modelpack/{target.model}",
        "small_model": f"modelpack/{target.model}",
        "provider": {
            "modelpack": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "Modelpack",
                "options": {"baseURL": f"{target.url}/v1", "apiKey": target.any_key},
                "models": {target.model: model},
            }
        },
    }
    return Setup({"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


def _aider(target: Target) -> Setup:
    """Return the setup of Aider: https://aider.chat/docs/llms/openai-compat.html"""
    return Setup(
        {"OPENAI_API_BASE": f"{target.url}/v1", "OPENAI_API_KEY": target.any_key},
        arguments=("--model", f"openai/{target.model}", "--no-show-model-warnings"),
    )


def _goose(target: Target) -> Setup:
    """Return the setup of Goose: https://block.github.io/goose/docs/getting-started/providers"""
    return Setup({
        "GOOSE_PROVIDER": "openai",
        "GOOSE_MODEL": target.model,
        "OPENAI_HOST": target.url,
        "OPENAI_BASE_PATH": "v1/chat/completions",
        "OPENAI_API_KEY": target.any_key,
        **({"GOOSE_CONTEXT_LIMIT": str(target.context)} if target.context else {}),
    })  # fmt: skip


def _open_webui(target: Target) -> Setup:
    """Return the setup of Open WebUI: https://docs.openwebui.com/reference/env-configuration"""
    return Setup({
        "OPENAI_API_BASE_URL": f"{target.url}/v1",
        "OPENAI_API_KEY": target.any_key,
        "DEFAULT_MODELS": target.model,
        "ENABLE_OLLAMA_API": "False",
        "ENABLE_PERSISTENT_CONFIG": "False",  # else settings of an earlier run win
    }, arguments=("serve",))  # fmt: skip


def _llm(target: Target) -> Setup:
    """Return the setup of llm: https://llm.datasette.io/en/stable/other-models.html"""
    model = {
        "model_id": "modelpack", "model_name": target.model, "api_base": f"{target.url}/v1",
        "supports_schema": True, "supports_tools": True,
    }  # fmt: skip
    return Setup(
        {"LLM_USER_PATH": FOLDER, "OPENAI_API_KEY": target.any_key, "LLM_MODEL": "modelpack"},
        files={"extra-openai-models.yaml": json.dumps([model], indent=2)},  # JSON is valid YAML
    )


def _crush(target: Target) -> Setup:
    """Return the setup of Crush: https://github.com/charmbracelet/crush, configuration"""
    chosen = {"provider": "modelpack", "model": target.model}
    model = {"id": target.model, "name": target.model}
    window = {"context_window": target.context} if target.context else {}
    config = {
        "$schema": "https://charm.land/crush.json",
        "models": {"large": chosen, "small": chosen},
        "providers": {
            "modelpack": {
                "name": "Modelpack",
                "type": "openai-compat",
                "base_url": f"{target.url}/v1",
                "api_key": "$MODELPACK_API_KEY",
                "models": [model | window],
            }
        },
    }
    return Setup(
        {"CRUSH_GLOBAL_CONFIG": FOLDER, "MODELPACK_API_KEY": target.any_key},
        files={"crush.json": json.dumps(config, indent=2)},
    )


def _continue(target: Target) -> Setup:
    """Return the setup of Continue's command line: https://docs.continue.dev/reference"""
    model = {
        "name": target.model, "provider": "openai", "model": target.model,
        "apiBase": f"{target.url}/v1", "apiKey": target.any_key,
        "roles": ["chat", "edit", "apply"],
    }  # fmt: skip
    config = {"name": "Modelpack", "version": "0.0.1", "schema": "v1", "models": [model]}
    return Setup(
        {},
        arguments=("--config", f"{FOLDER}/config.yaml"),
        files={"config.yaml": json.dumps(config, indent=2)},  # JSON is valid YAML
    )


def _zed(target: Target) -> Setup:
    """Return the setup of Zed: https://zed.dev/docs/ai/use-api-access#openai-compatible"""
    model = {"name": target.model, "max_tokens": target.context or 8192}
    provider = {"modelpack": {"api_url": f"{target.url}/v1", "available_models": [model]}}
    settings = {"language_models": {"openai_compatible": provider}}
    return Setup(
        {"MODELPACK_API_KEY": target.any_key},
        advice=f"add this to Zed's settings.json, once:\n{json.dumps(settings, indent=2)}",
    )


def _env(target: Target) -> Setup:
    """Return the variables of the official clients of all four APIs."""
    return Setup(
        {
            "OPENAI_BASE_URL": f"{target.url}/v1",
            "OPENAI_API_KEY": target.any_key,
            "OPENAI_MODEL": target.model,
            "ANTHROPIC_BASE_URL": f"{target.url}/anthropic",
            "ANTHROPIC_AUTH_TOKEN": target.any_key,
            "ANTHROPIC_MODEL": target.model,
            **dict.fromkeys(("OLLAMA_HOST", "MODEL_RUNNER_HOST", "MODELPACK_HOST"), target.url),
        },
        unset=("ANTHROPIC_API_KEY",),
    )


@dataclass(frozen=True, slots=True)
class Program:
    """A program that `launch` supports.

    `install` is the command that installs it, `command` its executable if that has another name.
    """

    setup: Callable[[Target], Setup]
    install: str = ""
    command: str = ""


PROGRAMS = {
    "claude": Program(_claude, "npm install -g @anthropic-ai/claude-code"),
    "codex": Program(_codex, "npm install -g @openai/codex"),
    "opencode": Program(_opencode, "npm install -g opencode-ai"),
    "aider": Program(_aider, "pip install aider-install && aider-install"),
    "continue": Program(_continue, "npm install -g @continuedev/cli", "cn"),
    "crush": Program(_crush, "npm install -g @charmland/crush"),
    "goose": Program(_goose, "brew install block-goose-cli"),
    "llm": Program(_llm, "pip install llm"),
    "open-webui": Program(_open_webui, "pip install open-webui"),
    "zed": Program(_zed, "curl -f https://zed.dev/install.sh | sh"),
    "env": Program(_env),
}


class _WithArguments(Command):
    """A command that keeps the arguments after -- unparsed in the context's `meta`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments before --."""
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[_ARGUMENTS] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])


@command(
    cls=_WithArguments,
    options_metavar="[OPTIONS]",
    epilog="modelpack launch claude ai/qwen3 -- -p 'say hi'; "
    'eval "$(modelpack launch env ai/qwen3)"',
)
@click.argument("program", type=click.Choice(list(PROGRAMS)))
@click.argument("model", metavar="[MODEL] [-- ARGS...]", required=False, shell_complete=model_names)
@click.option("--print", "only_print", is_flag=True,
              help="Print the variables instead of running the program.")  # fmt: skip
@host_option
@common_options_without("store", "progress")
def launch(
    settings: Settings, program: str, model: str | None, only_print: bool, host: str
) -> None:
    """Run PROGRAM with MODEL of a running server; MODEL is optional if there is only one.

    env runs ARGS with the variables of all official clients or, without ARGS, prints them.
    """
    arguments: list[str] = click.get_current_context().meta[_ARGUMENTS]
    chosen = PROGRAMS[program]
    command = arguments if program == "env" else [chosen.command or program, *arguments]
    path = None
    if command and not only_print:
        path = shutil.which(command[0])
        if path is None:
            hint = f"run {chosen.install}" if chosen.install else None
            raise NotFoundError(f"{command[0]!r} was not found on the PATH", hint=hint)
    target = find_target(host, model)
    setup = _in_folder(chosen.setup(target), program)
    if command:
        command[1:1] = setup.arguments
    if path is None:
        _print(settings, setup, program, command)
        return
    _write_files(setup, program)
    note(settings, f"{command[0]} uses {target.model} at {target.url}")
    if setup.advice:
        note(settings, setup.advice)
    environment = {key: value for key, value in os.environ.items() if key not in setup.unset}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(path, command, environment | setup.variables)  # noqa: S606 - the user names it


def _folder(program: str) -> Path:
    """Return the directory for the files of a program."""
    from platformdirs import user_cache_path

    return user_cache_path("modelpack") / "launch" / program


def _in_folder(setup: Setup, program: str) -> Setup:
    """Return the setup with the directory's path instead of FOLDER."""
    folder = str(_folder(program))
    return replace(
        setup,
        variables={name: text.replace(FOLDER, folder) for name, text in setup.variables.items()},
        arguments=tuple(text.replace(FOLDER, folder) for text in setup.arguments),
    )


def _write_files(setup: Setup, program: str) -> None:
    """Write the files of a program; they may have the API key, so only the user may read them."""
    for name, text in setup.files.items():
        path = _folder(program) / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(0o600)
        path.write_text(text)


def find_target(host: str, name: str | None) -> Target:
    """Return the model of the server at `host`; raise `NotFoundError` if it has no such model."""
    url = (host if "://" in host else f"http://{host}").rstrip("/")
    if name is None:
        name = _only_model(url)
    model = _described(url, name)
    key = os.environ.get("MODELPACK_API_KEY") or None
    return Target(url, str(model.get("id") or name), key, _context(url, model))


def _described(url: str, name: str) -> dict[str, Any]:
    """Return what the server says of a model; raise `NotFoundError` if it has no such model."""
    try:
        return call_server(url, "GET", f"/v1/models/{quote(name, safe='/:@')}")
    except NotFoundError as error:
        # vLLM has only the list.
        models = _served(url)
        for model in models:
            if model["id"] == name:
                return model
        hint = f"run modelpack pull {shlex.quote(name)}"
        if 0 < len(models) <= _MOST_LISTED:
            hint = f"choose one of {', '.join(str(model['id']) for model in models)}, or {hint}"
        raise NotFoundError(f"no such model at {url}: {name!r}", hint=hint) from error


def _context(url: str, model: dict[str, Any]) -> int | None:
    """Return the context length of the loaded model, else the model's own, in tokens."""
    with suppress(ModelpackError):  # a gateway may deny /pool
        for running in call_server(url, "GET", "/pool")["models"]:
            if running["digest"] == model.get("root") and running["context_size"]:
                return int(running["context_size"])
    size = model.get("dmr", {}).get("context_window", model.get("max_model_len"))
    return size if isinstance(size, int) else None


def _only_model(url: str) -> str:
    models = _served(url)
    names = [str(model["id"]) for model in models]
    if len({model.get("root") for model in models}) == 1:  # aliases have the root of their model
        return names[0]
    if not names:
        raise NotFoundError(f"the server at {url} has no models", hint="run modelpack pull MODEL")
    raise UsageError(
        f"the server at {url} has several models", hint=f"choose one of {', '.join(names)}"
    )


def _print(settings: Settings, setup: Setup, program: str, command: list[str]) -> None:
    texts = (*setup.variables.values(), *command)
    if not all(text.isprintable() for text in texts):
        raise ModelpackError("cannot print the variables: a value has control characters")
    if settings.json:
        show_json(
            {
                "variables": setup.variables,
                "unset": setup.unset,
                "command": command,
                "files": {str(_folder(program) / file): text for file, text in setup.files.items()},
                "advice": setup.advice,
            }
        )
        return
    for name in setup.unset:
        click.echo(f"unset {name}")
    for name, value in setup.variables.items():
        click.echo(f"export {name}={shlex.quote(value)}")
    for file, text in setup.files.items():
        click.echo(f"# {_folder(program) / file}:")
        click.echo("".join(f"#   {line}\n" for line in text.splitlines()), nl=False)
    if setup.arguments:
        click.echo(f"# {shlex.join(command)}")
    for line in setup.advice.splitlines():
        click.echo(f"# {line}")
