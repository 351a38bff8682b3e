"""Part of vLLM's module layout: the names that its scripts import from here. Each raises BadRequest once it is called."""

from __future__ import annotations

from typing import Any, NoReturn

from fastqwen.errors import BadRequest


def _refuse(*given: Any, **named: Any) -> NoReturn:
    raise BadRequest("these models read text only: leave images, sounds and videos out", "multi_modal_data")


fetch_image = fetch_audio = fetch_video = encode_image_url = encode_image_base64 = encode_audio_base64 = _refuse
encode_audio_url = encode_video_base64 = encode_video_url = _refuse
