"""Between text and token ids: tokenizers, chat templates, stop tokens, and text that grows token by token."""
