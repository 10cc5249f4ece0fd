"""What made-up texts of the benchmarks are drawn from."""

WORDS = tuple("the quick brown fox jumps over a lazy dog while seven wizards brew potent jade elixir".split())  # noqa: SIM905
