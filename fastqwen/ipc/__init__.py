"""API process and engine process: typed msgspec messages over a ZeroMQ socket in a private directory."""
