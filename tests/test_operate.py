"""docs/operate.md: its configurations say what the server needs, and its unit's command line exists."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fastqwen.cli.main import app
from fastqwen.server.config import ServerConfig

PAGE = (Path(__file__).parents[1] / "docs" / "operate.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)
    return text


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(block("ini"))
    return parser


def test_the_units_command_line_exists():
    words = shlex.split(unit()["Service"]["ExecStart"])
    assert words[0].endswith("/bin/fastqwen")
    command: Any = typer.main.get_command(app)
    params = command.commands[words[1]].make_context(words[1], words[2:]).params
    assert params["log_format"] == "json" and str(params["api_key_file"]).startswith("${CREDENTIALS_DIRECTORY}/")


def test_the_unit_waits_for_the_drain():
    service = unit()["Service"]
    assert float(service["TimeoutStopSec"]) > ServerConfig().drain_timeout_s and service["KillMode"] == "mixed"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_unit(tmp_path: Path):
    path = tmp_path / "fastqwen.service"
    path.write_text(block("ini").replace("/opt/fastqwen/.venv/bin/fastqwen", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if "fastqwen.service" in line]
    assert not ours, ours


def test_the_proxy_passes_streams_on():
    text = block("nginx")
    for line in ("proxy_buffering off;", "proxy_http_version 1.1;", "X-Request-Id $request_id;", "Host $host;"):
        assert line in text
    assert text.count("{") == text.count("}")
    megabytes = int(re.findall(r"client_max_body_size (\d+)m", text)[0])
    assert megabytes * 2**20 == ServerConfig().max_body_bytes
    assert "flush_interval -1" in block("caddy")


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_takes_the_configuration(tmp_path: Path):
    text = re.sub(r"\n +ssl_.*;", "", block("nginx")).replace("443 ssl", "8443")
    (tmp_path / "nginx.conf").write_text(f"events {{}}\npid {tmp_path}/pid;\nhttp {{\n{text}}}\n")
    done = subprocess.run(["nginx", "-t", "-p", str(tmp_path), "-c", "nginx.conf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_scrape_configuration_is_one():
    [job] = yaml.safe_load(block("yaml"))["scrape_configs"]
    assert job["authorization"]["credentials_file"] and job["static_configs"][0]["targets"] == ["localhost:8000"]
    assert job.get("metrics_path", "/metrics") == "/metrics"


def test_the_line_of_the_log_looks_as_it_is_shown():
    shown = re.compile(r'^INFO: +\S+ - "POST \S+ HTTP/1.1" 200 OK, \d+\.\d{3} s, \d+ \+ \d+ tokens, id \w+$', re.M)
    assert shown.search(block("text"))
