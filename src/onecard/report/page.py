"""What a report says, gathered from the record of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onecard.observe.events import ChosenEvent
from onecard.report.differences import GROUPS, settings_of
from onecard.report.figures import Figure, make_figures
from onecard.report.found import Found, tell_findings, tell_recoveries
from onecard.report.ranks import RankRows, tell_ranks
from onecard.report.reasons import tell_reason
from onecard.report.record import RunRecord
from onecard.report.samples import PromptHistory, tell_samples
from onecard.report.score_table import ScoreRow, tabulate_scores
from onecard.report.spending import Spending, measured_bytes, memory_of, time_of
from onecard.report.summary import HeldoutPoint, RunSummary, heldout_points, summarize_run
from onecard.report.words import Say
from onecard.spec.paths import shorten_path, shorten_paths
from onecard.units import format_bytes, format_count, format_seconds

_STATE_COLOURS = {"completed": "good", "early stopping": "good", "time limit": "good", "diverged": "bad"}
# A page is read, not searched: of more rows the rest is folded away.
_SHOWN_EVALUATIONS = 12


@dataclass(frozen=True)
class Tile:
    """A key figure: what it is, its value, and a line below."""

    label: str
    value: str
    below: str = ""


@dataclass(frozen=True)
class Page:
    """All parts of a report as text and pictures, ready for its template."""

    name: str
    state: str
    state_colour: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...]
    warnings: tuple[str, ...]
    findings: tuple[Found, ...]
    recoveries: tuple[str, ...]
    figures: tuple[Figure, ...]
    time: Spending | None
    ranks: RankRows | None
    memory: Spending | None
    scores: tuple[tuple[str, str, str, str, int], ...]
    choices: tuple[str, ...]
    evaluations: tuple[tuple[str, ...], ...]
    folds_evaluations: bool
    samples: tuple[PromptHistory, ...]
    num_prompts: int
    is_chat: bool
    settings: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    reasons: tuple[tuple[str, str], ...]
    data: tuple[tuple[str, str], ...]
    sources: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]
    recipe: str
    seed: int


def make_page(run: RunRecord, say: Say) -> Page:
    """Gathers what there is to say of a run; parts that it has nothing for stay empty."""
    summary = summarize_run(run, run.root.name)
    environment = run.versions[-1].versions if run.versions else {}
    samples, num_prompts = tell_samples(run)
    evaluations = _evaluations(heldout_points(run), summary.best)
    return Page(
        name=run.root.name,
        state=say(summary.state),
        state_colour=_STATE_COLOURS.get(summary.state, "warning"),
        sentences=tuple(_sentences(run, say)),
        tiles=tuple(_tiles(run, summary, say)),
        warnings=tuple(_warnings(summary, say)),
        findings=tell_findings(run, say),
        recoveries=tell_recoveries(run, say),
        figures=make_figures(run, say),
        time=time_of(run, say),
        ranks=tell_ranks(run, say),
        memory=memory_of(run, say),
        scores=tuple(_score(row) for row in tabulate_scores([run], [_best_step(run, summary)])),
        choices=tuple(_choices(run, say)),
        evaluations=evaluations,
        folds_evaluations=len(evaluations) > _SHOWN_EVALUATIONS,
        samples=samples,
        num_prompts=num_prompts,
        is_chat=run.plan.task == "sft",
        settings=tuple(_settings(run)),
        reasons=tuple((name, tell_reason(reason, say)) for name, reason in run.plan.reasons.items()),
        data=tuple(_data(run, say)),
        sources=tuple((shorten_path(name), format_count(size)) for name, size in run.plan.corpus.tokens_of_sources),
        environment=tuple(environment.items()),
        commands=tuple(_commands(environment)),
        recipe=_recipe_text(run),
        seed=run.plan.seed,
    )


def _sentences(run: RunRecord, say: Say) -> list[str]:
    plan = run.plan
    facts: dict[str, Any] = {
        "kind": str(plan.model.settings.get("model_type", "model")),
        "base": shorten_path(plan.model.base.name) if plan.model.base is not None else "",
        "parameters": format_count(plan.model.num_parameters),
        "tokens": format_count(plan.corpus.num_train_tokens),
        "rows": f"{plan.corpus.num_train_rows or 0:,}",
    }
    match plan.task, plan.model.base is not None:
        case "sft", True:
            text = say("{base} ({parameters} parameters), fine-tuned on {rows} chats.", **facts)
        case "sft", False:
            text = say("{kind}, {parameters} parameters, trained from scratch on {rows} chats.", **facts)
        case _, True:
            text = say("{base} ({parameters} parameters), trained further on {tokens} tokens of text.", **facts)
        case _:
            text = say("{kind}, {parameters} parameters, trained from scratch on {tokens} tokens of text.", **facts)
    if plan.adapt is None:
        return [text]
    return [text, say("Only adapters of rank {r} were trained ({method}).", r=plan.adapt.r, method=plan.adapt.method)]


def _tiles(run: RunRecord, summary: RunSummary, say: Say) -> list[Tile]:
    time = run.plan.forecast.time if run.plan.forecast is not None else None
    epochs = summary.tokens_seen / max(1, run.plan.corpus.num_train_tokens)
    tiles = []
    if (best := summary.best) is not None:
        bits = best.bits_per_byte
        below = [say("step {step}", step=f"{best.step:,}")]
        below += [say("{value} bits per byte", value=f"{bits:.3f}")] if bits is not None else []
        value = f"{best.loss:.4f} ± {best.standard_error:.4f}"
        tiles.append(Tile(say("best held-out loss"), value, " · ".join(below)))
    if summary.train_loss is not None:
        num = min(10, len(run.steps))
        tiles.append(Tile(say("last training loss"), f"{summary.train_loss:.4f}", say("mean of {num} steps", num=num)))
    tiles.append(Tile(say("steps"), f"{summary.steps:,}", say("of {num}", num=f"{summary.num_steps:,}")))
    tiles.append(
        Tile(say("tokens seen"), format_count(summary.tokens_seen), say("{value} epochs", value=f"{epochs:.2f}"))
    )
    planned = say("planned {time}", time=format_seconds(time.total_s)) if time is not None else ""
    tiles.append(Tile(say("time"), format_seconds(summary.elapsed_s), planned))
    if summary.tokens_per_s is not None:
        tiles.append(Tile(say("tokens/s"), format_count(summary.tokens_per_s), say("median of steps")))
    if (measured := measured_bytes(run)) is not None:
        memory = run.plan.forecast.memory if run.plan.forecast is not None else None
        below_it = say("of {limit}", limit=format_bytes(memory.limit_bytes)) if memory is not None else ""
        tiles.append(Tile(say("most memory"), format_bytes(measured), below_it))
    return tiles


def _warnings(summary: RunSummary, say: Say) -> list[str]:
    found = []
    if summary.num_refused:
        found.append(say("Updates refused because loss or gradient was not finite: {num}.", num=summary.num_refused))
    if summary.num_damaged:
        found.append(say("Lines of the record that cannot be read and are left out: {num}.", num=summary.num_damaged))
    return found


def _best_step(run: RunRecord, summary: RunSummary) -> int | None:
    return run.marked_step if run.marked_step is not None else summary.best.step if summary.best is not None else None


def _score(row: ScoreRow) -> tuple[str, str, str, str, int]:
    cell = row.cells[0]
    if cell is None:  # a table of one run has a cell in each row
        return row.label, "", "", "", 0
    error = cell.standard_error
    value = f"{cell.value:.4f}" + (f" ± {error:.4f}" if error is not None and math.isfinite(error) else "")
    return row.label, value, f"{row.n:,}", cell.checkpoint, cell.num_scored


def _choices(run: RunRecord, say: Say) -> list[str]:
    found = []
    for event in run.of(ChosenEvent):
        text = say(
            "Chosen by {task}: {checkpoint} of {num} ({metric} {value} ± {error}, {n} items).",
            task=event.task,
            checkpoint=event.checkpoint,
            num=event.num_scored,
            metric=event.metric,
            value=f"{event.value:.4f}",
            error=f"{event.standard_error:.4f}",
            n=event.n,
        )
        names = say("Not to be told from it: {names}.", names=", ".join(event.undecided)) if event.undecided else ""
        found.append(f"{text} {names}".strip())
    return found


def _evaluations(points: Sequence[HeldoutPoint], best: HeldoutPoint | None) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            f"{point.step:,}",
            format_count(point.tokens_seen) if point.tokens_seen is not None else "",
            format_seconds(point.elapsed_s),
            f"{point.loss:.4f} ± {point.standard_error:.4f}",
            f"{point.bits_per_byte:.4f}" if point.bits_per_byte is not None else "",
            "best" if point == best and len(points) > 1 else "",
        )
        for point in points
    )


def _settings(run: RunRecord) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    rows = settings_of(run, with_recipe=run.recipe is not None)
    found = []
    for group in GROUPS:
        values = tuple((name, _text(value)) for (owner, name), value in rows.items() if owner == group)
        if values:
            found.append((group, values))
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return shorten_path(str(value))


def _data(run: RunRecord, say: Say) -> list[tuple[str, str]]:
    facts, base = run.plan.corpus, run.plan.model.base
    train = say(
        "{tokens} tokens, {size}", tokens=format_count(facts.num_train_tokens), size=format_bytes(facts.train_bytes)
    )
    rows = [(say("Training text"), train)]
    if facts.num_heldout_tokens:
        rows.append((say("Held-out text"), say("{tokens} tokens", tokens=format_count(facts.num_heldout_tokens))))
    rows.append((say("Hash of the prepared data"), facts.fingerprint))
    if base is not None and base.fingerprint is not None:
        rows.append((say("Hash of the base's weights"), base.fingerprint))
    return rows


def _commands(environment: dict[str, str]) -> list[str]:
    pins = [
        f"{name}=={environment[name].partition('+')[0]}" for name in ("torch", "transformers") if name in environment
    ]
    install = [f"pip install {' '.join(pins)}"] if pins else []
    return [*install, "pip install -e .  # in a clone of onecard", "onecard train recipe.yaml"]


def _recipe_text(run: RunRecord) -> str:
    try:
        return shorten_paths((run.root / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return ""
