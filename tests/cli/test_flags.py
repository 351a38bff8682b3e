"""Flags are made from the fields of a config: one list, wherever it is read."""

from __future__ import annotations

import pytest

from fastqwen.cli.web import BOUNDS
from fastqwen.config import EngineConfig, flag, options_of
from fastqwen.errors import BadConfig
from fastqwen.server.config import ServerConfig, WebConfig
from tests.server.live import run


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("serve", options_of(ServerConfig) | options_of(EngineConfig)),
        ("web", [name for name in options_of(WebConfig) if name not in BOUNDS]),
    ],
)
def test_every_field_with_a_help_text_is_a_flag(command, fields):
    told = run(command, "--help").stdout.split()
    assert [name for name in fields if not {flag(name), f"{flag(name)},"} & set(told)] == []


def test_what_web_does_not_offer_is_no_flag_of_it():
    assert not {flag(name) for name in BOUNDS} & set(run("web", "--help").stdout.split())
    assert set(BOUNDS) <= set(options_of(WebConfig))


def test_a_config_made_in_python_is_held_to_the_same_bounds():
    assert ServerConfig(port=65535, drain_timeout_s=0).port == 65535
    for wrong, text in (
        ({"port": 65536}, "--port is 65536, but must be at most 65535"),
        ({"text_timeout_s": 0.0}, "--text-timeout is 0.0, but must be at least 0.1"),
        ({"max_n": 10**6}, "--max-n is 1000000, but must be at most"),
        ({"log_format": "xml"}, "--log-format is 'xml': use text or json"),
    ):
        with pytest.raises(BadConfig, match=text):
            ServerConfig(**wrong)


def test_a_wrong_value_on_the_command_line_is_named():
    done = run("serve", "demo", "--port", "65536")
    assert done.returncode == 2 and "65535" in done.stderr
    done = run("web", "--api", "http://localhost:1", "--log-format", "xml")
    assert done.returncode == 1 and done.stderr == "fastqwen: --log-format is 'xml': use text or json\n"


def test_names_of_machines_know_no_case():
    assert ServerConfig(allowed_hosts=["Example.org"]).allowed_names == {"example.org"}
