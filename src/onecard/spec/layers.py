"""One layer of settings (a recipe, a section, flags) read and checked by itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onecard.spec.accepts import (
    MODEL_CONFIG,
    TOLD_BOUND,
    accepts,
    adapter,
    coerce,
    coerce_mapping,
    find_undecodable,
    show,
)
from onecard.spec.agreement import SHAPE_KEYS, WARMUP_KEYS
from onecard.spec.merge import EXCLUSIVE, PRECISIONS, is_given
from onecard.spec.paths import anchor
from onecard.spec.recipe import DatasetSource
from onecard.spec.spelling import Spelling, advise, did_you_mean, find_key, find_spelling, nearest
from onecard.spec.tasks import expand_lora
from onecard.spec.values import NO_EFFECT, VALUES

DEVICES = ("cpu", "cuda")
# Keys that decide which section holds, or name the whole, make no sense inside a section.
_NOT_IN_SIZE = ("size", "sizes", "name")
_NOT_ON_DEVICE = (*_NOT_IN_SIZE, "on_device", "device", "task", "method", "model_name_or_path")


@dataclass
class Layer:
    """Settings from one place, by canonical or deferred name, each already valid by itself."""

    values: dict[str, Any] = field(default_factory=dict)
    on_device: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[str, "Layer"] = field(default_factory=dict)
    # Keys that were given but refused, so that nobody complains that they are missing.
    refused: set[str] = field(default_factory=set)


class LayerReader:
    """Reads mappings as people write them and collects every problem as a sentence.

    Paths that exist only relative to `folder`, the folder of a recipe file, are found there.
    """

    def __init__(self, problems: list[str], folder: Path | None = None) -> None:
        self.problems = problems
        self._folder = folder
        self._place = ""

    def read(self, settings: Mapping[Any, Any]) -> Layer:
        """Reads a recipe or flags, with their `sizes` and `on_device` sections."""
        layer, sections = self._read_values(settings, forbidden=())
        layer.sizes = {
            str(name): self._read_size(section, f"sizes.{name}")
            for name, section in self._sections(sections.get("sizes"), "sizes")
        }
        layer.on_device = self._read_devices(sections.get("on_device"), "on_device")
        return layer

    def read_device_section(self, section: Mapping[Any, Any], place: str) -> dict[str, Any]:
        """Reads what holds on one kind of device."""
        self._place = f"{place}: "
        layer, _ = self._read_values(section, _NOT_ON_DEVICE)
        self._place = ""
        return layer.values

    def _read_size(self, section: Mapping[Any, Any], place: str) -> Layer:
        self._place = f"{place}: "
        layer, sections = self._read_values(section, _NOT_IN_SIZE)
        self._place = ""
        layer.on_device = self._read_devices(sections.get("on_device"), f"{place}.on_device")
        return layer

    def _read_devices(self, sections: Any, place: str) -> dict[str, dict[str, Any]]:
        devices = {}
        for name, section in self._sections(sections, place):
            kind = "cuda" if name == "gpu" else name
            if kind in DEVICES:
                devices[kind] = self.read_device_section(section, f"{place}.{name}")
            else:
                self.problems.append(f"{place}.{name} is no kind of device: use cpu or cuda")
        return devices

    def _sections(self, sections: Any, place: str) -> list[tuple[Any, Mapping[Any, Any]]]:
        if sections is None:
            return []
        if not isinstance(sections, Mapping):
            self.problems.append(f"{place} is {show(sections)}, but takes a mapping of named sections")
            return []
        good = []
        for name, section in sections.items():
            if section is None or isinstance(section, Mapping):
                good.append((name, section or {}))
            else:
                self.problems.append(f"{place}.{name} is {show(section)}, but takes a mapping of settings")
        return good

    def _read_values(self, settings: Mapping[Any, Any], forbidden: tuple[str, ...]) -> tuple[Layer, dict[str, Any]]:
        layer = Layer()
        sections: dict[str, Any] = {}
        written: dict[str, str] = {}
        for name, value in self._without_lora(settings).items():
            spelling = find_spelling(str(name))
            if spelling is None:
                known = advise(str(name)) or "; `onecard recipes --keys` lists them all"
                self._problem(f"{'null' if name is None else name} is not a setting{known}")
            elif spelling.key in forbidden:
                self._problem(f"{name} cannot be set in such a section")
            elif spelling.key in ("sizes", "on_device"):
                sections[spelling.key] = coerce(spelling.key, value)
            else:
                self._read_value(layer, written, (str(name), spelling), value)
        if "learning_rate" in layer.refused:
            layer.values.pop("min_lr", None)  # nothing to compare it with
        self._check_contradictions(layer.values, written)
        return layer, sections

    def _without_lora(self, settings: Mapping[Any, Any]) -> dict[Any, Any]:
        """Replaces a section `lora` by the flat keys it stands for."""
        flat = {}
        for name, value in settings.items():
            if str(name).lower() not in ("lora", "lora_config", "peft_config"):
                flat[name] = value
                continue
            try:
                flat |= expand_lora(coerce_mapping(value))
            except ValueError as error:
                self._problem(f"{name} is {show(value)}, but {error}")
        return flat

    def _read_value(self, layer: Layer, written: dict[str, str], name: tuple[str, Spelling], value: Any) -> None:
        """Reads one setting into the layer. `written` remembers what the user called each key."""
        shown, spelling = name
        key = spelling.name if spelling.deferred else spelling.key
        try:
            valid = self._valid(spelling, value)
        except ValidationError as error:
            layer.refused.add(spelling.key)
            for sentence in _sentences(spelling.key, shown, value, error):
                self._problem(sentence)
        except RecursionError:
            layer.refused.add(spelling.key)
            self._problem(f"{shown} is nested too deeply, or refers to itself: write it out flat")
        except ValueError as error:
            layer.refused.add(spelling.key)
            self._problem(f"{shown} is {show(value)}, but {error}")
        else:
            if valid is NO_EFFECT:
                return
            if key in written and layer.values[key] != valid and not _says_less(written[key], layer.values[key], valid):
                if _says_less(shown, valid, layer.values[key]):
                    return
                self._problem(f"{written[key]} and {shown} are one setting, but have different values: keep one")
                return
            if key not in written or layer.values[key] != valid:
                layer.values[key], written[key] = valid, shown

    def _valid(self, spelling: Spelling, value: Any) -> Any:
        if find_undecodable(value):
            raise ValueError("has bytes that are not UTF-8: write it as UTF-8 text")
        if spelling.translate:
            value = spelling.translate(value)
        if spelling.deferred or value is NO_EFFECT:
            return value
        key = spelling.key
        translate = VALUES.get(key)
        value = coerce(key, translate(value) if translate else value)
        return anchor(key, adapter(key).validate_python(value), self._folder)

    def _check_contradictions(self, values: dict[str, Any], written: dict[str, str]) -> None:
        """Reports what contradicts itself within one layer, and keeps the first of it, to report it once."""
        for group in EXCLUSIVE:
            if group == WARMUP_KEYS:
                continue  # transformers writes both into its files; `make_schedule` knows which counts
            given = [key for key in values if key in group and is_given(values[key])]
            if len(given) > 1:
                names = " and ".join(written[key] for key in given)
                self._problem(f"{names} contradict each other: keep one of them")
                for key in given[1:]:
                    del values[key]
        self._check_batch(values, written)
        self._check_precision(values, written)
        settings = values.get(MODEL_CONFIG)
        for sentence in find_config_problems(settings) if isinstance(settings, dict) else ():
            self._problem(sentence)
        for name, value in settings.items() if isinstance(settings, dict) else ():
            key = find_key(name)
            if key in SHAPE_KEYS and is_given(values.get(key)) and values[key] != value:
                other = f"model_config has {name} {show(value)}"
                self._problem(f"{written[key]} is {show(values[key])}, but {other}: keep one of them")
                del values[key]

    def _check_batch(self, values: dict[str, Any], written: dict[str, str]) -> None:
        keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "total_batch_size")
        if not all(is_given(values.get(key)) for key in keys):
            return
        micro, accumulation, total = (values[key] for key in keys)
        if micro * accumulation != total:
            names = [written[key] for key in keys]
            self._problem(f"{names[0]} {micro} x {names[1]} {accumulation} is not {names[2]} {total}: drop one of them")
            del values[keys[1]]

    def _check_precision(self, values: dict[str, Any], written: dict[str, str]) -> None:
        chosen = {name: written[name] for name in PRECISIONS if values.get(name) is True}
        if (explicit := values.get("precision", "auto")) != "auto":
            if chosen and _says_less(written["precision"], explicit):
                del values["precision"]
            else:
                chosen.setdefault(explicit, written["precision"])
        if len(chosen) > 1:
            is_4_bit = written.get("precision") in chosen.values() and _names(written["precision"], _OF_4_BITS)
            which = "the one that the card computes (fp16 before Ampere)" if is_4_bit else "one of them"
            self._problem(f"{' and '.join(chosen.values())} contradict each other: keep {which}")
            for name in list(chosen)[1:]:
                values.pop(name, None)

    def _problem(self, sentence: str) -> None:
        self.problems.append(self._place + sentence)


def find_config_problems(settings: Mapping[str, Any]) -> list[str]:
    """Lists the sizes of a transformers config that are none, by the rules of the recipe keys that say the same."""
    problems = []
    for name, value in settings.items():
        key = _LIKE.get(name) or find_key(name)
        # A list gives a size per layer; null leaves it to the architecture.
        if key not in (*SHAPE_KEYS, "vocab_size", "max_seq_length") or value is None or isinstance(value, list):
            continue
        try:
            adapter(key).validate_python(value, strict=True)
        except ValidationError as error:
            problems += _sentences(key, f"model_config.{name}", value, error)
    return problems


_OF_WEIGHTS, _OF_4_BITS = ("dtype", "torch_dtype"), ("bnb_4bit_compute_dtype",)


def _says_less(name: str, value: Any, other: Any = None) -> bool:
    """Whether another name of the same key, which has the value `other`, counts instead.

    `auto` leaves it open, and weights in fp32 are what all 16-bit arithmetic here has as its masters. As in
    transformers, whose files have both, a number of steps says nothing beside a strategy of epochs.
    """
    return bool(value == "auto" or other == "epoch" or (value == "fp32" and _names(name, _OF_WEIGHTS)))


def _names(name: str, spellings: tuple[str, ...]) -> bool:
    spelling = find_spelling(name)
    return spelling is not None and spelling.name in spellings


# Entries without a recipe key of their own, and the key that takes the same numbers.
_LIKE = {"head_dim": "hidden_size", "max_position_embeddings": "max_seq_length"}
_SOURCE_KEYS = tuple(DatasetSource.model_fields)


def _sentences(key: str, name: str, value: Any, error: ValidationError) -> list[str]:
    entries = error.errors()
    if key not in ("dataset", "eval_dataset"):
        # Of several alternatives, `at most` says more than that the value is no `auto` either.
        entries = [entry for entry in entries if entry["type"] == "less_than_equal"] or entries
    return list(dict.fromkeys(_sentence(key, name, value, entry) for entry in entries))


def _sentence(key: str, name: str, value: Any, error: Any) -> str:
    """Says what a validator refused in the words of a recipe."""
    is_list = isinstance(value, list | tuple)
    inner = [part for part in error["loc"] if (is_list if isinstance(part, int) else part in _SOURCE_KEYS)]
    most = error.get("ctx", {}).get("le", 0)
    if key not in ("dataset", "eval_dataset") or not error["loc"]:
        if most > TOLD_BOUND:
            return f"{name} is {show(value)}, but takes at most {int(most):,}"
        return f"{name} is {show(value)}, but takes {accepts(key).text}"
    place = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)
    if error["type"] == "string_too_short":
        return f"{place.removesuffix('.path')} is empty: give a file, a folder, a glob or a name"
    if error["type"] == "missing":
        return f"{place.removesuffix('.path')} has no path: give a file, a folder, a glob or a name"
    if error["type"] == "extra_forbidden":
        unknown = str(error["loc"][-1])
        return f"{place}.{unknown} is not a setting of a source{did_you_mean(nearest(unknown, list(_SOURCE_KEYS)))}"
    takes = "a number above 0" if inner and inner[-1] == "weight" else "text"
    takes = f"at most {int(most):,}" if most else takes
    return f"{place} is {show(error['input'])}, but takes {takes}"
