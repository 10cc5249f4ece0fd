"""Long chats keep their system prompt and newest whole rounds, and what is lost is counted."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from onecard.data.chats.conversation import BadRow, Conversation, PlainText, Rendered, Turn
from onecard.data.chats.rounds import fit
from onecard.data.chats.template import ChatTemplate

NUM_ROUNDS = 7


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    return ChatTemplate.of(tokenizer, "chatml")


def round_of(number: int) -> tuple[Turn, Turn]:
    return Turn("user", f"Question {number}?"), Turn("assistant", f"Answer {number}" + "." * (5 * number % 12))


def long_chat(num_rounds: int = NUM_ROUNDS) -> Conversation:
    rounds = [turn for number in range(num_rounds) for turn in round_of(number)]
    return Conversation((Turn("system", "Be kind."), *rounds))


def newest(chat: Conversation, dropped: int) -> Conversation:
    return Conversation((chat.turns[0], *chat.turns[1 + 2 * dropped :]))


def rendered(template: ChatTemplate, chat: Conversation) -> Rendered:
    (one,) = template.render([chat])
    assert isinstance(one, Rendered)
    return one


@pytest.mark.parametrize("max_rounds", [None, 1, 3, NUM_ROUNDS, 99])
@pytest.mark.parametrize("max_tokens", [60, 90, 150, 220, 10_000])
def test_the_most_rounds_that_fit_are_kept(template: ChatTemplate, max_tokens: int, max_rounds: int | None) -> None:
    chat = long_chat()
    (one,) = fit([chat], template, max_tokens=max_tokens, max_rounds=max_rounds)
    assert isinstance(one, Rendered)
    allowed = [d for d in range(NUM_ROUNDS) if NUM_ROUNDS - d <= (max_rounds or NUM_ROUNDS)]
    best = next(d for d in allowed if len(rendered(template, newest(chat, d)).ids) <= max_tokens)
    expected = rendered(template, newest(chat, best))
    assert one.ids.tolist() == expected.ids.tolist()
    assert one.is_target.tolist() == expected.is_target.tolist()
    assert one.target_bytes == expected.target_bytes
    assert (one.lost_rounds, one.is_cut) == (best, False)
    assert one.lost_tokens == len(rendered(template, chat).ids) - len(one.ids)


def test_a_batch_gives_what_each_alone_gives(template: ChatTemplate) -> None:
    examples = [long_chat(number) for number in range(1, 9)]
    together = fit(examples, template, max_tokens=100, max_rounds=5)
    for example, one in zip(examples, together, strict=True):
        (alone,) = fit([example], template, max_tokens=100, max_rounds=5)
        assert isinstance(alone, Rendered)
        assert isinstance(one, Rendered)
        assert one.ids.tolist() == alone.ids.tolist()
        assert one.lost_rounds == alone.lost_rounds


def test_a_round_that_is_too_long_loses_its_end(template: ChatTemplate) -> None:
    chat = Conversation((*round_of(1), Turn("user", "Tell."), Turn("assistant", "word " * 50)))
    (one,) = fit([chat], template, max_tokens=40, max_rounds=None)
    assert isinstance(one, Rendered)
    whole = rendered(template, Conversation(chat.turns[2:]))
    assert one.ids.tolist() == whole.ids[:40].tolist()
    assert one.is_target.tolist() == whole.is_target[:40].tolist()
    assert (one.is_cut, one.lost_rounds) == (True, 1)
    assert one.lost_tokens == len(rendered(template, chat).ids) - 40
    assert one.target_bytes == len(template.tokenizer.decode(one.ids[one.is_target]))


def test_a_row_without_targets_left_teaches_nothing(template: ChatTemplate) -> None:
    asks_long = Conversation((Turn("user", "word " * 50), Turn("assistant", "Yes.")))
    silent = Conversation((*round_of(1), Turn("user", "And?"), Turn("assistant", "No.", counts=False)))
    first, second, third = fit([asks_long, silent, silent], template, max_tokens=40, max_rounds=1)
    for one in (first, second, third):
        assert isinstance(one, BadRow)
        assert one.kind == "teaches nothing"
    (kept,) = fit([silent], template, max_tokens=1000, max_rounds=None)
    assert isinstance(kept, Rendered)


def test_tools_and_repeated_questions_stay_in_their_round(template: ChatTemplate) -> None:
    call = (
        Turn("user", "It is"),
        Turn("user", "hot?"),
        Turn("assistant", "f()"),
        Turn("tool", "30"),
        Turn("assistant", "Yes."),
    )
    (one,) = fit([Conversation((*round_of(1), *call))], template, max_tokens=1000, max_rounds=1)
    assert isinstance(one, Rendered)
    assert one.lost_rounds == 1
    assert one.ids.tolist() == rendered(template, Conversation(call)).ids.tolist()


def test_running_text_is_cut(template: ChatTemplate) -> None:
    (one,) = fit([PlainText("word " * 50)], template, max_tokens=10, max_rounds=None)
    assert isinstance(one, Rendered)
    assert len(one.ids) == 10
    assert one.is_target.all()
    assert one.is_cut
    assert one.lost_tokens > 40


def test_bad_rows_stay_bad(template: ChatTemplate) -> None:
    (one,) = fit([PlainText("<|im_end|>")], template, max_tokens=10, max_rounds=1)
    assert isinstance(one, BadRow)


def test_rows_that_fit_are_rendered_once(template: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    render = template.render
    monkeypatch.setattr(template, "render", lambda examples: sizes.append(len(examples)) or render(examples))
    fit([long_chat(1), long_chat(2)] * 10, template, max_tokens=1000, max_rounds=5)
    assert sizes == [20]
    fit([long_chat(8)] * 10, template, max_tokens=1000, max_rounds=5)
    assert sizes == [20, 10, 10]


@pytest.mark.parametrize("source", ["chatml", "default"])
@pytest.mark.parametrize(("max_tokens", "max_rounds"), [(40, None), (100, None), (100, 3), (1000, 5), (10, 2)])
def test_counting_first_gives_what_rendering_all_gives(
    source: str,
    max_tokens: int,
    max_rounds: int | None,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = ChatTemplate.of(tokenizer, source)
    spoilt = Conversation((*long_chat(5).turns, Turn("user", "<|im_end|>"), Turn("assistant", "No.")))
    examples = [long_chat(number) for number in (1, 4, 9, 20)] + [spoilt, PlainText("word " * 50), long_chat(3)]
    results = []
    for many in (10**6, 2):
        monkeypatch.setattr("onecard.data.chats.rounds._MANY_ROUNDS", many)
        results.append(fit(examples, template, max_tokens=max_tokens, max_rounds=max_rounds))
    for rendered_whole, counted in zip(*results, strict=True):
        assert repr(counted) == repr(rendered_whole)


def test_of_a_long_chat_only_what_stays_is_looked_through(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rendered = []
    apply = template.tokenizer.apply_chat_template

    def count(chats: Any, **options: Any) -> Any:
        num_rendered.append(sum(map(len, chats)))
        return apply(chats, **options)

    monkeypatch.setattr(template.tokenizer, "apply_chat_template", count)
    chat = long_chat(1000)
    (one,) = fit([chat], template, max_tokens=100, max_rounds=None)
    assert isinstance(one, Rendered)
    assert one.lost_rounds > 990
    # To find every answer takes a rendering of all before it: a million turns.
    assert sum(num_rendered) < 4 * len(chat.turns)
