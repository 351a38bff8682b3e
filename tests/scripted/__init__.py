"""The real server, workers, scheduler and grammars around a model that says what its prompt tells it to.

    python -m tests.scripted FOLDER '{"port": P, "engine": {"tool_call_parser": "qwen3_coder"}}'

FOLDER holds tokenizer.json, tokenizer_config.json with a chat template, and config.json; no weights. The JSON has the fields of
ServerConfig, and under ``engine`` those of EngineConfig. The last ``SAY:<base64 of JSON>:`` in the prompt decides what the
model says; the JSON is a text, or ``{"text": ..., "split": n}`` for a text in tokens of at most n characters each, so that
marks such as <tool_call> arrive in pieces. A prompt without one is answered with "Hello.". Grammars hold: what the text may
not say is replaced by something that it may.
"""
