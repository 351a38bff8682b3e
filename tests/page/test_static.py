"""Promises about the page's files that need no browser."""

from __future__ import annotations

import re
from pathlib import Path

from fastqwen.server.http.pages import CONTENT_SECURITY_POLICY, STATIC

OWN = sorted(p for p in STATIC.rglob("*") if p.suffix in {".js", ".css", ".html"} and "vendor" not in p.parts)
SCRIPTS = [p for p in OWN if p.suffix == ".js"]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_own_code_stays_small() -> None:
    lines = {p.name: read(p).count("\n") for p in OWN}
    assert sum(lines.values()) < 4000
    assert max(lines.values()) <= 400


def test_everything_shipped_but_mermaid_stays_under_a_megabyte_and_a_half() -> None:
    shipped = [p for p in STATIC.rglob("*") if p.is_file() and "mermaid" not in p.parts]
    assert sum(p.stat().st_size for p in shipped) < 1_500_000


def test_nothing_is_fetched_from_elsewhere() -> None:
    for path in OWN:
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", read(path)), path.name


def test_pages_have_no_inline_scripts_or_styles() -> None:
    for page in STATIC.glob("*.html"):
        assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", read(page)), page.name


def test_every_file_that_is_named_exists() -> None:
    for page in STATIC.glob("*.html"):
        for name in re.findall(r'(?:src|href)="static/([^"]+)"', read(page)):
            assert (STATIC / name).is_file(), name
    for script in SCRIPTS:
        for name in re.findall(r'(?:from|import|import\() ?"(\.[^"]+)"', read(script)):
            assert (script.parent / name).resolve().is_file(), f"{script.name}: {name}"


def test_every_string_has_both_languages_and_is_used() -> None:
    table = read(STATIC / "js/i18n.js")
    entries = dict(re.findall(r'^  (\w+): \[(".*")\],$', table, re.M))
    assert len(entries) == len(re.findall(r"^  \w+: \[", table, re.M))
    for name, pair in entries.items():
        assert re.fullmatch(r'"[^"]+", "[^"]+"', pair), name
        english, chinese = pair[1:-1].split('", "')
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), name
    source = "".join(read(p) for p in SCRIPTS if p.name != "i18n.js")
    asked = set(re.findall(r'\bt\("(\w+)"', source))
    assert asked - {name for name in asked if name.endswith("_")} <= set(entries)
    families = tuple(name for name in asked if name.endswith("_"))
    for name in entries:
        known = f'"{name}"' in source or name.startswith(families) or name.removesuffix("Hint") in entries
        assert known, f"nobody shows {name}"


def test_every_library_has_its_licence() -> None:
    listed = read(STATIC / "vendor/README.md")
    for folder in (STATIC / "vendor").iterdir():
        if folder.is_dir():
            assert (folder / "LICENSE").is_file(), folder.name
            assert folder.name in listed


def test_the_documented_policy_is_the_one_that_is_sent() -> None:
    page = read(Path(__file__).resolve().parents[2] / "docs/page.md")
    shown = re.search(r"default-src.*?frame-ancestors 'none'", page, re.S)
    assert shown and re.sub(r"\s+", " ", shown[0]) == CONTENT_SECURITY_POLICY.decode()


def test_the_offline_shell_has_every_module_of_the_chat_page() -> None:
    listed = re.search(r'MODULES = "([^"]+)"', read(STATIC / "js/worker.js"))
    assert listed is not None
    others = {"admin", "plot", "diagram", "worker"}  # of other pages
    assert listed[1].split() == sorted({p.stem for p in SCRIPTS} - others)
