"""Run folders read back. No torch."""
