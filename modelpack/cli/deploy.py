"""`modelpack k8s` and `modelpack compose`: serve models in Kubernetes and Docker Compose."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpack._version import __version__
from modelpack.cli.help import command, group
from modelpack.cli.options import (
    SIZE,
    Settings,
    common_options_without,
    remote_options,
    trust_options,
)
from modelpack.cli.output import note, show
from modelpack.errors import (
    ModelpackError,
    RemoteUnavailableError,
    UsageError,
    exit_status,
)
from modelpack.operations.remote import RemoteOptions

if TYPE_CHECKING:
    from modelpack.artifacts.reference import Reference
    from modelpack.deploy.kubernetes import Access

_VLLM_IMAGE = "docker.io/vllm/vllm-openai:v0.33.0"
_OWN_IMAGE = f"modelpack:{__version__}"


@command()
@click.argument("reference", metavar="REF")
@click.option(
    "--engine", type=click.Choice(["vllm", "modelpack"]),
    help="Run this server. [default: modelpack for a GGUF file, else vllm]",
)  # fmt: skip
@click.option("--kserve", is_flag=True, help="Print an InferenceService instead of a Deployment.")
@click.option(
    "--gateway", is_flag=True,
    help="Print a gateway in front of the pods too; prompts that begin alike go to the same pod.",
)  # fmt: skip
@click.option(
    "--keys-secret", metavar="NAME",
    help="With --gateway: require the API keys in keys.toml of this Secret.",
)  # fmt: skip
@click.option(
    "--serving-runtime", is_flag=True,
    help="With --kserve and --model-image: print a ClusterServingRuntime too, which runs --image.",
)  # fmt: skip
@click.option(
    "--image", metavar="IMAGE",
    help=f"Run this image of the server. [default: {_VLLM_IMAGE}, or --tool-image]",
)  # fmt: skip
@click.option(
    "--tool-image", metavar="IMAGE", default=_OWN_IMAGE, show_default=True,
    help="Pull the model into the pod with this image, which contains modelpack.",
)  # fmt: skip
@click.option(
    "--model-image", metavar="IMAGE",
    help="Mount this OCI image, with the model's files under /models, instead of pulling.",
)  # fmt: skip
@click.option("--name", help="Name the objects. [default: made from REF]")
@click.option(
    "--namespace", help="Create the objects in this namespace. [default: the namespace of kubectl]"
)
@click.option(
    "--served-model-name",
    metavar="NAME",
    help="Use this model name in API requests. [default: REF]",
)
@click.option("--replicas", type=click.IntRange(min=0), default=1, show_default=True,
              help="Run this many pods.")  # fmt: skip
@click.option(
    "--max-replicas", type=click.IntRange(min=1), metavar="N",
    help="Add pods up to this many while requests wait or the KV cache is nearly full.",
)  # fmt: skip
@click.option("--monitor", is_flag=True,
              help="Print a ServiceMonitor too, for Prometheus' operator.")  # fmt: skip
@click.option(
    "--gpus", type=click.IntRange(min=0), metavar="N",
    help="Request this many GPUs for each pod. [default: by model size for vllm, 0 for modelpack]",
)  # fmt: skip
@click.option(
    "--nodes", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="Divide the model among this many pods, in a LeaderWorkerSet; with vllm only.",
)  # fmt: skip
@click.option(
    "--gpu-memory", type=SIZE, metavar="SIZE", default="80GB", show_default=True,
    help="Assume this memory of one GPU.",
)  # fmt: skip
@click.option(
    "--cpus", type=click.FloatRange(min=0.1, max=512), default=1, show_default=True, metavar="N",
    help="Request this many CPU cores for each pod, which may use more.",
)  # fmt: skip
@click.option(
    "--user", type=click.IntRange(min=0), default=10001, show_default=True, metavar="UID",
    help="Run containers as this user; 0 is root, which the restricted policy refuses.",
)  # fmt: skip
@click.option(
    "--pull-secret",
    metavar="NAME",
    help="Pull with this secret of type kubernetes.io/dockerconfigjson.",
)
@click.option(
    "--allow-host", "hosts", metavar="NAME", multiple=True,
    help="With --engine modelpack: accept this host name, such as an Ingress's, besides the "
    "Service's. May be repeated.",
)  # fmt: skip
@click.option(
    "--helm", type=click.Path(path_type=Path), metavar="DIR",
    help="Write a Helm chart into this new directory instead of printing the objects.",
)  # fmt: skip
@click.option(
    "--kustomize", type=click.Path(path_type=Path), metavar="DIR",
    help="Write a base with the objects, and an overlay, into this new directory.",
)  # fmt: skip
@remote_options
@trust_options
@common_options_without("store", "quiet", "progress")
def k8s(
    settings: Settings,
    reference: str,
    engine: Any,
    kserve: bool,
    gateway: bool,
    keys_secret: str | None,
    serving_runtime: bool,
    image: str | None,
    tool_image: str,
    model_image: str | None,
    name: str | None,
    namespace: str | None,
    served_model_name: str | None,
    replicas: int,
    max_replicas: int | None,
    monitor: bool,
    gpus: int | None,
    nodes: int,
    gpu_memory: int,
    cpus: float,
    user: int,
    pull_secret: str | None,
    hosts: tuple[str, ...],
    helm: Path | None,
    kustomize: Path | None,
    remote: RemoteOptions,
) -> None:
    """Print a Deployment and a Service, or with --kserve an InferenceService, for a model.

    Reads the digest and the size of REF from its registry. Pods pull that digest; probes, memory
    and GPUs are set by the size. To serve the model: `modelpack k8s REF | kubectl apply -f -`.
    """
    from modelpack.artifacts.reference import Reference
    from modelpack.deploy.gateway import behind_gateway
    from modelpack.deploy.helm import RELEASE, chart
    from modelpack.deploy.kserve import inference_service
    from modelpack.deploy.kubernetes import (
        Demands,
        Workload,
        default_name,
        demands_of,
        deployment,
    )
    from modelpack.deploy.manifests import kustomization, to_yaml, write_files
    from modelpack.operations.lookup import inspect
    from modelpack.operations.trust import check_remote
    from modelpack.storage import watching

    if model_image is not None and remote.trust is not None:
        raise UsageError(
            f"cannot verify the files of --model-image {model_image}: images have no model "
            "signatures, which --verify-key, --certificate-authority, --certificate-identity or "
            "--policy requires",
            hint="leave out --model-image: pods then pull the signed model by digest",
        )
    if kserve and (max_replicas is not None or monitor):
        raise UsageError(
            "--kserve cannot be combined with --max-replicas or --monitor: KServe has its own "
            "autoscaler and metrics",
            hint="leave out --kserve, or set spec.predictor.maxReplicas of the InferenceService",
        )
    if serving_runtime and not kserve:
        raise UsageError("--serving-runtime requires --kserve", hint="give --kserve")
    if kserve and (nodes > 1 or gateway):
        one = "--nodes" if nodes > 1 else "--gateway"
        raise UsageError(f"{one} cannot be combined with --kserve", hint="leave out --kserve")
    if keys_secret is not None and not gateway:
        raise UsageError("--keys-secret requires --gateway", hint="give --gateway")
    if helm is not None and kustomize is not None:
        raise UsageError(
            "--helm cannot be combined with --kustomize", hint="run the command once for each"
        )
    if helm is not None and (kserve or namespace is not None):
        raise UsageError(
            f"--helm cannot be combined with {'--kserve' if kserve else '--namespace'}",
            hint="leave out --kserve" if kserve else "give --namespace to helm install",
        )
    access = _access(remote)
    if model_image is not None:
        _check_image(settings, Reference.parse(model_image), remote)
    wanted = Reference.parse(reference)
    model = inspect(reference, remote=remote, from_registry=True)
    check_remote(model, remote, watching(None))  # pods pull the checked digest
    if engine is None:
        engine = "modelpack" if model.config.format == "gguf" else "vllm"
    if gpus is None:
        share = Demands(-(-demands_of(model).weights // nodes))
        gpus = share.gpus(gpu_memory) if engine == "vllm" else 0
    workload = Workload(
        model=model,
        reference=wanted,
        name=RELEASE if helm is not None else name or default_name(wanted),
        engine=engine,
        engine_image=image or (_VLLM_IMAGE if engine == "vllm" else tool_image),
        tool_image=tool_image,
        gpus=gpus,
        served_name=served_model_name or wanted.familiar,
        model_image=model_image,
        namespace=namespace,
        replicas=replicas,
        pull_secret=pull_secret,
        access=access,
        cpus=round(Decimal(cpus), 3),
        user=user,
        hosts=hosts,
        max_replicas=max_replicas,
        monitored=monitor,
        nodes=nodes,
    )
    if kserve:
        objects = inference_service(workload, own_runtime=serving_runtime)
    else:
        objects = behind_gateway(workload, keys_secret) if gateway else deployment(workload)
    if helm is not None:
        called = replace(workload, name=name or default_name(wanted)).name  # checks the name
        files = chart(called, model, workload.pinned, objects, needs_key=keys_secret is not None)
        write_files(helm, files, "a chart")
        show(settings, {"chart": str(helm)}, str(helm))
    elif kustomize is not None:
        write_files(kustomize, kustomization(objects), "a base")
        show(settings, {"kustomize": str(kustomize)}, str(kustomize))
    elif settings.json:
        listed = {"apiVersion": "v1", "kind": "List", "items": objects}
        click.echo(json.dumps(listed, indent=2))
    else:
        click.echo(to_yaml(objects), nl=False)


def _access(remote: RemoteOptions) -> Access:
    """Return how pods reach the registry, as this command does."""
    from modelpack.deploy.kubernetes import Access

    tls = remote.tls
    if tls is None:
        return Access(bool(remote.plain_http))
    if tls.client_certificate:
        raise UsageError(
            "--client-cert cannot be used here: pods would need its private key",
            hint="let pods pull with --pull-secret, or mount an image with --model-image",
        )
    authority = None
    if tls.ca_file is not None:
        try:
            authority = tls.ca_file.read_text("ascii")
        except (OSError, ValueError) as error:
            raise UsageError(f"--ca-file: cannot read {tls.ca_file}: {error}") from error
    return Access(bool(remote.plain_http), tuple(sorted(tls.insecure)), authority)


def _check_image(settings: Settings, image: Reference, remote: RemoteOptions) -> None:
    """Raise `UnsupportedError` for a model; an image that only the cluster can reach is noted."""
    from modelpack.operations.lookup import check_image
    from modelpack.registry import RetryPolicy

    try:
        check_image(image, replace(remote, retry=RetryPolicy(tries=1)))
    except RemoteUnavailableError as error:
        note(settings, f"warning: {image} was not checked: {error}")


_SERVICE = click.argument("service", required=False)


@group()
@click.option("--project-name", metavar="NAME", help="Use this project name; Compose passes it.")
def compose(project_name: str | None) -> None:
    """Serve the models of a Compose file; `install` adds the plugins to Docker."""


@compose.command()
def metadata() -> None:
    """Print the options of the provider, for Compose."""
    from modelpack.deploy.compose import METADATA

    click.echo(json.dumps(METADATA), nl=False)


@compose.command()
@click.option(
    "--model", "models", multiple=True, required=True, help="Serve this model. May be repeated."
)
@click.option(
    "--context-size", type=int, default=-1,
    help="Limit the context to this many tokens; -1: the model's own limit.",
)  # fmt: skip
@click.option("--runtime-flags", default="", help="Pass these flags of llama.cpp or vLLM.")
@_SERVICE
def up(models: tuple[str, ...], context_size: int, runtime_flags: str, service: str | None) -> int:
    """Load and configure the models in a model server; print its address for Compose."""
    from modelpack.deploy.compose import ComposeMessages, provide
    from modelpack.deploy.local_server import local_server

    messages = ComposeMessages(click.echo)
    try:
        messages.info("looking for a model server")
        provide(
            local_server(), models, messages,
            context_size=context_size if context_size > 0 else None, runtime_flags=runtime_flags,
        )  # fmt: skip
    except ModelpackError as error:
        # Compose reads standard output only, and nothing after an error.
        messages.error(f"{error} ({error.hint})" if error.hint else str(error))
        return exit_status(error)
    return 0


@compose.command()
@_SERVICE
def down(service: str | None) -> None:
    """Leave the server running: it unloads idle models, and other projects may use it."""


@compose.command()
@click.option(
    "--models", is_flag=True,
    help="Also replace `docker model`, to serve the top-level `models:` of Compose files.",
)  # fmt: skip
@click.option(
    "--directory", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Install into this directory of Docker's plugins. [default: ~/.docker/cli-plugins]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a plugin of another vendor.")
@common_options_without("store", "progress")
def install(settings: Settings, models: bool, directory: Path | None, force: bool) -> None:
    """Install the plugin `docker modelpack`; with --models, also `docker model`."""
    from modelpack.deploy.compose import install_plugins

    names = ["docker-modelpack", *(["docker-model"] if models else [])]
    made = install_plugins(names, directory, force=force)
    show(settings, {"plugins": [str(path) for path in made]}, "\n".join(map(str, made)))
    if not models:
        note(settings, "give --models to serve the top-level `models:` of Compose files too")


@compose.command()
@common_options_without("store", "progress")
def stop(settings: Settings) -> None:
    """Stop the model server that was started for Compose, after its pending requests."""
    from modelpack.deploy.local_server import stop_server

    process = stop_server()
    show(settings, {"stopped": process}, "")
    note(settings, "no server was started" if process is None else f"stopping process {process}")
