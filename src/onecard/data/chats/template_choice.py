"""Which chat template a tokenizer gets.

`default`, for tokenizers that bring none (GPT-2 family), is running text with the roles named and the end-of-text token
after every answer, so it needs no new tokens:

    System: Be brief.
    User: Hello
    Assistant: Hi!<|endoftext|>
    User: ...

`eos` joins turns by the end-of-text token, as DialoGPT was trained (Zhang et al. 2020, arXiv 1911.00536). `chatml` is
the form of Qwen and SmolLM2, without their default system prompts.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.errors import DataError
from onecard.spec.paths import expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT = (
    "{% if tools %}{{ 'Tools: ' + (tools | tojson) + '\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EOS = (
    "{% if tools %}{{ (tools | tojson) + eos_token }}{% endif %}"
    "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
)
_OWN = {DEFAULT: "default", CHATML: "chatml", EOS: "eos"}
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def choose(tokenizer: "PreTrainedTokenizerBase", source: str) -> tuple[Any, str, tuple[str, ...]]:
    """Gives the text of a template, its name for people, and the special tokens it needs beside the tokenizer's own.

    Raises DataError where `source` is no name, file or folder with a template in it.
    """
    if source == "auto" and isinstance(tokenizer.chat_template, str) and tokenizer.chat_template in _OWN:
        # It learned from chats here, and says of its template what was said then.
        source = _OWN[tokenizer.chat_template]
    if source == "auto" and tokenizer.chat_template:
        return tokenizer.chat_template, "the tokenizer's own", ()
    if source == "chatml":
        return CHATML, "chatml", _CHATML_TOKENS
    if source in ("auto", "default", "eos"):
        if tokenizer.eos_token is None:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path!r}: it has no end-of-text token, which the chat template 'default'"
                " and 'eos' end an answer with. Set its eos_token and save it again, or use 'chatml'."
            )
        if source == "eos":
            return EOS, f"eos (turns joined by {tokenizer.eos_token})", ()
        return DEFAULT, f"default (System:, User:, Assistant:, {tokenizer.eos_token} after every answer)", ()
    return _read(expand(source))


def add_tokens(tokenizer: "PreTrainedTokenizerBase", needed: Iterable[str]) -> tuple[str, ...]:
    """Adds the special tokens that the vocabulary lacks and gives them back; their embeddings are for the caller."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    new = tuple(token for token in needed if token not in known)
    if new:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in new], special_tokens=True)
    return new


def mend_specials(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Makes the tokenizer find its special tokens wherever they stand, and names those it did not find after a letter.

    A Llama tokenizer.json that stands alone may mark them as `normalized`, so that `</s>` right after a word is split
    into letters and no answer would ever end.
    """
    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    mended = []
    for token in content["added_tokens"]:
        is_found = token["id"] in backend.encode(f"x{token['content']}", add_special_tokens=False).ids
        if token["special"] and token["normalized"] and not is_found:
            token["normalized"] = False
            mended.append(str(token["content"]))
    if mended:
        # In place, for the tokenizer holds on to its backend. Adding the tokens again would leave their old form in it.
        backend.__setstate__(json.dumps(content).encode("utf-8"))
    return tuple(mended)


def _read(path: Path) -> tuple[Any, str, tuple[str, ...]]:
    config = path / "tokenizer_config.json" if path.is_dir() else path
    try:
        if path.is_dir() and (path / "chat_template.jinja").is_file():
            text: Any = (path / "chat_template.jinja").read_text(encoding="utf-8")
            content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        elif config.suffix != ".json":
            text, content = config.read_text(encoding="utf-8"), {}
        else:
            content = json.loads(config.read_text(encoding="utf-8"))
            text = content.get("chat_template")
        if isinstance(text, list):
            text = {entry["name"]: entry["template"] for entry in text}
        added = content.get("added_tokens_decoder", {}).values()
        listed = [token["content"] for token in added if token.get("special")]
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"chat template {str(path)!r}: cannot be read ({error}). Give auto, default, chatml or eos, a .jinja file,"
            " a tokenizer_config.json, or a folder that holds one of them."
        ) from error
    if not text:
        raise DataError(f"chat template {str(path)!r}: there is no 'chat_template' in it. Give a file that has one.")
    return text, path.name, tuple(token for token in listed if token in str(text))
