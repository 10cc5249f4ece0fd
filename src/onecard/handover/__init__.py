"""A finished model for other tools: files they load, a place to talk to it."""
