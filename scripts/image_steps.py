"""The steps of a Dockerfile and what the compose files start, without a container engine: in clean Debian roots.

sudo python3 scripts/image_steps.py [--dockerfile docker/Dockerfile] [--root FOLDER] [--certificates FILE] [--wheels FOLDER]

debootstrap makes what stands for the base image. Each instruction of the Dockerfile is then carried out as it stands there: RUN in
a chroot, COPY from what .dockerignore leaves of the checkout, ENV, USER. What runs after that is said by docker/compose.yaml and
docker/compose.cluster.yaml: as their user, in a root that cannot be written, with the folders that they name, as the first
process of its own. Health check, answers and the end by the image's stop signal are looked at. Needs root and debootstrap.

The image for GPUs (docker/Dockerfile, some 7 GB twice) computes on the CPU where there is no GPU, so its steps can be tried anywhere.

Not proven by this: the base image itself (its Python may be another one than Debian's), layers, registries, a network of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
BASE = re.compile(r"python:[\d.]+-slim-bookworm")
PACKAGES = "python3,python3-venv,ca-certificates"
KEY, TOKEN = "a-key-of-this-proof", "a-token-of-this-proof-only"
READY_WITHIN_S = 600


@dataclass
class Stage:
    """A root and what the instructions said so far."""

    root: Path
    folder: str = "/"
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    entry: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    stop: str = "SIGTERM"

    def chroot(self, words: list[str], user: str | None = None, **more: str) -> list[str]:
        variables = [f"{name}={value}" for name, value in {**self.variables, **self.arguments, **more}.items()]
        inside = ["env", "--ignore-environment", f"--chdir={self.folder}", *variables, *words]
        return ["chroot", f"--userspec={user or self.user}", str(self.root), *inside]


def say(text: str) -> None:
    print(text, flush=True)


def instructions(file: Path) -> Iterator[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.M)
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, rest


def make_base(root: Path, certificates: Path | None, wheels: Path | None) -> None:
    if not (root / "usr").exists():
        say(f"debootstrap: bookworm with {PACKAGES}")
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    python = root / "usr/local/bin/python"  # the name that the base image has
    if not python.is_symlink():
        python.symlink_to("/usr/bin/python3")
    (root / "etc/resolv.conf").write_text(Path("/etc/resolv.conf").read_text())
    if certificates is not None:
        shutil.copy(certificates, root / "etc/ssl/certs/ca-certificates.crt")
    if wheels is not None:
        shutil.copytree(wheels, root / "wheels", dirs_exist_ok=True)
        (root / "etc/pip.conf").write_text("[global]\nfind-links = /wheels\n")


def carry_out(stage: Stage, word: str, rest: str, others: dict[str, Stage], context: Path) -> None:
    """One instruction of a Dockerfile."""
    if word == "RUN":
        say(f"RUN {rest}")
        subprocess.run(stage.chroot(["sh", "-c", rest]), check=True)
    elif word == "COPY":
        *sources, target = shlex.split(rest)
        above = context
        if sources[0].startswith("--from="):
            above = others[sources.pop(0).removeprefix("--from=")].root
        into = stage.root / (target if target.startswith("/") else f"{stage.folder}/{target}").lstrip("/")
        for source in sources:
            found = above / source.lstrip("/")
            if found.is_dir():
                shutil.copytree(found, into, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy(found, into)
    elif word in ("ENV", "ARG"):
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            value = value.replace("$PATH", stage.variables["PATH"])
            (stage.variables if word == "ENV" else stage.arguments)[name] = value
    elif word == "WORKDIR":
        stage.folder = rest
        (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif word == "HEALTHCHECK":
        stage.health = json.loads(rest.partition("CMD ")[2])
    elif word in ("USER", "STOPSIGNAL", "ENTRYPOINT"):
        name = {"USER": "user", "STOPSIGNAL": "stop", "ENTRYPOINT": "entry"}[word]
        setattr(stage, name, json.loads(rest) if word == "ENTRYPOINT" else rest)
    elif word not in ("VOLUME", "EXPOSE", "CMD"):
        sys.exit(f"this does not know what {word} does")


def _ignored(folder: str, names: list[str]) -> list[str]:
    """Of these names in a folder of the checkout, what .dockerignore leaves out."""
    lines = (CHECKOUT / ".dockerignore").read_text().split()
    anywhere = {line.removeprefix("**/") for line in lines if line.startswith("**/")}
    return [name for name in names if name in anywhere or (Path(folder) == CHECKOUT and name in lines)]


def build(file: Path, base: Path, folder: Path) -> Stage:
    """All stages; the last one is what the image would be."""
    context = folder / "context"
    shutil.copytree(CHECKOUT, context, symlinks=True, ignore=_ignored)
    stages: dict[str, Stage] = {}
    name = ""
    for word, rest in instructions(file):
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            if not BASE.fullmatch(image):
                sys.exit(f"{image} is not a base that a Debian here can stand for")
            name = name or "image"
            stages[name] = Stage(folder / name)
            subprocess.run(["cp", "--archive", str(base), str(folder / name)], check=True)
        else:
            carry_out(stages[name], word, rest, stages, context)
    return stages[name]


def service(file: str, name: str) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load((CHECKOUT / "docker" / file).read_text())["services"][name]
    return found


@contextlib.contextmanager
def running(image: Stage, models: Path, said: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """A service of a compose file: the image's command as the first process of its own, its root not to be written."""
    assert said["read_only"], "what this proves holds for roots that cannot be written"
    room, root = ["unshare", "--mount", "--pid", "--fork", "--kill-child"], image.root
    mounts = [f"mount --bind {root} {root}", f"mount -o remount,ro,bind {root}", f"mount -t proc proc {root}/proc"]
    mounts += [f"mount -t tmpfs -o mode=1777 tmpfs {root}{place}" for place in said["tmpfs"]]
    if said.get("volumes"):
        mounts.append(f"mount --bind {models} {root}/models")
    command = image.chroot(
        [*image.entry, *shlex.split(said["command"])], FASTQWEN_API_KEY=KEY, FASTQWEN_CLUSTER_TOKEN=TOKEN
    )
    process = subprocess.Popen([*room, "sh", "-c", f"{' && '.join(mounts)} && exec {shlex.join(command)}"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def end(image: Stage, process: subprocess.Popen[bytes], within_s: float) -> int:
    """By the image's signal, as an engine sends it to the first process of a container."""
    [first] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    subprocess.run(["kill", f"-{image.stop.removeprefix('SIG')}", first], check=True)
    return process.wait(within_s)


def wait_healthy(image: Stage, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            sys.exit(f"it ended with status {process.returncode}")
        if subprocess.run(image.chroot(image.health), capture_output=True, check=False).returncode == 0:
            return
        time.sleep(1)
    sys.exit(f"the health check failed for {READY_WITHIN_S} s")


def ask(model: str) -> str:
    """As soon as there is an answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    until_s = time.monotonic() + READY_WITHIN_S
    while True:
        request = urllib.request.Request(
            "http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(), headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(1)


def prove(image: Stage, models: Path) -> None:
    one = service("compose.yaml", "serve")
    say(f"compose.yaml: {one['command']}")
    with running(image, models, one) as process:
        wait_healthy(image, process)
        say(f"healthy; it says: {ask('demo')!r}")
        say(f"{image.stop}: status {end(image, process, 75)}")
    hosts = image.root / "etc/hosts"
    hosts.write_text("127.0.0.1 localhost controller\n")
    roles = {name: service("compose.cluster.yaml", name) for name in ("controller", "worker", "api")}
    with contextlib.ExitStack() as stack:
        started = {}
        for name, said in roles.items():
            say(f"compose.cluster.yaml: {said['command']}")
            started[name] = stack.enter_context(running(image, models, said))
        say(f"the cluster says: {ask('demo')!r}")
        check = roles["controller"]["healthcheck"]["test"][1:]
        done = subprocess.run(
            image.chroot(check, FASTQWEN_CLUSTER_TOKEN=TOKEN, FASTQWEN_STATE="/tmp"), check=True, capture_output=True
        )
        say(done.stdout.decode().rstrip())
        for name in ("api", "worker", "controller"):
            say(f"{name}, {image.stop}: status {end(image, started[name], 75)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--dockerfile", type=Path, default=CHECKOUT / "docker/Dockerfile.cpu", help="Default: docker/Dockerfile.cpu."
    )
    parser.add_argument(
        "--root", type=Path, help="Where the clean Debian lies or shall lie. Default: made, and removed."
    )
    parser.add_argument("--certificates", type=Path, help="A bundle to trust, for networks with one of their own.")
    parser.add_argument("--wheels", type=Path, help="Wheels that pip finds beside the index.")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs inside ends as well
    with tempfile.TemporaryDirectory(prefix="image-steps-") as made:
        folder = Path(made)
        folder.chmod(0o755)  # the image's user must reach its root
        base, models = options.root or folder / "debian", folder / "models"
        make_base(base, options.certificates, options.wheels)
        image = build(options.dockerfile, base, folder)
        models.mkdir()
        owner, group = image.user.split(":")
        shutil.chown(models, int(owner), int(group))
        prove(image, models)
    say("all steps hold")


if __name__ == "__main__":
    main()
