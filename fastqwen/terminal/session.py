"""Who answers in ``fastqwen chat``: a model loaded here, or a server, once it can."""

from __future__ import annotations

import sys
import time
from typing import Any

from fastqwen.client.partner import Partner
from fastqwen.client.remote import RemotePartner, is_address

POLL_S = 0.5


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
