"""A conversation keeps its history, its context, and what it saves can be trained on."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from byte_chat import make_writer

from onecard.data import ChatTemplate, Turn
from onecard.data.chats.conversation import Conversation
from onecard.data.chats.formats import recognise, to_example
from onecard.errors import InputError
from onecard.handover.chat import Chat, Reply
from onecard.handover.writer import Writer
from onecard.model.generate import Sampling, complete_ids
from onecard.run.answers import answer

GREEDY = Sampling(max_new_tokens=10, temperature=0)


def test_the_first_answer_is_that_of_generate_and_comes_in_pieces() -> None:
    writer, pieces = make_writer(), list[str]()
    reply = Chat(writer, GREEDY).ask("Why?", pieces.append)
    assert reply.text == "".join(pieces) == answer(writer._model, writer.tokenizer, ["Why?"], GREEDY)[0]
    assert len(pieces) > 1
    assert reply.reason == "length"


def test_later_answers_see_what_was_said() -> None:
    """The cache of earlier turns changes nothing: a writer without it says the same."""
    chat = Chat(make_writer(), GREEDY, system="Be brief.")
    for question in ("Why?", "你好", "And then?"):
        before = chat.turns
        reply = chat.ask(question)
        prompt = ChatTemplate.of(make_writer().tokenizer).prompt([*before, Turn("user", question)])
        fresh = make_writer()
        told = fresh.write(fresh.encode_chat([*before, Turn("user", question)]), GREEDY, lambda _: None)
        assert reply.text == told.text
        assert len(prompt) == len(fresh.encode_chat([*before, Turn("user", question)]).ids)
    assert [turn.role for turn in chat.turns] == ["system", *["user", "assistant"] * 3]


def test_a_full_context_leaves_out_the_oldest_rounds_and_keeps_the_system_prompt() -> None:
    writer, seen = make_writer(context=160), list[list[Turn]]()
    encode = writer.encode_chat
    writer.encode_chat = lambda turns: seen.append(list(turns)) or encode(turns)  # type: ignore[method-assign, func-returns-value]
    chat, left_out = Chat(writer, GREEDY, system="Be brief."), []
    for number in range(8):
        left_out.append(chat.ask(f"Question {number}?").left_out)
        asked = seen[-1]
        assert asked == [*chat.turns[:1], *chat.turns[1 + 2 * left_out[-1] : -1]]
        assert len(encode(asked).ids) + GREEDY.max_new_tokens <= 160
        # One round more would not have had room.
        if left_out[-1]:
            assert len(encode([*chat.turns[:1], *chat.turns[2 * left_out[-1] - 1 : -1]]).ids) + 10 > 160
    assert left_out == sorted(left_out)
    assert left_out[0] == 0 < left_out[-1]
    assert len(chat.turns) == 17  # all of it can still be saved


def test_a_text_as_long_as_the_context_is_refused_and_forgotten() -> None:
    chat = Chat(make_writer(context=64), GREEDY)
    chat.ask("a")
    before = chat.turns
    with pytest.raises(InputError, match=r"prompt of 8\d tokens, .* has 64 .*shorten"):
        chat.ask("b" * 64)
    assert chat.turns == before
    reply = chat.ask("c" * (64 - len("User: \nAssistant:") - 4))
    assert (reply.left_out, reply.reason, reply.num_tokens) == (1, "context", 4)


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came() -> None:
    chat, pieces = Chat(make_writer(), GREEDY), list[str]()
    whole = Chat(make_writer(), GREEDY).ask("Why?").text
    reply = chat.ask("Why?", pieces.append, lambda: len(pieces) >= 3)
    assert reply.reason == "cancelled"
    assert 0 < len(reply.text) < len(whole)
    assert whole.startswith(reply.text)
    assert chat.turns[-1] == Turn("assistant", reply.text)


def test_an_empty_answer_is_not_kept() -> None:
    writer = make_writer()
    (first,) = writer.write(writer.encode_chat([Turn("user", "Why?")]), replace(GREEDY, max_new_tokens=1), print).text
    assert writer.template is not None
    writer.template.stop_ids = tuple(writer.tokenizer.encode(first))
    chat = Chat(writer, GREEDY)
    assert chat.ask("Why?") == Reply("", "stop", 1)
    assert chat.turns == ()


def test_regenerate_writes_another_answer_to_the_same_question() -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.5, seed=3)
    chat, again = (Chat(make_writer(), sampling) for _ in range(2))
    with pytest.raises(InputError, match="no answer yet"):
        chat.regenerate()
    first = chat.ask("Why?")
    second = chat.regenerate()
    assert first.text != second.text
    assert chat.turns == (Turn("user", "Why?"), Turn("assistant", second.text))
    # A conversation is the same each time.
    assert again.ask("Why?") == first
    assert again.regenerate() == second


def test_reset_forgets_all_but_the_system_prompt() -> None:
    chat = Chat(make_writer(), GREEDY, system="Be brief.")
    first = chat.ask("Why?")
    chat.reset()
    assert chat.turns == (Turn("system", "Be brief."),)
    assert chat.ask("Why?") == first


def test_saved_conversations_are_rows_to_train_on(tmp_path: Path) -> None:
    chat, path = Chat(make_writer(), GREEDY, system="简短。"), tmp_path / "chats.jsonl"
    with pytest.raises(InputError, match="nothing to save"):
        chat.save(path)
    chat.ask("你好")
    assert chat.save(path) == 1
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # an editor took the last line's end
    chat.ask("And?")
    assert chat.save(path) == 2
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [recognise(row) for row in rows] == ["messages"] * 2
    assert to_example(rows[1], "messages") == Conversation(chat.turns)
    assert "你好" in path.read_text(encoding="utf-8")


def test_save_does_not_touch_other_kinds_of_files(tmp_path: Path) -> None:
    chat = Chat(make_writer(), GREEDY)
    chat.ask("a")
    for path in (tmp_path / "model.safetensors", tmp_path / "no" / "such.jsonl"):
        with pytest.raises(InputError):
            chat.save(path)
        assert not path.exists()


@pytest.mark.parametrize("text", ["", "  \n", "half \ud83d of it"])
def test_what_cannot_be_said_is_refused(text: str) -> None:
    chat = Chat(make_writer(), GREEDY)
    with pytest.raises(InputError):
        chat.ask(text)
    assert chat.turns == ()


def test_a_model_without_template_and_a_system_prompt_without_room_are_refused_at_once() -> None:
    with pytest.raises(InputError, match="no chat template"):
        Chat(make_writer(chats=False), GREEDY)
    with pytest.raises(InputError, match="the system prompt makes a prompt of"):
        Chat(make_writer(context=64), GREEDY, system="long " * 20)


def test_a_line_that_is_not_written_whole_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            if len(content) <= 20:
                raise OSError(28, "No space left on device")
            return super().write(content[:20])

    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"{}\n")
    chat = Chat(make_writer(), Sampling(max_new_tokens=5, temperature=0))
    chat.ask("Why?")
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode, **more: FullDisk(self, "a") if more else plain(self, mode))
    with pytest.raises(InputError, match="No space left"):
        chat.save(path)
    assert path.read_bytes() == b"{}\n"


def test_seeds_go_on_from_the_last_one_at_the_first() -> None:
    chat = Chat(make_writer(), Sampling(max_new_tokens=3, seed=2**63 - 1))
    assert [chat.ask("Why?").num_tokens > 0 for _ in range(2)] == [True, True]


def test_tokens_that_the_model_lacks_are_refused() -> None:
    writer = make_writer()
    model = writer._model
    model.resize_token_embeddings(60)
    with pytest.raises(InputError, match="the model knows 60"):
        writer.encode_text("zebra")
    with pytest.raises(InputError, match="the model knows 60"):
        complete_ids(model, [[5], [60]], [0], Sampling(3))


def test_a_template_that_nobody_can_use_is_named() -> None:
    writer = make_writer()
    writer.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match=r"never.*Mend its chat_template"):
        Writer(writer._model, writer.tokenizer)
