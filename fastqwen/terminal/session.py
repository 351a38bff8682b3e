"""Who answers in ``fastqwen chat``: a model loaded here, or a server, once it can."""

from __future__ import annotations

import sys
import time
from typing import Any

import httpx

from fastqwen.client.partner import Partner
from fastqwen.client.remote import RemotePartner, is_address
from fastqwen.client.running import running
from fastqwen.names import DEMO

POLL_S = 0.5
ASK_WITHIN_S = 2.0


def usual_model() -> str:
    """The address of a server of this user that answers, the newest first, else the demo."""
    for server in running():
        try:
            httpx.get(f"{server.url}/health", timeout=ASK_WITHIN_S).raise_for_status()
        except httpx.HTTPError:
            continue
        print(f"{server.model} answers at {server.url} (fastqwen chat MODEL takes another)", file=sys.stderr)
        return server.url
    print("No server of yours runs here, so the demo answers (fastqwen chat MODEL takes another)", file=sys.stderr)
    return DEMO


def partner_for(model: str, engine_options: dict[str, Any], api_key: str | None) -> Partner:
    if is_address(model):
        server = RemotePartner(model, api_key)
        _wait_until_loaded(server)
        return server
    from fastqwen.client.local_partner import LocalPartner

    return LocalPartner(model, engine_options)


def _wait_until_loaded(server: RemotePartner) -> None:
    waited = False
    while (share := server.loading_share()) is not None:
        waited = True
        print(f"\r{server.name} is loading: {share:.0%} ", end="", file=sys.stderr, flush=True)
        time.sleep(POLL_S)
    if waited:
        print("\r\x1b[K" if sys.stderr.isatty() else "", file=sys.stderr)
