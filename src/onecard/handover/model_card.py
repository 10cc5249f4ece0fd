"""A model card (https://huggingface.co/docs/hub/model-cards), filled in from the record and from nothing else."""

from collections.abc import Iterator

import yaml

from onecard.spec.handover import UNKNOWN, Export, Provenance
from onecard.spec.paths import is_hub_name
from onecard.units import format_bytes

_LIBRARY = {"hf": "transformers", "merged": "transformers", "adapter": "peft", "gguf": "gguf"}


def write_card(export: Export, provenance: Provenance) -> str:
    """Gives the text of a README.md with YAML front matter; what is not known is said to be unknown."""
    return f"---\n{_front_matter(export, provenance)}---\n\n" + "\n".join(_body(export, provenance)) + "\n"


def _front_matter(export: Export, provenance: Provenance) -> str:
    # The licence of the result is for its maker to choose; the Hub takes `unknown` until then.
    values: dict[str, object] = {
        "license": UNKNOWN,
        "library_name": _LIBRARY[export.format],
        "pipeline_tag": "text-generation",
        "tags": ["onecard", *([provenance.method] if provenance.method else [])],
    }
    if provenance.base is not None and is_hub_name(provenance.base):
        values["base_model"] = provenance.base
    if named := [source.name for source in provenance.data if source.sha256 is None and is_hub_name(source.name)]:
        values["datasets"] = named
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _body(export: Export, provenance: Provenance) -> Iterator[str]:
    yield f"# {provenance.name}\n"
    yield "Written by `onecard export` from the record of the run. Nothing in it is guessed: `unknown` means that no"
    yield "record tells. The licence of this model is for its maker to choose, by those below.\n"
    yield from _table("Origin", _origin(provenance))
    yield "## Data\n"
    if provenance.data:
        yield "| Source | SHA-256 at export | Licence |\n|---|---|---|"
        for source in provenance.data:
            yield f"| `{source.name}` | {source.sha256 or UNKNOWN} | {source.license} |"
    else:
        yield "unknown"
    yield f"\nFingerprint of the prepared data as it was trained on: {provenance.corpus_fingerprint or UNKNOWN}\n"
    yield from _scores(provenance)
    yield from _table("This export", _about(export))
    if export.notes:
        yield from (f"- {note}" for note in export.notes)
        yield ""
    yield from _table("Versions", provenance.versions)
    if provenance.recipe:
        yield f"## Recipe\n\n```yaml\n{provenance.recipe.strip()}\n```"


def _origin(provenance: Provenance) -> dict[str, str]:
    base = provenance.base or ("none: trained from scratch" if provenance.method == "pretrain" else UNKNOWN)
    rows = {"Base model": base}
    if provenance.base is not None:
        rows["Its weights (fingerprint)"] = provenance.base_fingerprint or UNKNOWN
        rows["Its licence"] = provenance.base_license
    return rows | {
        "Method": provenance.method or UNKNOWN,
        "Checkpoint": provenance.checkpoint or UNKNOWN,
        "Tokens seen in training": UNKNOWN if provenance.tokens_seen is None else f"{provenance.tokens_seen:,}",
    }


def _about(export: Export) -> dict[str, str]:
    fidelity = export.fidelity
    return {
        "Format": f"{export.format}, {export.dtype}",
        "Size": format_bytes(export.num_bytes),
        "Largest difference of a logit": f"{fidelity.largest_difference:.3g} ({fidelity.share:.3%} of their range), "
        f"read back and compared with the trained model over {fidelity.num_tokens} fixed tokens",
        "Same likeliest token": f"{fidelity.same_top_share:.1%}",
    }


def _scores(provenance: Provenance) -> Iterator[str]:
    yield "## Scores\n"
    if provenance.heldout_loss is not None:
        bits = f", {provenance.bits_per_byte:.4f} bits per byte" if provenance.bits_per_byte is not None else ""
        yield f"Held-out loss at this checkpoint, measured in training: {provenance.heldout_loss:.4f}{bits}."
        if provenance.best_step is not None:
            is_it = "this one" if provenance.best_step == provenance.step else f"step {provenance.best_step}"
            yield f"Best held-out loss of the run: {is_it}."
    if provenance.scores is not None:
        yield "\n| Score | Value | Standard error | n | Protocol |\n|---|---|---|---|---|"
        for score in provenance.scores.scores:
            error = UNKNOWN if score.standard_error is None else f"{score.standard_error:.4g}"
            protocol = ", ".join(f"{key} {value}" for key, value in score.protocol.items() if value is not None)
            yield f"| {score.name} | {score.value:.4f} | {error} | {score.n} | {protocol.replace('|', '/')} |"
    elif provenance.heldout_loss is None:
        yield "unknown: `onecard evaluate` measures them"
    yield ""


def _table(title: str, rows: dict[str, str]) -> Iterator[str]:
    yield f"## {title}\n\n| | |\n|---|---|"
    for key, value in rows.items():
        yield f"| {key} | {value.replace('|', '/')} |"
    yield ""
