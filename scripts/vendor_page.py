"""Refreshes the chat page's libraries from npm: ``python scripts/vendor_page.py`` (needs npm on PATH).

Every package is pinned below. What the page loads is copied to fastqwen/server/static/vendor/, each licence beside it,
and vendor/README.md is written anew with versions and sizes. Nothing is built or bundled.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).resolve().parent.parent / "fastqwen/server/static/vendor"


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    purpose: str
    files: dict[str, str]  # path in the package (may end in a * pattern) -> path under vendor/
    map_of_parts: str = ""  # the source map of a bundle, which names the packages that it was made of


PACKAGES = [
    Package(
        "preact",
        "11.2.0",
        "components",
        {
            "dist/preact.mjs": "preact/preact.js",
            "hooks/dist/hooks.mjs": "preact/hooks.js",
            "LICENSE": "preact/LICENSE",
        },
    ),
    Package(
        "htm",
        "3.1.1",
        "templates without a build step",
        {"dist/htm.mjs": "htm/htm.js", "LICENSE": "htm/LICENSE"},
    ),
    Package(
        "markdown-it",
        "15.0.3",
        "Markdown to HTML",
        {
            "dist/browser/markdown-it.esm.min.mjs": "markdown-it/markdown-it.js",
            "LICENSE": "markdown-it/LICENSE",
        },
    ),
    Package(
        "dompurify",
        "3.4.18",
        "keeps only harmless HTML",
        {
            "dist/purify.min.js": "dompurify/purify.js",
            "LICENSE": "dompurify/LICENSE",
            "LICENSE-MPL": "dompurify/LICENSE-MPL",
        },
    ),
    Package(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "code colours, common languages",
        {"es/highlight.min.js": "highlight/highlight.js", "LICENSE": "highlight/LICENSE"},
    ),
    Package(
        "katex",
        "0.19.1",
        "formulas; only the woff2 fonts",
        {
            "dist/katex.min.js": "katex/katex.js",
            "dist/katex.min.css": "katex/katex.css",
            "dist/fonts/*.woff2": "katex/fonts",
            "LICENSE": "katex/LICENSE",
        },
    ),
    Package(
        "mermaid",
        "11.17.2",
        "diagrams; loaded with the first one, in a frame of its own",
        {"dist/mermaid.min.js": "mermaid/mermaid.js", "LICENSE": "mermaid/LICENSE"},
        map_of_parts="dist/mermaid.min.js.map",
    ),
]


LICENCE_FILE = re.compile(r"(?:licen[cs]e|copying|notice)(?:[-.](?:md|txt|mpl))?", re.I)
PART = re.compile(r"\.pnpm/(@?[^/@]+)@([^/_]+)")  # in a source map: name@version, with a + for the slash of a scope


def unpack(name: str, version: str, into: Path) -> Path:
    """Downloads one package with npm and returns the folder that holds its files."""
    packed = subprocess.run(
        ["npm", "pack", f"{name}@{version}", "--json", "--silent"],
        cwd=into,
        check=True,
        capture_output=True,
        text=True,
    )
    reply = json.loads(packed.stdout)
    entry = reply[0] if isinstance(reply, list) else next(iter(reply.values()))
    folder = into / f"{name.replace('/', '-')}-{version}"
    with tarfile.open(into / Path(entry["filename"]).name) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def adapt(target: Path) -> None:
    """Browsers resolve no bare names, map files are not shipped, and only woff2 fonts are."""
    if target.suffix not in {".js", ".css"}:
        return
    text = target.read_text(encoding="utf-8")
    text = text.replace('from"preact"', 'from"./preact.js"')
    text = re.sub(r"\n?//# sourceMappingURL=\S+\s*$", "\n", text)
    text = re.sub(r',url\([^)]+\.(?:woff|ttf)\) format\("[a-z]+"\)', "", text)
    target.write_text(text, encoding="utf-8")


def copy_files(package: Package, folder: Path) -> int:
    """Copies what the page needs and returns its size in bytes."""
    total = 0
    for source, place in package.files.items():
        for path in sorted(folder.glob(source)):
            target = VENDOR / place / path.name if "*" in source else VENDOR / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            adapt(target)
            total += target.stat().st_size
    return total


def parts_of(source_map: Path) -> list[tuple[str, str]]:
    """Names and versions of what a bundle was made of."""
    sources = json.loads(source_map.read_text(encoding="utf-8"))["sources"]
    found = {(one[1].replace("+", "/"), one[2]) for source in sources if (one := PART.search(source))}
    return sorted(found)


def write_parts(package: Package, folder: Path, scratch: Path) -> None:
    """Every licence of what is in a bundle, in a file beside it."""
    rows, texts = [], []
    for name, version in parts_of(folder / package.map_of_parts):
        place = unpack(name, version, scratch)
        about = json.loads((place / "package.json").read_text(encoding="utf-8"))
        files = sorted(one for one in place.iterdir() if LICENCE_FILE.fullmatch(one.name))
        said = "\n\n".join(one.read_text(encoding="utf-8", errors="replace").strip() for one in files)
        licence = about.get("license") or (said.splitlines() or ["not said"])[0].strip("# ")
        rows.append(f"| {name} | {version} | {licence} |")
        texts.append(f"## {name} {version}\n\n" + (said or f"No text of its licence ({licence}) is in the package."))
        print(rows[-1])
    head = (
        f"# What is in {package.name} {package.version}\n\n"
        f"Its bundle holds code of these packages, as its source map names them; their licences follow.\n\n"
        "| npm package | version | licence |\n|---|---|---|\n"
    )
    target = VENDOR / package.name / "PARTS.md"
    target.write_text(head + "\n".join(rows) + "\n\n" + "\n\n".join(texts) + "\n", encoding="utf-8")


def main() -> None:
    shutil.rmtree(VENDOR, ignore_errors=True)
    VENDOR.mkdir(parents=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for package in PACKAGES:
            folder = unpack(package.name, package.version, Path(scratch))
            licence = json.loads((folder / "package.json").read_text(encoding="utf-8"))["license"]
            size = copy_files(package, folder)
            if package.map_of_parts:
                write_parts(package, folder, Path(scratch))
            rows.append(f"| {package.name} | {package.version} | {licence} | {package.purpose} | {size:,} |")
            print(rows[-1])
    head = (
        "# Libraries of the chat page\n\n"
        "Copied from npm by `scripts/vendor_page.py`, which pins the versions and writes this file. Not edited, except that\n"
        "bare import names became paths, and references to files that are not shipped (source maps, older font formats) went.\n"
        "Each licence lies beside its library; those of what is inside a bundle are in its PARTS.md.\n\n"
        "| npm package | version | licence | what for | bytes |\n|---|---|---|---|---|\n"
    )
    (VENDOR / "README.md").write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
