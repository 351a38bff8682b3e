"""Many machines: which replica of a model gets a request, and what becomes of its streams when that replica is lost."""
