"""The chat page for other servers, without an engine."""
