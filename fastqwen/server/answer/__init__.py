"""One prompt's way through the engine and back, whatever API asked."""
