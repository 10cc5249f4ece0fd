"""A trained model as a folder that other tools open: written beside its place, read back, compared, then renamed."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from onecard.errors import CheckpointError, InputError
from onecard.handover.fidelity import TEXTS, compare, logits_of, make_probe, refuse_other_weights, refuse_unlike
from onecard.handover.gguf_file import GGUFFile
from onecard.handover.model_card import write_card
from onecard.handover.ollama import write_modelfile
from onecard.handover.speech import Speech
from onecard.model.folder import (
    is_adapter,
    load_as_trained,
    load_base,
    load_plain,
    load_tokenizer,
    save_model_folder,
)
from onecard.spec.handover import Export, ExportDtype, ExportFormat, Fidelity, Provenance
from onecard.units import format_bytes

FORMATS, DTYPES = get_args(ExportFormat), get_args(ExportDtype)
DEFAULT_DTYPE: dict[ExportFormat, ExportDtype] = {"hf": "bf16", "merged": "bf16", "gguf": "q8_0", "adapter": "f32"}
_TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Bytes of a value; q8_0 has a scale of two bytes for each 32.
_WIDTHS = {"f32": 4.0, "bf16": 2.0, "fp16": 2.0, "q8_0": 34 / 32}
# Tokenizer, config and card beside the weights.
_OTHER_BYTES = 32 * 2**20
_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExportRequest:
    """What to write, from which folder of a model, and where."""

    source: Path
    output: Path
    format: ExportFormat
    dtype: ExportDtype

    def check(self) -> None:
        """Refuses what cannot be, before anything is loaded.

        Raises:
            InputError: every problem, together.
        """
        problems = []
        if self.dtype == "q8_0" and self.format != "gguf":
            problems.append(f"--dtype q8_0 is a type of GGUF, which --to {self.format} does not write: use bf16")
        if is_adapter(self.source) and self.format == "hf":
            problems.append(
                f"{self.source} is an adapter, so there is no whole model yet: --to merged puts it into its base, "
                "--to adapter keeps it apart"
            )
        if not is_adapter(self.source) and self.format in ("merged", "adapter"):
            what = "nothing to merge" if self.format == "merged" else "no adapter"
            problems.append(f"{self.source} was trained in all its weights, so there is {what}: use --to hf")
        if self.output.suffix == ".gguf":
            problems.append(f"--output {self.output} is to be a folder: the .gguf file is put into it")
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            problems.append(f"{self.output} exists and is not empty: give another --output; nothing was changed")
        if problems:
            raise InputError("\n".join(problems))


@dataclass
class _Trained:
    """The model as it was trained, and what it answers to the probe."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    speech: Speech
    probe: Tensor
    logits: Tensor

    @classmethod
    def load(cls, source: Path) -> "_Trained":
        model, tokenizer = load_as_trained(source)
        model.requires_grad_(False)
        probe = make_probe(tokenizer, model)
        return cls(model, tokenizer, Speech.of(model, tokenizer), probe, logits_of(model, probe))

    def merge(self) -> None:
        """Puts an adapter into the weights."""
        from onecard.model import lora

        lora.merge(self.model)

    def judge(self, found: PreTrainedModel, dtype: str, *, is_rearranged: bool) -> Fidelity:
        """Compares what a model that was read back answers.

        Raises:
            CheckpointError: it is another model.
        """
        fidelity = compare(self.logits, logits_of(found, self.probe))
        refuse_unlike(fidelity, dtype, is_rearranged=is_rearranged)
        return fidelity


def export(request: ExportRequest, provenance: Provenance) -> Export:
    """Writes a model for other tools and gives what was written, with its difference from what was trained.

    The folder appears whole or not at all. All of it happens on the CPU in fp32, with room for two copies of the model.

    Raises:
        InputError: it cannot be written so, or there is no space for it.
        CheckpointError: the model is damaged, or what was read back is not what was trained.
    """
    request.check()
    trained = _Trained.load(request.source)
    notes = list(_notes(request, provenance))
    with _beside(request) as partial:
        _refuse_full_disk(request, trained.model)
        if request.format == "adapter":
            fidelity = _write_adapter(request, trained, partial)
        else:
            if is_adapter(request.source):
                trained.merge()
            _refuse_overflow(trained.model, request.dtype)
            if request.format == "gguf":
                fidelity = _write_gguf(request, trained, partial, provenance, notes)
            else:
                fidelity = _write_folder(request, trained, partial)
        result = Export(
            format=request.format,
            dtype=request.dtype,
            folder=str(request.output),
            checkpoint=provenance.checkpoint,
            num_bytes=sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()),
            files=tuple(sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())),
            fidelity=fidelity,
            notes=tuple(notes),
        )
        (partial / "README.md").write_text(write_card(result, provenance), encoding="utf-8", newline="\n")
    return result


