"""ChatModel: several rounds of dialogue in Python, with the calls that Qwen's own ``model.chat()`` made familiar."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from fastqwen.client.history import Messages, Turn, cut_history, to_messages
from fastqwen.client.partner import Partner
from fastqwen.client.remote import RemotePartner, is_address
from fastqwen.errors import BadConfig, BadRequest
from fastqwen.records import SamplingParams
from fastqwen.text.answer import Parts
from fastqwen.text.load import SAMPLING_KEYS

ROOM_FOR_ANSWER = 512  # tokens kept free of history where no max_tokens is given
WITHOUT_USE_HERE = {
    "n", "logprobs", "prompt_logprobs", "detokenize", "structured_outputs", "bad_word_ids", "truncate_prompt_tokens",
}  # fmt: skip
OPTIONS = set(SamplingParams.__struct_fields__) - WITHOUT_USE_HERE
UNKNOWN_LENGTH = 2**31  # of a server that does not tell: it refuses what is too long
_CONTROL = re.compile(r"<\|[^|]*\|>")


class ChatModel:
    """
    model = ChatModel("Qwen/Qwen-7B-Chat")          # or a server's address: ChatModel("http://localhost:8000")
    response, history = model.chat("你好", history=None)
    for text in model.chat_stream("What did I say?", history):
        print(text)                                 # the whole answer so far, as Qwen's chat_stream gives it

    Many threads may chat at once: they share one engine and run in one batch. The other keywords are EngineConfig's
    fields. Raises FastqwenError with one line that says what to change.
    """

    def __init__(
        self, model: str, *, tensor_parallel_size: int = 1, api_key: str | None = None, **options: Any
    ) -> None:
        if is_address(model):
            if options or tensor_parallel_size != 1:
                given = ", ".join(sorted(options)) or "tensor_parallel_size"
                raise BadConfig(f"{given}: a server has its own options, they cannot be set from here")
            self._partner: Partner = RemotePartner(model, api_key)
        else:
            from fastqwen.client.local_partner import LocalPartner

            self._partner = LocalPartner(model, {**options, "tensor_parallel_size": tensor_parallel_size})

    def chat(
        self,
        query: str,
        history: Sequence[Turn] | None = None,
        system: str | None = None,
        *,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        max_window_size: int | None = None,
        generation_config: Any = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> tuple[str, list[Turn]]:
        """The answer, and a new history that ends with this turn; the caller's own is left as it was.

        What a thinking model writes inside its thinking block is part of neither, as Qwen advises for histories.

        system: the system message. Default: what the model's template writes.
        stop_words_ids: the answer ends before any of these token sequences.
        max_window_size: tokens of system message and history that the model is shown, by whole turns, newest first.
            Default: what the model's generation_config.json says, else what its context can hold.
        generation_config: a dict, or an object with ``to_dict``, such as transformers' GenerationConfig.
        sampling: SamplingParams' fields; max_new_tokens is another name of max_tokens.
        """
        request = self._request(
            query,
            history,
            system,
            stop_words_ids=stop_words_ids,
            max_window_size=max_window_size,
            generation_config=generation_config,
            chat_template_kwargs=chat_template_kwargs,
            **sampling,
        )
        response = "".join(parts.content for parts in self._partner.answer(*request))
        return response, [*_checked(history), (query, response)]

    def chat_stream(
        self, query: str, history: Sequence[Turn] | None = None, system: str | None = None, **options: Any
    ) -> Iterator[str]:
        """Like ``chat``, with the same keywords; yields the whole answer so far whenever it grows.

        Leaving the loop early ends the work.
        """
        request = self._request(query, history, system, **options)
        return _growing(self._partner.answer(*request))

    def close(self) -> None:
        """Give memory and threads back; running chats are aborted."""
        self._partner.close()

    def __enter__(self) -> ChatModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _request(
        self,
        query: str,
        history: Sequence[Turn] | None,
        system: str | None,
        *,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        max_window_size: int | None = None,
        generation_config: Any = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> tuple[Messages, dict[str, Any], dict[str, Any]]:
        """What the partner needs to answer. Raises BadRequest or BadConfig, naming the argument."""
        if not isinstance(query, str):
            raise BadRequest(f"query is {type(query).__name__}, expected a text", "query")
        partner, template_options = self._partner, chat_template_kwargs or {}
        given = _as_dict(generation_config)
        if given.get("chat_format", "chatml") != "chatml":
            raise BadConfig(f"generation_config: chat_format is {given['chat_format']!r}, supported is only 'chatml'")
        options = _sampling(partner.generation_config, given, sampling)
        eos = given.get("eos_token_id", [])
        stops = [[token_id] for token_id in (eos if isinstance(eos, list) else [eos])]
        _add_stops(options, [*(stop_words_ids or given.get("stop_words_ids") or []), *stops], partner)
        window = _first(max_window_size, given.get("max_window_size"), partner.generation_config.get("max_window_size"))
        kept = cut_history(
            _checked(history),
            query,
            system=system,
            count_tokens=lambda messages, asks: partner.count_tokens(
                messages, template_options, add_generation_prompt=asks
            ),
            window=window,
            room=_room(partner.max_model_len or UNKNOWN_LENGTH, options.get("max_tokens")),
        )
        return to_messages(kept, system=system, query=query), options, template_options


def _growing(answer: Generator[Parts, None, None]) -> Generator[str, None, None]:
    text = ""
    with contextlib.closing(answer):
        for parts in answer:
            text += parts.content
            if parts.content:
                yield text


def _checked(history: Sequence[Turn] | None) -> list[Turn]:
    turns = [tuple(turn) if isinstance(turn, (list, tuple)) else () for turn in history or []]
    for turn in turns:
        if len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            raise BadRequest("history must be a list of (query, response) pairs of texts", "history")
    return turns  # type: ignore[return-value]


def _as_dict(generation_config: Any) -> dict[str, Any]:
    """Without what is not set. Raises BadConfig for a way of searching that fastqwen does not have."""
    if generation_config is None:
        return {}
    values = generation_config.to_dict() if hasattr(generation_config, "to_dict") else generation_config
    if not isinstance(values, Mapping):
        raise BadConfig("generation_config must be a dict, or an object with to_dict()")
    found = {str(key): value for key, value in values.items() if value is not None}
    for key, plain in (("num_beams", 1), ("num_return_sequences", 1), ("no_repeat_ngram_size", 0)):
        if found.get(key, plain) != plain:
            raise BadConfig(f"generation_config: {key} is {found[key]}, only {plain} is supported")
    return found


def _sampling(own: Mapping[str, Any], given: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """What differs from the model's defaults: keywords go before ``given``, the caller's generation_config."""
    options = {key: given[key] for key in (*SAMPLING_KEYS, "max_tokens") if key in given}
    if given.get("do_sample") is False:
        options["temperature"] = 0.0
    max_tokens = _first(given.get("max_new_tokens"), given.get("max_tokens"), own.get("max_new_tokens"))
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    named = dict(named)
    if "max_new_tokens" in named:
        named["max_tokens"] = named.pop("max_new_tokens")
    unknown = sorted(named.keys() - OPTIONS)
    if unknown:
        raise BadRequest(f"chat has no argument {', '.join(unknown)}", unknown[0])
    options.update(named)
    SamplingParams(**{"max_tokens": None, **options})  # checked here, so that a server is not needed for that
    return options


def _add_stops(options: dict[str, Any], stop_words_ids: Sequence[Sequence[int]], partner: Partner) -> None:
    """A single token stops by its id; a sequence by its text, which may also come from other tokens."""
    strings, ids = options.get("stop") or [], list(options.get("stop_token_ids") or [])
    strings = [strings] if isinstance(strings, str) else list(strings)
    for sequence in stop_words_ids:
        if not isinstance(sequence, (list, tuple)) or not sequence or not all(type(one) is int for one in sequence):
            raise BadRequest("stop_words_ids must be a list of lists of token ids", "stop_words_ids")
        if len(sequence) == 1:
            ids.append(sequence[0])
            continue
        text = partner.text_of(list(sequence))
        if not text or "\ufffd" in text or _CONTROL.search(text):
            raise BadRequest(
                f"stop_words_ids: {list(sequence)} stands for no plain text; give a control token in a list of its own",
                "stop_words_ids",
            )
        strings.append(text)
    if strings:
        options["stop"] = strings
    if ids:
        options["stop_token_ids"] = ids


def _room(max_model_len: int, max_tokens: int | None) -> int:
    """Tokens that the prompt may have, so that an answer fits behind it."""
    return max_model_len - min(ROOM_FOR_ANSWER if max_tokens is None else max_tokens, max_model_len // 2)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
