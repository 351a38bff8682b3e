"""What a request holds that has no effect here: told with its answer, or refused where the operator is strict."""

from __future__ import annotations

from fastqwen.errors import BadRequest

MAX_WARNINGS = 32
MAX_PLACE_CHARS = 200


class Warnings:
    """One request's. ``listed`` is what its answer says."""

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._said: dict[str, None] = {}

    @property
    def listed(self) -> list[str]:
        return list(self._said)

    def tell(self, warning: str) -> None:
        """Something known, of which the answer is made differently than its sender may think."""
        if len(self._said) < MAX_WARNINGS:
            self._said[warning] = None
        elif len(self._said) == MAX_WARNINGS:
            self._said["and more, which are not listed"] = None

    def unknown(self, place: str, why: str = "this server does not know it") -> None:
        """Raises BadRequest where unknown words are not accepted (--strict-fields)."""
        place = place[:MAX_PLACE_CHARS]
        if self._strict:
            raise BadRequest(f"unknown field {place!r}: it is not supported by this server", place)
        self.tell(f"{place} has no effect: {why}")

    def include(self, others: Warnings) -> None:
        """From the request that this one was made of."""
        self._strict = others._strict
        for warning in others.listed:
            self.tell(warning)
