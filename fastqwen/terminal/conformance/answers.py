"""What an answer is: the same streamed and whole, ended where it should be, counted and repeatable."""

from __future__ import annotations

from fastqwen.terminal.conformance.server import PROMPT, Missing, Server, demand, message_of


def streamed_equals_whole(server: Server) -> str:
    wanted, found = server.said(), server.streamed()
    demand(found == wanted, f"streamed {found[:60]!r}, whole {wanted[:60]!r}")
    return f"{len(wanted)} characters"


def finish_reason_once(server: Server) -> str:
    reasons = [choice.get("finish_reason") for chunk in server.stream() for choice in chunk["choices"]]
    given = [reason for reason in reasons if reason is not None]
    demand(len(given) == 1, f"finish_reason came {len(given)} times")
    demand(given[0] in ("stop", "length"), f"finish_reason is {given[0]!r}")
    return str(given[0])


def max_tokens_holds(server: Server) -> str:
    choice = server.chat(max_tokens=3)
    demand(choice["finish_reason"] == "length", f"finish_reason is {choice['finish_reason']!r} after 3 tokens")
    used = (choice["usage"] or {}).get("completion_tokens")
    demand(used == 3, f"usage says {used} completion tokens")
    return "3 tokens, length"


def usage_adds_up(server: Server) -> str:
    usage = server.chat()["usage"]
    demand(isinstance(usage, dict), "there is no usage")
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    demand(usage["total_tokens"] == total, f"{usage['total_tokens']} is not {total}")
    last = server.stream(stream_options={"include_usage": True})[-1]
    demand(
        last.get("choices") == [] and bool(last.get("usage")),
        "with include_usage the last chunk has no usage of its own",
    )
    return f"{total} tokens"


def stop_strings(server: Server) -> str:
    """A stop string that begins in one token and ends in another; the text that only begins like one stays."""
    plain = server.said()
    if len(plain) < 12:
        raise Missing("the model said too little to stop it")
    stop = plain[6:10]
    wanted = plain[: plain.find(stop)]
    for name, found in (("whole", server.said(stop=[stop])), ("streamed", server.streamed(stop=[stop]))):
        demand(found == wanted, f"{name}: {found[:60]!r} instead of {wanted[:60]!r} before {stop!r}")
    return repr(stop)


def stop_overlap(server: Server) -> str:
    plain = server.said()
    if len(plain) < 4:
        raise Missing("the model said too little to stop it")
    never = plain[-2:] + "\u241fnever said"
    found = server.streamed(stop=[never])
    demand(found == plain, f"text that begins like a stop string is lost: {found[-30:]!r}, not {plain[-30:]!r}")
    return "nothing lost"


def old_client(server: Server) -> str:
    """openai 0.28 asks hasattr(delta, "content"): a null would be printed as None."""
    chunks = server.stream(stop_token_ids=[0])
    nulls = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if None in choice["delta"].values()]
    demand(not nulls, f"a delta holds null: {nulls[:1]}")
    return "no nulls in deltas"


def several_answers(server: Server) -> str:
    response = server.post(messages=PROMPT, n=2, max_tokens=5)
    if response.status_code == 400:
        raise Missing(message_of(response))
    found = sorted(choice["index"] for choice in response.json()["choices"])
    demand(found == [0, 1], f"n=2 gave the choices {found}")
    return "n=2"


def seed_repeats(server: Server) -> str:
    texts = {server.said(seed=7, temperature=1.0) for _ in range(2)}
    demand(len(texts) == 1, "the same seed gave two different answers")
    return "same seed, same answer"


def thinking_off(server: Server) -> str:
    said = server.said(chat_template_kwargs={"enable_thinking": False}, max_tokens=60)
    demand(bool(said), "with thinking off the content is empty or null")
    return "content is the answer"


def effort_aliases(server: Server) -> str:
    for effort in ("none", "low", "medium", "high"):
        status = server.post(messages=PROMPT, reasoning_effort=effort, max_tokens=4).status_code
        demand(status < 500, f"reasoning_effort {effort!r} gave {status}")
    return "none to high"


def goes_on(server: Server) -> str:
    turns = [*PROMPT, {"role": "assistant", "content": "One, two,"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    used = server.chat(messages=turns, max_tokens=4, **more)["usage"]["prompt_tokens"]
    closed = server.chat(messages=[*turns, *PROMPT], max_tokens=4)["usage"]["prompt_tokens"]
    demand(used < closed, "continue_final_message is ignored")
    return "continue_final_message"


def logprobs(server: Server) -> str:
    found = server.chat(logprobs=True, top_logprobs=2, max_tokens=4).get("logprobs") or {}
    demand(bool(found and found.get("content")), "logprobs were asked for and are not there")
    demand(all(len(entry["top_logprobs"]) == 2 for entry in found["content"]), "top_logprobs is not 2")
    choices = [
        choice for chunk in server.stream(logprobs=True, top_logprobs=2, max_tokens=4) for choice in chunk["choices"]
    ]
    pieces = [choice.get("logprobs") or {} for choice in choices]
    streamed = [entry["token"] for piece in pieces for entry in piece.get("content") or []]
    demand(streamed == [entry["token"] for entry in found["content"]], f"streamed, they are of the tokens {streamed}")
    return f"{len(found['content'])} tokens"
