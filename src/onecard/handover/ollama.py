"""A Modelfile for Ollama (https://github.com/ollama/ollama/blob/main/docs/modelfile.md).

Ollama writes prompts with a template in Go's language. Those of the chat formats below are known; a tokenizer's own
template is one of them if it renders the same text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from onecard.handover.speech import Speech

_SYSTEM, _QUESTION, _ANSWER = "Be brief", "Why", "Therefore"
_CHAT = (("user", _QUESTION), ("assistant", _ANSWER), ("user", _QUESTION))


@dataclass(frozen=True)
class ChatForm:
    """Text before and after a turn of each role, and before the next answer; `{eos}` is the end-of-text token."""

    name: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str

    def render(self, turns: Sequence[tuple[str, str]], eos: str) -> str:
        """The text of a conversation up to where the next answer begins."""
        parts = []
        for role, content in turns:
            before, after = getattr(self, role)
            parts += [before, content, after]
        return "".join([*parts, self.opening]).replace("{eos}", eos)

    def in_go(self, eos: str) -> str:
        """The same for Ollama."""
        turns = "{{ else }}".join(
            f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role in ("system", "user", "assistant")
            for before, after in [getattr(self, role)]
        )
        text = "{{ range .Messages }}" + turns + "{{ end }}" * 4 + self.opening
        return text.replace("{eos}", eos)


def _headed(role: str) -> tuple[str, str]:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"


FORMS = (
    ChatForm(
        "ChatML",
        ("<|im_start|>system\n", "<|im_end|>\n"),
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
        "<|im_start|>assistant\n",
    ),
    ChatForm("Llama 3", _headed("system"), _headed("user"), _headed("assistant"), _headed("assistant")[0]),
    ChatForm(
        "Zephyr",
        ("<|system|>\n", "{eos}\n"),
        ("<|user|>\n", "{eos}\n"),
        ("<|assistant|>\n", "{eos}\n"),
        "<|assistant|>\n",
    ),
    ChatForm("onecard", ("System: ", "\n"), ("User: ", "\n"), ("Assistant: ", "{eos}\n"), "Assistant:"),
    ChatForm("turns ended by the end-of-text token", ("", "{eos}"), ("", "{eos}"), ("", "{eos}"), ""),
)
# Llama 2 writes the system prompt into the first question, which takes a template of its own.
_LLAMA_2 = (
    "{{ range $i, $m := .Messages }}"
    '{{ if eq $m.Role "user" }}{{ if gt $i 1 }}{bos}{{ end }}[INST] '
    "{{ if and (le $i 1) $.System }}<<SYS>>\n{{ $.System }}\n<</SYS>>\n\n{{ end }}{{ $m.Content }} [/INST]"
    '{{ else }}{{ if eq $m.Role "assistant" }} {{ $m.Content }} {eos}{{ end }}{{ end }}{{ end }}'
)


def write_modelfile(file: str, tokenizer: PreTrainedTokenizerBase, speech: Speech, context: int) -> tuple[str, str]:
    """Gives the text of a Modelfile for a GGUF file beside it, and the name of the chat form (empty: not known)."""
    lines = [f"FROM ./{file}"]
    name, template, system = _find_form(tokenizer, speech)
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# No TEMPLATE: the chat template in the GGUF file is in no form known here; Ollama tries it.")
    if system:
        lines.append(f'SYSTEM """{system}"""')
    stops = tokenizer.convert_ids_to_tokens(speech.stop_ids)
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n", name


def _find_form(tokenizer: PreTrainedTokenizerBase, speech: Speech) -> tuple[str, str, str]:
    """Name, Go template and default system prompt of the form that a tokenizer's chat template has."""
    if not tokenizer.chat_template:
        return "none", "{{ .Prompt }}", ""
    eos, bos = tokenizer.eos_token or "", tokenizer.bos_token or ""
    with_system, plain = (_render(tokenizer, turns) for turns in ((("system", _SYSTEM), *_CHAT), _CHAT))
    if plain is None:
        return "", "", ""
    opening = bos if speech.opens_with_bos else ""  # Ollama writes it by itself, as the file says
    plain = plain.removeprefix(opening)
    for form in FORMS:
        own = form.render(_CHAT, eos)
        if with_system is not None and with_system.removeprefix(opening) != form.render(
            (("system", _SYSTEM), *_CHAT), eos
        ):
            continue
        if plain == own:
            return form.name, form.in_go(eos), ""
        before, after = (part.replace("{eos}", eos) for part in form.system)
        if before and plain.startswith(before) and plain.endswith(after + own):
            return form.name, form.in_go(eos), plain[len(before) : len(plain) - len(after + own)]
    return _find_llama_2(plain, bos, eos)


def _find_llama_2(plain: str, bos: str, eos: str) -> tuple[str, str, str]:
    asked = f"[INST] {_QUESTION} [/INST]"
    if plain == f"{asked} {_ANSWER} {eos}{bos}{asked}":
        return "Llama 2", _LLAMA_2.replace("{bos}", bos).replace("{eos}", eos), ""
    return "", "", ""


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str | None:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template is a program and raises what it likes: some know no system prompt
        return None
