"""The near side of the engine: requests are prepared and checked here, and deltas become text again."""
