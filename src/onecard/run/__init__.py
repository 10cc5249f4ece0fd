"""A plan becomes a run folder."""
