"""Lists are checked up to their first wrong item: a body of a million wrong ones must not become a million errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema


def _mark_lists(schema: Any) -> None:
    """In place, in all of a model's fields."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _mark_lists(part)
    elif isinstance(schema, (list, tuple)):
        for part in schema:
            _mark_lists(part)


class FailFastModel(BaseModel):
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _mark_lists(schema)
        return schema
