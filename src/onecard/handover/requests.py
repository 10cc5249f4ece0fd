"""What OpenAI's clients send, as far as a small model can honour it; what it cannot is refused by name.

Field names, defaults and limits are those of OpenAI's API reference; `top_k` is an addition that other servers have,
too. What only describes the caller is taken and not used.
"""

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from onecard.data import Turn
from onecard.model.generate import Sampling

_MOST_STOPS = 4
_WITHOUT_EFFECT = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "suffix": "",
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
_ABOUT_THE_CALLER = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)


def _whole_characters(text: str) -> str:
    # JSON can write half of a pair of surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it has half of a character (a lone surrogate), which is no text: send whole characters")
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]


def _is_same(given: Any, harmless: Any) -> bool:
    if harmless in ("none", "auto"):  # without tools there is nothing to choose
        return given in ("none", "auto")
    # `logprobs` 0 of a completion asks for those of its tokens; only false asks for none.
    return bool(given == harmless) and isinstance(given, bool) == isinstance(harmless, bool)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class WritingRequest(_Strict):
    """What both kinds of request have in common; None takes the server's setting."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Text] = Field(default_factory=list, max_length=_MOST_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_it_cannot(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError('the body must be one JSON object, {"model": …}')
        unused = _ABOUT_THE_CALLER | set(_WITHOUT_EFFECT)
        asked = [
            name
            for name, harmless in _WITHOUT_EFFECT.items()
            if given.get(name) is not None and not _is_same(given[name], harmless)
        ]
        if asked:
            # Said here, too: an error at this place hides those of the fields.
            asked += [name for name in given if name not in unused and name not in cls.model_fields]
            raise ValueError(f"this server cannot honour {', '.join(asked)}: leave it out")
        # An explicit null means the default, as for OpenAI.
        return {name: value for name, value in given.items() if name not in unused and value is not None}

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    def sampling(self, default: Sampling) -> Sampling:
        """Gives the server's sampling with what the request says instead; without a seed, a new one each time."""
        asked = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        found = replace(default, seed=seed, **{name: value for name, value in asked.items() if value is not None})
        limit = self.limit
        return found if limit is None else replace(found, max_new_tokens=limit)

    @property
    def limit(self) -> int | None:
        """The number of new tokens that the request asks for."""
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(WritingRequest):
    prompt: Text

    @field_validator("prompt", mode="before")
    @classmethod
    def _take_the_only_one(cls, given: Any) -> Any:
        if isinstance(given, list) and len(given) == 1:
            return given[0]
        if isinstance(given, list):
            raise ValueError("this server takes one prompt, as text, in a request: send one request for each")
        return given


class Part(_Strict):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn. Names of speakers and refusals, which clients send back with an answer, are not used."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    def turn(self) -> Turn:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Turn("system" if self.role == "developer" else self.role, text)


class ChatRequest(WritingRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("messages")
    @classmethod
    def _ends_on_a_question(cls, messages: list[Message]) -> list[Message]:
        if messages[-1].role != "user":
            raise ValueError("the last message must be a user's, for the answer is the assistant's next one")
        return messages

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