@contextmanager
def _beside(request: ExportRequest) -> Iterator[Path]:
    """A folder beside the one that is wanted, which it becomes if nothing fails."""
    partial = request.output.parent / f".{request.output.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if request.output.is_dir():
            request.output.rmdir()  # an empty one; Windows does not replace it
        partial.replace(request.output)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in a class of its own
        raise InputError(f"{request.output} cannot be written: {error}. Nothing was kept; give another --output") from (
            error
        )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_full_disk(request: ExportRequest, model: PreTrainedModel) -> None:
    if request.format == "adapter":
        needed = (request.source / _ADAPTER).stat().st_size + _OTHER_BYTES
    else:
        needed = int(model.num_parameters() * _WIDTHS[request.dtype]) + _OTHER_BYTES
    free = shutil.disk_usage(request.output.parent).free
    if free < needed:
        raise InputError(
            f"{request.output} needs {format_bytes(needed)}, but {format_bytes(free)} are free: free some space, give "
            "an --output on another disk, or a smaller --dtype. Nothing was written"
        )


def _refuse_overflow(model: PreTrainedModel, dtype: str) -> None:
    if dtype != "fp16":
        return
    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    if largest > torch.finfo(torch.float16).max:
        raise InputError(f"a weight of {largest:.3g} is beyond fp16, which ends at 65504: use --dtype bf16")


def _notes(request: ExportRequest, provenance: Provenance) -> Iterator[str]:
    if not is_adapter(request.source):
        return
    from onecard.model import lora

    is_rounded = lora.read_note(request.source).get("frozen_weights") == "nf4"
    base = lora.find_base(request.source)
    name = provenance.base or base
    if request.format == "adapter":
        if is_rounded:
            yield f"trained beside {name} rounded to 4 bits (NF4): beside whole weights it answers a little otherwise"
        if base is not None and Path(base).is_absolute():
            yield "it names its base by a folder of the machine it was trained on: others have to put their own there"
        return
    yield f"merged into {name}" + (", rounded to 4 bits (NF4) and back as in training" if is_rounded else "")


def _write_folder(request: ExportRequest, trained: _Trained, partial: Path) -> Fidelity:
    """Writes a folder for transformers and reads it back as anyone would."""
    speech, model = trained.speech, trained.model
    model.generation_config = GenerationConfig(
        bos_token_id=speech.bos_id, eos_token_id=speech.stop_ids, pad_token_id=speech.pad_id
    )
    save_model_folder(model, {}, partial, _TORCH_DTYPES[request.dtype])
    trained.tokenizer.save_pretrained(partial)
    found = load_plain(partial, torch.float32)
    read = dict(found.named_parameters())
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    refuse_other_weights(own, lambda name: read[name].detach(), request.dtype, lambda _: -1)
    _refuse_other_tokenizer(trained.tokenizer, load_tokenizer(partial))
    return trained.judge(found, request.dtype, is_rearranged=is_adapter(request.source))


def _refuse_other_tokenizer(own: PreTrainedTokenizerBase, read: PreTrainedTokenizerBase) -> None:
    for text in TEXTS:
        if own.encode(text) != read.encode(text) or own.chat_template != read.chat_template:
            raise CheckpointError(
                "the tokenizer was read back as another one. Nothing was kept; please report it with the model's name"
            )


def _write_adapter(request: ExportRequest, trained: _Trained, partial: Path) -> Fidelity:
    """Writes a folder for PEFT, and reads it back with PEFT beside the base that it was trained beside."""
    from peft import PeftModel

    from onecard.model import lora
    from onecard.model.new_tokens import add_tokens

    dtype = _TORCH_DTYPES[request.dtype]
    tensors = load_file(request.source / _ADAPTER)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, partial / _ADAPTER, {"format": "pt"})
    for name in ("adapter_config.json", "generation_config.json", lora.NOTE):
        if (request.source / name).is_file():
            shutil.copyfile(request.source / name, partial / name)
    trained.tokenizer.save_pretrained(partial)
    base = load_base(request.source)
    rows = trained.model.get_input_embeddings().weight.shape[0]
    add_tokens(base, rows - base.get_input_embeddings().weight.shape[0])
    with warnings.catch_warnings(), lora.without_bitsandbytes():
        # PEFT asks transformers for a property by its old name (0.21 and 5.23).
        warnings.simplefilter("ignore", FutureWarning)
        found = PeftModel.from_pretrained(base, partial)
    return trained.judge(found, request.dtype, is_rearranged=True)


def _write_gguf(
    request: ExportRequest, trained: _Trained, partial: Path, provenance: Provenance, notes: list[str]
) -> Fidelity:
    """Writes one GGUF file with a Modelfile beside it, and reads the file back into the model."""
    file = GGUFFile(trained.model, trained.tokenizer, trained.speech, request.dtype)
    name = f"{provenance.name}-{request.dtype}.gguf"
    file.write(partial / name, provenance.name)
    if file.num_unaligned:
        notes.append(f"{file.num_unaligned} matrices have rows that are no multiple of 32 and are kept in fp16")
    file.read_back(partial / name)
    context = trained.model.config.max_position_embeddings
    text, form = write_modelfile(name, trained.tokenizer, trained.speech, context)
    (partial / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    if not form:
        notes.append("the chat template is in no form that onecard knows in Ollama's language: see Modelfile")
    return trained.judge(trained.model, request.dtype, is_rearranged=is_adapter(request.source))
