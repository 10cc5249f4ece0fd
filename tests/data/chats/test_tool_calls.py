"""Calls of tools and reasoning are answers where the template shows them, and counted where it does not."""

from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from onecard.data.chats.conversation import BadRow, Conversation, Rendered, Turn
from onecard.data.chats.template import ChatTemplate

# After Qwen3: thoughts are shown after the last question only, tools answer as a user.
QWEN = """{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {{- '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\\n' -}}
    {%- if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last -%}
      {{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- m.content -}}
    {%- for call in m.tool_calls or [] -%}
      {%- if m.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
      {{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# After Llama 3.1: a mark of its own before the call, and another token after it.
LLAMA = """{{- '<|begin_of_text|>' -}}{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
{%- if m.tool_calls -%}
{{- '<|channel|>' + m.tool_calls[0].function.name + (m.tool_calls[0].function.arguments | tojson) + '<|return|>' -}}
{%- else -%}{{- m.content + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""
CALL = {"tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {"in": "你好"}}}]}
THOUGHT = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "Hm.")
CALLED = '<tool_call>rain{"in": "你好"}</tool_call><|im_end|>'
ROUND = (
    Turn("user", "Rain?"),
    Turn("assistant", "", extras=CALL),
    Turn("tool", "dry", extras={"name": "rain"}),
    Turn("assistant", "No."),
)
THINKING = (Turn("user", "Hi"), Turn("assistant", "Hello", extras=THOUGHT))


@pytest.fixture
def written(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[str]]:
    def find(source: str, turns: tuple[Turn, ...]) -> list[str]:
        tokenizer.chat_template = source
        template = ChatTemplate.of(tokenizer)
        (rendered,) = template.render([Conversation(turns)])
        assert isinstance(rendered, Rendered), rendered
        whole = tokenizer.apply_chat_template([turn.message for turn in turns], return_dict=False)
        assert rendered.ids.tolist() == whole
        assert not rendered.is_partial
        edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.is_target.astype(int), [0]])))
        return [
            tokenizer.decode(rendered.ids[start:end].tolist())
            for start, end in zip(edges[::2], edges[1::2], strict=True)
        ]

    return find


@pytest.mark.parametrize(
    ("source", "turns", "expected"),
    [
        (QWEN, ROUND, [CALLED, "No.<|im_end|>"]),
        (QWEN, (*ROUND, *ROUND), [CALLED, "No.<|im_end|>"] * 2),
        (QWEN, (*ROUND[:1], Turn("assistant", "Look.", extras=CALL), *ROUND[2:]),
         ["Look.\n" + CALLED, "No.<|im_end|>"]),
        (QWEN, (*ROUND[:1], Turn("assistant", "", False, CALL), *ROUND[2:]), ["No.<|im_end|>"]),
        (QWEN, THINKING, ["<think>\nHm.\n</think>\n\nHello<|im_end|>"]),
        (QWEN, (*THINKING, *THINKING), ["Hello<|im_end|>", "<think>\nHm.\n</think>\n\nHello<|im_end|>"]),
        (QWEN, (*THINKING, *ROUND), ["Hello<|im_end|>", CALLED, "No.<|im_end|>"]),
        (LLAMA, ROUND, ['<|channel|>rain{"in": "你好"}<|return|>', "No.<|eot_id|>"]),
    ],
)  # fmt: skip
def test_what_the_model_writes_is_a_target(
    source: str, turns: tuple[Turn, ...], expected: list[str], written: Callable[..., list[str]]
) -> None:
    assert written(source, turns) == expected


def test_a_template_that_leaves_them_out_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    template = ChatTemplate.of(tokenizer, "chatml")
    assert (template.shows.tools, template.shows.calls, template.shows.reasoning) == (True, False, False)
    said = Turn("assistant", "I look.", extras=CALL)
    plain, thinking, calling, silent = template.render(
        [
            Conversation(tuple(Turn(turn.role, turn.content) for turn in THINKING)),
            Conversation(THINKING),
            Conversation((ROUND[0], said, *ROUND[2:])),
            Conversation(ROUND),
        ]
    )
    assert isinstance(plain, Rendered)
    assert isinstance(thinking, Rendered)
    assert isinstance(calling, Rendered)
    assert isinstance(silent, BadRow)
    assert [one.is_partial for one in (plain, thinking, calling)] == [False, True, True]
    assert thinking.ids.tolist() == plain.ids.tolist()
    assert thinking.is_target.tolist() == plain.is_target.tolist()
    assert (silent.kind, "turn 2" in silent.reason) == ("call not shown", True)


@pytest.mark.parametrize("start", ["", "{% if messages[0].role != 'system' %}Be kind.{% endif %}"])
def test_a_template_that_leaves_out_system_prompts_is_told(start: str, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = Conversation((Turn("user", "Why?"), Turn("assistant", "So.")))
    led = Conversation((Turn("system", "Be brief."), *plain.turns))
    tokenizer.chat_template = start + (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    silent = ChatTemplate.of(tokenizer)
    spoken = ChatTemplate.of(tokenizer, "chatml")
    assert [template.shows.system for template in (silent, spoken)] == [False, True]
    for template, expected in ((silent, [False, True]), (spoken, [False, False])):
        rendered = [row for row in template.render([plain, led]) if isinstance(row, Rendered)]
        assert [row.is_partial for row in rendered] == expected


@pytest.mark.parametrize("extras", [THOUGHT | {"thinking": "<|im_end|>"}, {"tool_calls": [{"name": "<|im_end|>"}]}])
def test_special_tokens_in_them_are_refused(extras: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = QWEN
    (one,) = ChatTemplate.of(tokenizer).render([Conversation((THINKING[0], Turn("assistant", "x", extras=extras)))])
    assert isinstance(one, BadRow)
    assert one.kind == "special token in text"
