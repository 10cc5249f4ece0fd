"""What is not as it was when a run was last at work: told, and refused where it would change what is computed."""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from onecard.checkpoint import step_of_folder
from onecard.data import CorpusRequest, TrainingData, prepare
from onecard.errors import CheckpointError, InputError, RecipeError
from onecard.model.folder import load_tokenizer
from onecard.planner import facts_of
from onecard.report.record import read_object, read_versions
from onecard.run.circumstances import circumstances_of
from onecard.run.find import differences_of
from onecard.run.folder import RunFolder
from onecard.run.versions import find_versions
from onecard.spec import CorpusFacts, Plan, Recipe, load_recipe
from onecard.units import format_bytes

log = logging.getLogger("onecard.run")

# What may be asked for by name, and what going on with it means.
ACCEPTABLE = {
    "data": "go on with the text or chats as they are now",
    "tokenizer": "go on with a tokenizer that writes other ids for some texts",
    "recipe": "go on under the run's own settings, whatever recipe.yaml says now",
    "card": "go on on this card",
}
# The same card tells a little more or less memory by another driver.
_SAME_MEMORY = 0.95


def check_names(accepted: Collection[str]) -> frozenset[str]:
    """Splits `data,tokenizer`, and refuses names that mean nothing.

    Raises:
        InputError: as that.
    """
    names = frozenset(part.strip() for name in accepted for part in name.split(",") if part.strip())
    if unknown := sorted(names - ACCEPTABLE.keys()):
        known = "; ".join(f"{name}: {meaning}" for name, meaning in ACCEPTABLE.items())
        raise InputError(f"--accept {', '.join(unknown)} means nothing. There are {known}")
    return names


def check_circumstances(run: RunFolder, checkpoint: Path | None, plan: Plan, accepted: Collection[str]) -> None:
    """Tells what of code, card and recipe is different from when a checkpoint was written.

    Other versions and an equal card elsewhere are harmless: the state is restored to the bit, the digits after it may
    differ. A smaller card, and a recipe that was edited, are refused unless accepted.

    Raises:
        InputError: with all that is refused, and how to accept it.
    """
    for line in _other_versions(run, checkpoint):
        log.warning("%s: the run goes on, and its digits may differ from now on", line)
    before = read_object(checkpoint / "circumstances.json") if checkpoint is not None else {}
    if not before:  # nothing was saved yet, or by a version that did not write it down
        return
    recipe, refused = run.recipe(), {}
    now = circumstances_of(plan, recipe)
    was, found = before.get("card_bytes") or 0, now["card_bytes"] or 0
    line = f"the card is {now['card']}, the run was on {before.get('card')}"
    if found < _SAME_MEMORY * was:
        refused["card"] = f"{line}, which has more memory: {format_bytes(was)}, here {format_bytes(found)}"
    elif before.get("card") != now["card"]:
        log.warning("%s: the run goes on, and its digits may differ from now on", line)
    if edited := _edited(before.get("recipe"), recipe):
        refused["recipe"] = "recipe.yaml of the run was edited: " + "; ".join(edited)
    _refuse({name: text for name, text in refused.items() if name not in accepted})


def settle_corpus(
    recipe: Recipe, plan: Plan, corpus: TrainingData, checkpoint: Path | None, accepted: Collection[str]
) -> tuple[TrainingData, Plan]:
    """Compares the text or chats of a run with what it was trained on; gives them, and the plan with their facts.

    A tokenizer that is made from the text is the run's own, from its checkpoint: made anew from other text it would
    give the model other tokens.

    Raises:
        CheckpointError: they are others, and not accepted; or another vocabulary, which no name makes acceptable.
    """
    if corpus.fingerprint == plan.corpus.fingerprint:
        return corpus, plan
    if checkpoint is not None and recipe.task == "pretrain" and recipe.model_name_or_path is None:
        request = CorpusRequest.of(recipe, None)
        corpus = prepare(replace(request, tokenizer=str(checkpoint), vocab_size=None))
        if corpus.fingerprint == plan.corpus.fingerprint:
            return corpus, plan
    facts = facts_of(corpus)
    if facts.vocab_size != plan.corpus.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {facts.vocab_size} tokens now and had {plan.corpus.vocab_size}, so the ids mean other "
            "texts and the run cannot go on with it: restore the tokenizer, or start a new run with `onecard train`"
        )
    changed = {"data": f"the training text, its split or its chat template ({_describe(plan.corpus, facts)})"}
    if checkpoint is not None and _has_other_tokenizer(corpus, checkpoint):
        changed = {"tokenizer": "the tokenizer", **changed}
    if unaccepted := [text for name, text in changed.items() if name not in accepted]:
        have, them = ("has", "it") if len(unaccepted) == 1 else ("have", "them")
        raise CheckpointError(
            f"{' and '.join(unaccepted)} {have} changed since this run began, so it cannot be continued exactly: "
            f"restore {them}, start a new run with `onecard train`, or go on with what is there now by `onecard resume "
            f"RUN --accept {','.join(changed)}`"
        )
    log.warning("accepted, and the run goes on with what is there now: %s", " and ".join(changed.values()))
    return corpus, plan.model_copy(update={"corpus": facts})


def _describe(before: CorpusFacts, now: CorpusFacts) -> str:
    if before.num_train_tokens == now.num_train_tokens:
        return f"as many tokens, {now.num_train_tokens:,}, but others"
    return f"{before.num_train_tokens:,} tokens then, {now.num_train_tokens:,} now"


def _has_other_tokenizer(corpus: TrainingData, checkpoint: Path) -> bool:
    before = load_tokenizer(checkpoint)
    return before.get_vocab() != corpus.tokenizer.get_vocab()


def _other_versions(run: RunFolder, checkpoint: Path | None) -> Iterator[str]:
    """Says what is of another version than when the run was last at work; of the card its memory tells more."""
    step = step_of_folder(checkpoint) if checkpoint is not None else 0
    lines = [line for line in read_versions(run.root) if line.step <= step]
    then, now = lines[-1].versions if lines else {}, find_versions()
    for name, here in now.items():
        if name != "GPU" and then.get(name, here) != here:
            yield f"{name} is {here}, the run was at work with {then[name]}"


def _edited(before: str | None, recipe: Recipe) -> list[str]:
    if before is None:
        return []
    try:
        return differences_of(_recipe_of(before), recipe)
    except (RecipeError, ValueError):
        return []  # of another version, whose settings had other names


def _recipe_of(text: str) -> Recipe:
    return load_recipe(yaml.safe_load(text), require_dataset=False)


def _refuse(refused: Mapping[str, str]) -> None:
    if refused:
        lines = [f"  - {text}" for text in refused.values()]
        names = ",".join(refused)
        raise InputError(
            "\n".join(["this run is not as it was:", *lines])
            + f"\nRestore it, or go on all the same with `onecard resume RUN --accept {names}`"
            + "".join(f"\n  {name}: {ACCEPTABLE[name]}" for name in refused)
        )
