"""What /v1/responses remembers: the last answers with the conversations before them, in a fixed memory."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any, NamedTuple

MAX_RESPONSES = 1024
MAX_BYTES = 64 * 2**20

Item = dict[str, Any]


class _Kept(NamedTuple):
    conversation: list[Item]
    output: list[Item]
    whole: Item  # as it was answered
    num_bytes: int


class ResponseStore:
    """The oldest go first. A conversation that goes on shares its items with what was kept before."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._items: dict[str, Item] = {}
        self._num_bytes = 0

    def keep(self, response_id: str, conversation: list[Item], output: list[Item], whole: Item) -> None:
        """``conversation`` is everything before this answer, earlier answers too; ``whole`` holds its output as well."""
        num_bytes = len(json.dumps([conversation, whole]))
        if num_bytes > MAX_BYTES:
            return
        self._kept[response_id] = _Kept(conversation, output, whole, num_bytes)
        self._items.update({item["id"]: item for item in output})
        self._num_bytes += num_bytes
        while len(self._kept) > MAX_RESPONSES or self._num_bytes > MAX_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.num_bytes
            for item in oldest.output:
                self._items.pop(item["id"], None)

    def conversation(self, response_id: str) -> list[Item] | None:
        """Up to and with that answer; None if it is not kept."""
        kept = self._kept.get(response_id)
        return None if kept is None else [*kept.conversation, *kept.output]

    def whole(self, response_id: str) -> Item | None:
        """The answer itself; None if it is not kept."""
        kept = self._kept.get(response_id)
        return None if kept is None else kept.whole

    def item(self, item_id: str) -> Item | None:
        return self._items.get(item_id)
