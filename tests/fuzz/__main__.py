"""``python -m tests.fuzz NAME [SECONDS] [CORPUS]``: one target under atheris. ``all`` runs each in a process of its own.

A crash, an input that takes longer than a second, or memory beyond the limit ends it with a status that is not 0; the input
is printed and kept in .fuzz/.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

MAX_INPUT_BYTES = 4096
MAX_SECONDS_PER_INPUT = 1
KEPT = Path(".fuzz")
EXTRA_RSS_MB = 512  # beside what the interpreter, torch and the libraries take before the first input


def run_one(name: str, seconds: int, corpus: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["fastqwen", "tests.fuzz.targets"]):
        from tests.fuzz.targets import TARGETS
    import psutil

    from tests.fuzz.seeds import seeds

    target = TARGETS[name]
    for number, seed in enumerate(seeds()[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
        target(seed)
    rss_mb = psutil.Process().memory_info().rss // 2**20
    arguments = [
        f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", f"-timeout={MAX_SECONDS_PER_INPUT}",
        f"-rss_limit_mb={rss_mb + EXTRA_RSS_MB}", "-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={KEPT}/{name}-",
    ]  # fmt: skip

    def told(data: bytes) -> None:
        try:
            target(data)
        except Exception:
            print(f"{name} failed on {data!r}", file=sys.stderr)
            raise

    KEPT.mkdir(exist_ok=True)
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], told)
    atheris.Fuzz()


def run_all(seconds: int) -> int:
    """``seconds`` is for all targets together."""
    from tests.fuzz.targets import TARGETS

    failed = []
    for name in TARGETS:
        command = [sys.executable, "-m", "tests.fuzz", name, str(max(1, seconds // len(TARGETS)))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        tried = next((line for line in done.stderr.splitlines() if "number_of_executed_units" in line), "")
        print(
            f"{name}: {tried.rsplit(' ', 1)[-1] or 'no'} inputs, {'ok' if done.returncode == 0 else 'FAILED'}",
            flush=True,
        )
        if done.returncode:
            failed.append(name)
            print(done.stdout[-2000:] + done.stderr[-4000:])
    print(f"{len(TARGETS)} targets, failed: {', '.join(failed) or 'none'}")
    return len(failed)


def main() -> int:
    name, seconds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60
    if name == "all":
        return run_all(seconds)
    if len(sys.argv) > 3:
        run_one(name, seconds, Path(sys.argv[3]))
    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as corpus:
        run_one(name, seconds, Path(corpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
