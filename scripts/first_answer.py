"""README's first two minutes, word by word, in a clean Debian: from a clone to the first answer. Prints seconds and bytes.

sudo python3 scripts/first_answer.py [--suite bookworm] [--root FOLDER] [--certificates FILE] [--wheels FOLDER]

debootstrap makes the Debian, with what README asks for and nothing else; what runs in it sees no file of this machine. The
commands are README's own: the first of its first block, and the first one that asks with curl, whose answer must be the one
that README shows. Needs root, debootstrap, git and curl.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
PACKAGES = "python3,python3-venv,gcc,g++,make,ca-certificates"
READY = re.compile(r"Open (http://\S+) to chat")
READY_WITHIN_S = 1800
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def say(text: str) -> None:
    print(text, flush=True)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def readme() -> tuple[str, str, str]:
    """The command that serves, the one that asks, and the answer's text."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (CHECKOUT / "README.md").read_text(), re.M | re.S)
    serve = next(text.splitlines()[0] for kind, text in blocks if kind == "sh")
    ask = next(line for kind, text in blocks for line in text.splitlines() if kind == "sh" and line.startswith("curl "))
    shown = next(text for kind, text in blocks if kind == "json")
    return serve, ask, json.loads(shown.replace("{…}", "{}"))["choices"][0]["message"]["content"]


def received_bytes() -> int:
    """By all interfaces of this machine: whatever else it downloads meanwhile counts as well."""
    lines = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    return sum(int(figures.split()[0]) for name, figures in lines if name.strip() != "lo")


def folder_bytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def make_root(root: Path, suite: str, certificates: Path | None, wheels: Path | None) -> None:
    if not (root / "usr").exists():
        say(f"Making a Debian ({suite}) with {PACKAGES} ...")
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(root))
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
    if certificates is not None:
        shutil.copy(certificates, root / "etc/ssl/certs/ca-certificates.crt")
    shutil.rmtree(root / "wheels", ignore_errors=True)
    if wheels is not None:
        say(f"pip finds these beside the index: {', '.join(file.name for file in wheels.iterdir())}")
        shutil.copytree(wheels, root / "wheels")
        (root / "etc/pip.conf").write_text("[global]\nfind-links = /wheels\n")


def inside(root: Path, command: str) -> list[str]:
    """Its processes have a number space of their own and end with it."""
    room = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={root}/proc"]
    clean = ["env", "--ignore-environment", f"PATH={PATH}", "HOME=/root", "LANG=C.UTF-8"]
    return [*room, "chroot", str(root), *clean, "bash", "-c", f"cd /root/fastqwen && {command}"]


def wait_ready(process: subprocess.Popen[str]) -> str:
    """The address that it says to open. What it prints is passed on, with the second at which it came."""
    start_s = time.monotonic()
    assert process.stdout is not None
    for line in process.stdout:
        say(f"{time.monotonic() - start_s:6.1f} s  {line.rstrip()}")
        found = READY.search(line)
        if found:
            return found[1]
        if time.monotonic() - start_s > READY_WITHIN_S:
            break
    raise SystemExit("it ended, or took too long, before it said what to open")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="bookworm", help="Debian's release.")
    parser.add_argument(
        "--root", type=Path, help="Where the Debian lies or shall lie. Default: made, and removed at the end."
    )
    parser.add_argument(
        "--certificates", type=Path, help="A bundle to trust in there, for networks with one of their own."
    )
    parser.add_argument(
        "--wheels", type=Path, help="Where torch's own index cannot be reached: wheels that pip finds instead."
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs inside ends as well
    serve, ask, answer = readme()
    with tempfile.TemporaryDirectory(prefix="first-answer-") as made:
        root = options.root or Path(made) / "debian"
        make_root(root, options.suite, options.certificates, options.wheels)
        home = root / "root"
        for left in (home / "fastqwen", home / ".cache"):
            shutil.rmtree(left, ignore_errors=True)
        received = received_bytes()
        start_s = time.monotonic()
        run("git", "clone", "--quiet", "--depth", "1", f"file://{CHECKOUT}", str(home / "fastqwen"))
        say(f"{time.monotonic() - start_s:6.1f} s  cloned; now: {serve}")
        process = subprocess.Popen(inside(root, serve), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            address = wait_ready(process)
            ready_s = time.monotonic() - start_s
            words = shlex.split(ask.replace("http://localhost:8000", address))
            said = json.loads(run(*words, "--silent"))["choices"][0]["message"]["content"]
            answered_s = time.monotonic() - start_s
        finally:
            process.kill()
            process.wait()
        say(f"ready after {ready_s:.0f} s, answered after {answered_s:.1f} s: {said!r}")
        say(f"received {(received_bytes() - received) / 1e6:.0f} MB; on disk now: {folder_bytes(home) / 1e6:.0f} MB")
        if said != answer:
            sys.exit(f"README shows another answer: {answer!r}")


if __name__ == "__main__":
    main()
