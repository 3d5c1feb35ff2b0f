"""Run the real Claude Code, Codex and opencode through `modelpack launch`; keep what they say.

`python -m tests.engine.interactive.real_tools` installs them with npm below .cache (1 GB, which is
why no test does), has each ask a server whose model answers one sentence, fails unless all of them
print it, and writes real_tools.txt beside this file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from tests.engine.scripted import HERMES, ScriptedEngine
from tests.engine.serving.conftest import ScriptedCatalogue

ROOT = Path(__file__).parents[3]
TRANSCRIPT = Path(__file__).with_suffix(".txt")
ANSWER = "Hello from Modelpack"
# The programs' own prompts are long, and a token of this tokenizer is a byte.
CONTEXT = 1_000_000
PACKAGES = {
    "@anthropic-ai/claude-code": "install.cjs",
    "@openai/codex": None,
    "opencode-ai": "postinstall.mjs",
}
ASKED = {
    "claude": ["-p", "say hi"],
    "codex": ["exec", "--skip-git-repo-check", "say hi"],
    "opencode": ["run", "say hi"],
}


def install() -> Path:
    """Install the programs; return their directory."""
    into = ROOT / ".cache" / "launch"
    into.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "install", "--prefix", into, *PACKAGES], check=True)
    for package, script in PACKAGES.items():
        if script is not None:  # npm runs this script only if it is allowed explicitly
            where = into / "node_modules" / package
            subprocess.run(["node", script], cwd=where, check=True)
    return into / "node_modules" / ".bin"


def main() -> None:
    """Install the programs, send each a prompt, and write the transcript."""
    programs = install()
    engine = ScriptedEngine(
        ["Hello ", "from ", "Modelpack"], template=HERMES, max_model_len=CONTEXT
    )

    def pool() -> ModelPool:
        return ModelPool(ScriptedCatalogue(engine), memory=100)

    lines = []
    with (
        tempfile.TemporaryDirectory() as home,
        ModelServer(pool, address="127.0.0.1:0") as server,
    ):
        environment = os.environ | {
            "HOME": home,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'engine'}",
        }
        for program, arguments in ASKED.items():
            version = subprocess.run(
                [program, "--version"], env=environment, capture_output=True, text=True, check=True
            ).stdout.strip()
            done = subprocess.run(
                [sys.executable, "-m", "modelpack", "launch", program, "m", "--host", server.url,
                 "--", *arguments],
                cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, timeout=180, check=False,
            )  # fmt: skip
            if done.returncode or ANSWER not in done.stdout:
                sys.exit(f"{program} {version}: {done.returncode}\n{done.stdout}{done.stderr}")
            lines += [
                f"# {program} {version}",
                f"$ modelpack launch {program} m -- {' '.join(arguments)}",
                done.stdout.strip(),
                "",
            ]
    TRANSCRIPT.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
