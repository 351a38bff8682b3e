"""What ``LLM.get_tokenizer`` gives: a model's tokenizer under the names that users of transformers know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.text.load import TextTools


class UserTokenizer:
    """Texts to ids and back, and conversations to prompts. A conversation's own control tokens stay plain text."""

    def __init__(self, text: TextTools) -> None:
        self._text = text
        self._tokenizer = text.tokenizer

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True, **plain: Any) -> dict[str, Any]:
        _refuse("a tokenizer's call", plain, {"return_tensors", "padding", "truncation", "max_length"})
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens=add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        listed = [self.encode(one, add_special_tokens=add_special_tokens) for one in text]
        return {"input_ids": listed, "attention_mask": [[1] * len(ids) for ids in listed]}

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends an answer; None if none is known."""
        return next(iter(self._text.stop_token_ids), None)

    @property
    def eos_token(self) -> str | None:
        found = self.eos_token_id
        return None if found is None else self._tokenizer.token_text(found)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(self._tokenizer.control_tokens)

    @property
    def all_special_ids(self) -> list[int]:
        return list(self._tokenizer.control_tokens.values())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: int | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        listed = [token_ids] if isinstance(token_ids, int) else [int(one) for one in token_ids]
        return self._tokenizer.decode(listed, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, listed: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in listed]

    def convert_ids_to_tokens(self, token_ids: int | Sequence[int]) -> str | list[str]:
        """As text, where transformers shows its own letters for spaces."""
        if isinstance(token_ids, int):
            return self._tokenizer.token_text(token_ids)
        return [self._tokenizer.token_text(int(one)) for one in token_ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        if not isinstance(tokens, str):
            return [self._id_of(one) for one in tokens]
        return self._id_of(tokens)

    def _id_of(self, token: str) -> int | None:
        found = self._tokenizer.token_id(token)
        if found is not None:
            return found
        ids = self._tokenizer.encode(token)
        return ids[0] if len(ids) == 1 else None

    def apply_chat_template(
        self,
        conversation: list[Any],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> Any:
        """Ids, or with ``tokenize=False`` their text; for a list of conversations a list of either. Raises BadRequest."""
        if conversation and isinstance(conversation[0], list):
            how = {"tokenize": tokenize, "add_generation_prompt": add_generation_prompt, "tools": tools, **options}
            return [self.apply_chat_template(one, **how) for one in conversation]
        if self._text.template is None:
            raise BadRequest("this model has no chat template", "conversation")
        _refuse(
            "apply_chat_template", options, {"return_tensors", "padding", "truncation", "max_length", "return_dict"}
        )
        ids = self._text.template.encode(
            self._tokenizer, conversation, tools=tools, add_generation_prompt=add_generation_prompt, **options
        )
        return ids if tokenize else self._tokenizer.decode(ids)


def _refuse(where: str, options: dict[str, Any], names: set[str]) -> None:
    for name in names & options.keys():
        if options.pop(name) not in (None, False):
            raise BadRequest(f"{where}: {name} needs transformers' own tokenizer", name)
