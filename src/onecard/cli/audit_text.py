"""The mask audit of chats for people: what counts in colour, or between «marks» where there is none."""

import sys
from typing import TYPE_CHECKING, TextIO

from onecard.units import format_count

if TYPE_CHECKING:
    from rich.text import Text

    from onecard.spec.mask_audit import MaskAudit, SampleRow

_COUNTS = "bold green"


def print_samples(audit: "MaskAudit", stream: TextIO | None = None) -> None:
    """Prints the sample conversations; in a terminal what counts is coloured, else between « and »."""
    from rich.console import Console

    stream = stream or sys.stdout
    console = Console(file=stream, highlight=False)
    in_colour = console.is_terminal and not console.no_color
    legend = f" ({'green' if in_colour else 'between « and »'}: what counts)"
    for sample in audit.samples:
        print(f"\nsample {_safe(sample.origin)}{legend}", file=stream)
        legend = ""
        # Templates end on a new line, which would stand there as an empty one.
        if in_colour:
            text = _coloured(sample)
            text.rstrip()
            console.print(text, soft_wrap=True)
        else:
            print(_marked(sample).rstrip(), file=stream)


def audit_rows(audit: "MaskAudit") -> list[tuple[str, str]]:
    """Says what is learned and what is wrong: label and text per row, nothing for what does not occur."""
    formats = sorted({name for source in audit.formats for name in source.formats})
    lengths = audit.lengths
    rows = [
        (
            "chats",
            f"{_count(audit.num_rows, 'conversation')} to train on, {audit.num_heldout_rows:,} held out,"
            f" read as {', '.join(formats) or 'nothing'}",
        ),
        ("template", audit.template),
        *([("new tokens", _safe(", ".join(audit.new_tokens)))] if audit.new_tokens else []),
        (
            "counted",
            f"{audit.target_share:.1%} of the tokens: {format_count(audit.num_target_tokens)} of"
            f" {format_count(audit.num_tokens)}",
        ),
        (
            "length",
            f"median {lengths.median:,} tokens, 95% up to {lengths.percentile_95:,}, longest {lengths.longest:,}",
        ),
    ]
    if audit.num_lost_tokens or audit.num_cut_rows:
        rows.append(
            (
                "shortened",
                f"{_count(audit.num_dropped_rounds, 'old round')} dropped,"
                f" {_count(audit.num_cut_rows, 'conversation')} cut inside a turn:"
                f" {format_count(audit.num_lost_tokens)} tokens lost",
            )
        )
    rows += _flaw_rows(audit)
    if audit.skipped:
        rows.append(("left out", _count(audit.num_skipped_rows, "row")))
    for skipped in audit.skipped:
        rows.append(("", f"{skipped.num_rows:,} x {skipped.kind}{', the first:' if skipped.num_rows > 1 else ':'}"))
        rows += [("", f"  {_safe(place.origin)}: {_safe(place.reason)}") for place in skipped.places]
    return rows


def _flaw_rows(audit: "MaskAudit") -> list[tuple[str, str]]:
    flaws = (
        ("no stop token", audit.num_rows_without_stop, "with an answer that ends without a stop token"),
        (
            "not shown",
            audit.num_partial_rows,
            "with a system prompt, tools, tool calls or reasoning that the template leaves out",
        ),
        ("empty system", audit.num_empty_system_rows, "with an empty turn of the system, left out"),
        ("spared", audit.num_spared_rows, "held out, of the lowest hash, since eval_fraction drew none"),
        ("double BOS", audit.num_double_bos_rows, "with two begin-of-text tokens at the start"),
        ("duplicates", audit.num_duplicate_rows, "to train on, the same as another one"),
        ("overlap", audit.num_rows_in_heldout, "to train on, also held out: the held-out loss says little about them"),
    )
    return [(label, f"{_count(count, 'conversation')} {text}") for label, count, text in flaws if count]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _marked(sample: "SampleRow") -> str:
    return "".join(f"«{_safe(text)}»" if counts else _safe(text) for text, counts in sample.spans)


def _coloured(sample: "SampleRow") -> "Text":
    from rich.text import Text

    return Text.assemble(*((_safe(text), _COUNTS if counts else "dim") for text, counts in sample.spans))


def _safe(text: str) -> str:
    """Keeps what a text says to a terminal, such as escape sequences, from being obeyed."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
