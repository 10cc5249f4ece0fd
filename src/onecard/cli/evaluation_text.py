"""Scores as a table over checkpoints, and in words what sets the best apart."""

from collections.abc import Iterable, Sequence

from onecard.cli.rows import print_rows
from onecard.spec import Comparison, Evaluation, Score

# What a difference that is no chance is agreed to be.
SIGNIFICANT = 0.05
_LOSSES = ("loss", "perplexity", "bits_per_byte", "bits per byte")


def print_evaluation(evaluation: Evaluation) -> None:
    """Prints the table, a sentence on the best checkpoint by each score that ranks, and the notes."""
    print_rows(_rows(evaluation))
    lines = [line for score in evaluation.best for line in _sentences(evaluation, score)]
    if lines or evaluation.notes:
        print("\n".join(["", *lines, *_merged(evaluation)]))


def _rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    first = evaluation.checkpoints[0]
    rows = [("", *(score.name for score in first.scores), "")]
    for row in evaluation.checkpoints:
        rows.append((row.name, *map(_cell, row.scores), _mark(evaluation, row.name)))
    return rows


def _mark(evaluation: Evaluation, checkpoint: str) -> str:
    found = []
    for score, winner in evaluation.best.items():
        equals = _equals(entry for entry in evaluation.comparisons if entry.score == score)
        if checkpoint in (winner, *equals):
            found.append(f"{score} (tie)" if equals else score)
    return f"best {', '.join(found)}" if found and len(evaluation.checkpoints) > 1 else ""


def _equals(comparisons: Iterable[Comparison]) -> list[str]:
    """Names those that are as good as the best, of which the first counts as the best."""
    return [entry.other for entry in comparisons if entry.gain == 0]


def _cell(score: Score) -> str:
    return format_score(score.name, score.value, score.standard_error)


def format_score(name: str, value: float, error: float | None) -> str:
    """Writes a score with its standard error; a share of items in percent."""
    if not _is_share(name):
        return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    return f"{100 * value:.1f}%" + (f" ± {100 * error:.1f}" if error is not None else "")


def _is_share(score: str) -> bool:
    """Whether a score is a share of items.

    One of the harness bears the name of its task before its own, one of several protocols says behind it which.
    """
    return not score.partition(" (")[0].rpartition("/")[2].endswith(_LOSSES)


def _items_of(score: str) -> str:
    if score == "loss":
        return "held-out blocks"
    return "items" if "/" in score else "prompts"


def _sentences(evaluation: Evaluation, score: str) -> list[str]:
    found = [entry for entry in evaluation.comparisons if entry.score == score]
    if not found:
        return []
    last, tied = evaluation.checkpoints[-1].name, _equals(found)
    against_last = next((entry for entry in found if entry.other == last), None)
    if tied:
        names = f"{_listed((found[0].best, *tied[:-1]))} and {tied[-1]}"
        lines = [f"{score}: {names} are equally good over {found[0].n:,} {_items_of(score)}; the first counts as best."]
    elif against_last is None:
        lines = [f"{score}: {last}, the last, is the best of {len(evaluation.checkpoints)}."]
    else:
        lines = []
    if against_last is not None and against_last.gain != 0:
        lines.append(_against_last(against_last))
    settled = {last, *tied}
    alike = [entry.other for entry in found if entry.corrected_p_value >= SIGNIFICANT and entry.other not in settled]
    if alike:
        lines.append(f"  Not to be told from the best by these items: {_listed(alike)}.")
    return lines


def _against_last(entry: Comparison) -> str:
    beats = "beats" if entry.corrected_p_value < SIGNIFICANT else "is better than, but not to be told from,"
    looks = (
        f" after {entry.num_comparisons} looks ({format_p(entry.p_value)} for one)" if entry.num_comparisons > 1 else ""
    )
    return (
        f"{entry.score}: {entry.best} {beats} the last, {entry.other}, by {format_gain(entry)}, "
        f"{format_p(entry.corrected_p_value)}{looks}, {entry.test} over {entry.n:,} {_items_of(entry.score)}."
    )


def format_gain(entry: Comparison) -> str:
    """Writes how much better the best is, with the standard error of the difference."""
    if not _is_share(entry.score):
        return f"{entry.gain:.4f} ± {entry.standard_error:.4f}"
    return f"{100 * entry.gain:.1f} ± {100 * entry.standard_error:.1f} points"


def format_p(value: float) -> str:
    """Writes a p-value by two digits, a tiny one as what it is below."""
    return f"p = {value:.2g}" if value >= 0.001 else "p < 0.001"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _merged(evaluation: Evaluation) -> list[str]:
    """Notes that are the same of every checkpoint are said once."""
    texts = [note.partition(": ") for note in evaluation.notes]
    names = {row.name for row in evaluation.checkpoints}
    count = len(evaluation.checkpoints)
    seen: dict[str, list[str]] = {}
    for name, _, text in texts:
        seen.setdefault(text, []).append(name)
    lines = []
    for (name, joint, text), note in zip(texts, evaluation.notes, strict=True):
        if name not in names:
            lines.append(note)
        elif len(seen[text]) < count:
            lines.append(f"{name}{joint}{text}")
        elif f"note: {text}" not in lines:
            lines.append(f"note: {text}")
    return lines
