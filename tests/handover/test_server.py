"""OpenAI's own client, and worse ones, at a server on a free port."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from byte_chat import make_writer

from onecard.handover.worker import Worker
from onecard.handover.writer import Writer, Written
from onecard.model.generate import Sampling

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from onecard.handover.server import ServerSettings, Service, make_app  # noqa: E402

QUESTION = {"messages": [{"role": "user", "content": "Why?"}], "temperature": 0, "max_tokens": 10}
TEXT = {"prompt": "Once", "temperature": 0, "max_tokens": 10}


class Recorder(Writer):
    """A writer that notes how each text ended."""

    def __init__(self, writer: Writer) -> None:
        self.__dict__.update(writer.__dict__)
        self.ends: list[Written] = []

    def write(self, *arguments: Any, **keywords: Any) -> Written:
        self.ends.append(super().write(*arguments, **keywords))
        return self.ends[-1]


class Served:
    """A server that runs, and requests to it."""

    def __init__(self, port: int, writer: Recorder, worker: Worker) -> None:
        self.port, self.writer, self.worker = port, writer, worker
        self.clients: list[Any] = []

    def ask(self, path: str, body: Any = None, *, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = json.dumps({"model": "tiny"} | body).encode() if isinstance(body, dict) else body
        connection.request(
            "GET" if body is None else "POST", path, content, {"Content-Type": "application/json"} | (headers or {})
        )
        answer = connection.getresponse()
        found = answer.status, json.loads(answer.read())
        connection.close()
        return found

    def client(self, **options: Any) -> Any:
        openai = pytest.importorskip("openai")
        address = f"http://127.0.0.1:{self.port}/v1"
        self.clients.append(openai.OpenAI(base_url=address, max_retries=0, **{"api_key": "none"} | options))
        return self.clients[-1]

    def leave_after(self, path: str, body: dict[str, Any], *, num_bytes: int = 0, seconds: float = 0.0) -> None:
        """Asks, reads so much of the answer or waits so long, and hangs up."""
        content = json.dumps({"model": "tiny"} | body).encode()
        head = ["POST " + path + " HTTP/1.1", "Host: x", "Content-Type: application/json"]
        lines = "\r\n".join([*head, f"Content-Length: {len(content)}", "", ""])
        with socket.create_connection(("127.0.0.1", self.port)) as line:
            line.sendall(lines.encode() + content)
            while num_bytes > 0:
                num_bytes -= len(line.recv(256))
            time.sleep(seconds)

    def ask_and_stay(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Asks and leaves the line open, after the request has surely come."""
        content = json.dumps({"model": "tiny"} | body).encode()
        head = ["POST " + path + " HTTP/1.1", "Host: x", "Content-Type: application/json"]
        line = socket.create_connection(("127.0.0.1", self.port))
        line.sendall("\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content)
        time.sleep(0.3)
        return line

    def wait_for_ends(self, number: int) -> None:
        limit = time.monotonic() + 60
        while len(self.writer.ends) < number:
            assert time.monotonic() < limit
            time.sleep(0.02)


@contextmanager
def serving(writer: Writer, **settings: Any) -> Iterator[Served]:
    recorder = Recorder(writer)
    chosen = ServerSettings("tiny", Sampling(max_new_tokens=20), **settings)
    worker = Worker(recorder)
    app = make_app(Service(recorder, worker, chosen), chosen)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        found = Served(listening.getsockname()[1], recorder, worker)
        try:
            yield found
        finally:
            for client in found.clients:
                client.close()
            server.should_exit = True
            worker.close()
            thread.join()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(make_writer()) as found:
        yield found


@pytest.fixture
def endless() -> Iterator[Served]:
    """A server whose answers take far longer than a test."""
    with serving(make_writer(context=1 << 17, ends=False)) as found:
        yield found


def expected_chat(writer: Writer, **changes: Any) -> Written:
    from onecard.data import Turn

    prompt = writer.encode_chat([Turn("user", "Why?")])
    return writer.write(prompt, Sampling(**{"max_new_tokens": 10, "temperature": 0} | changes), lambda _: None)


def test_the_official_client_chats(served: Served) -> None:
    client, expected = served.client(), expected_chat(make_writer())
    whole = client.chat.completions.create(model="tiny", **QUESTION)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (10, whole.usage.prompt_tokens + 10)
    chunks = list(
        client.chat.completions.create(model="tiny", **QUESTION, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert len(chunks) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].usage == whole.usage


def test_the_official_client_completes(served: Served) -> None:
    writer = make_writer()
    expected = writer.write(writer.encode_text("Once"), Sampling(10, temperature=0), lambda _: None).text
    client = served.client()
    assert client.completions.create(model="tiny", **TEXT).choices[0].text == expected
    assert client.completions.create(model="tiny", **TEXT | {"prompt": ["Once"]}).choices[0].text == expected
    chunks = list(client.completions.create(model="tiny", **TEXT, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_the_official_client_understands_errors(served: Served) -> None:
    openai = pytest.importorskip("openai")
    client = served.client()
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.chat.completions.create(model="other", **QUESTION)
    with pytest.raises(openai.BadRequestError, match="cannot honour n"):
        client.chat.completions.create(model="tiny", **QUESTION, n=2)


def test_requests_say_how_to_sample(served: Served) -> None:
    def text(**changes: Any) -> str:
        return served.ask("/v1/completions", TEXT | {"temperature": 1.5} | changes)[1]["choices"][0]["text"]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()
    assert text(seed=1, top_k=1) == text(temperature=0) == text(seed=2, top_p=1e-6)
    content = served.ask("/v1/chat/completions", QUESTION)[1]["choices"][0]["message"]["content"]
    status, cut = served.ask("/v1/chat/completions", QUESTION | {"stop": [content[3:5], "nothing"]})
    assert (status, cut["choices"][0]["finish_reason"]) == (200, "stop")
    assert cut["choices"][0]["message"]["content"] == content[: content.index(content[3:5])].strip()
    assert served.ask("/v1/completions", {"prompt": "Once"})[1]["usage"]["completion_tokens"] <= 20
    both = QUESTION | {"max_completion_tokens": 3}
    assert served.ask("/v1/chat/completions", both)[1]["usage"]["completion_tokens"] == 3


def test_parts_system_prompts_and_nulls_are_understood(served: Served) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Why?", "name": "me"},
    ]
    unused = {"n": 1, "stop": None, "tools": None, "user": "me", "presence_penalty": 0.0, "seed": None}
    answers = [
        served.ask("/v1/chat/completions", QUESTION | {"messages": messages} | more)[1]["choices"]
        for messages, more in ((plain, {}), (parts, unused))
    ]
    assert answers[0] == answers[1]


def test_a_special_token_that_is_typed_stays_text(shared: Served) -> None:
    lengths = []
    for content in ("a b", "a <|endoftext|> b"):
        found, body = shared.ask(
            "/v1/chat/completions", QUESTION | {"messages": [{"role": "user", "content": content}]}
        )
        assert found == 200
        lengths.append(body["usage"]["prompt_tokens"])
    # Letters, not the one token that ends a text.
    assert lengths[1] > lengths[0] + 5


BAD_REQUESTS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 404, "there is no model 'other'"),
    ({"messages": []}, 400, "messages: "),
    ({"messages": [{"role": "user", "content": 7}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "last message must be a user's"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "type"),
    ({"messages": [{"role": "user", "content": "half \ud83d"}]}, 400, "half of a character"),
    ({"messages": [{"role": "user", "content": "long " * 60}]}, 400, "context is 256 tokens"),
    ({"max_tokens": 300}, 400, "lower max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens: "),
    ({"max_tokens": "7"}, 400, "max_tokens: "),
    ({"temperature": 3, "top_p": 0, "seed": 0.5}, 400, "temperature: "),
    ({"temperature": 1e-9}, 400, "temperature is 1e-09"),
    ({"n": 2, "logprobs": True, "tools": [{}]}, 400, "cannot honour n, logprobs, tools"),
    ({"n": 2, "temprature": 1}, 400, "cannot honour n, temprature"),
    ({"stop": ["a"] * 5}, 400, "stop: "),
    ({"temprature": 1}, 400, "temprature: "),
    ({"stream": True, "stream_options": {"usage": True}}, 400, "stream_options.usage"),
]


@pytest.mark.parametrize(("changes", "status", "words"), BAD_REQUESTS, ids=[words for *_, words in BAD_REQUESTS])
def test_bad_requests_get_an_error_in_openai_form(
    changes: dict[str, Any], status: int, words: str, shared: Served
) -> None:
    found, body = shared.ask("/v1/chat/completions", QUESTION | changes)
    assert found == status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert words in body["error"]["message"]
    assert shared.ask("/v1/chat/completions", QUESTION)[0] == 200


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """One server for all bad requests: each leaves it standing for the next."""
    with serving(make_writer()) as found:
        yield found


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"{bad", {}, 400, "not JSON"),
        (b"", {}, 400, "required"),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', {}, 400, "UTF-8"),
        (b"[" * 100_000, {}, 400, ""),
        (b"[1]", {}, 400, "must be one JSON object"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', {}, 400, "temperature: "),
        (b'{"model": "tiny", "prompt": "a"}', {"Content-Type": "text/plain"}, 415, "Content-Type: application/json"),
        (b'{"model": "tiny", "prompt": ["a", "b"]}', {}, 400, "one prompt"),
        (b'{"model": "tiny", "prompt": [1, 2]}', {}, 400, "one prompt, as text"),
    ],
)
def test_bodies_that_are_no_request(
    body: bytes, headers: dict[str, str], status: int, words: str, shared: Served
) -> None:
    found, answer = shared.ask("/v1/completions", body, headers=headers)
    assert (found, words in answer["error"]["message"]) == (status, True), answer
    assert shared.ask("/v1/nowhere")[0] == 404
    assert shared.ask("/v1/completions")[0] == 405
    assert shared.ask("/v1/models/other")[0] == 404


def test_clients_that_leave_stop_their_text_and_no_other(endless: Served) -> None:
    long = {"max_tokens": 100_000, "temperature": 1.5, "seed": 1}
    endless.leave_after("/v1/completions", TEXT | long | {"stream": True}, num_bytes=600)
    endless.leave_after("/v1/chat/completions", QUESTION | long)  # left while it waits, or soon after
    assert endless.ask("/v1/completions", TEXT)[0] == 200
    reasons = [written.reason for written in endless.writer.ends]
    assert reasons[0] == "cancelled"
    assert reasons[-1] == "length"
    assert all(written.num_tokens < 50_000 for written in endless.writer.ends)


def test_a_client_that_leaves_before_its_answer_stops_it(endless: Served) -> None:
    long = {"max_tokens": 100_000, "temperature": 1.5, "seed": 1}
    endless.leave_after("/v1/chat/completions", QUESTION | long, seconds=0.5)
    endless.wait_for_ends(1)
    assert endless.writer.ends[0].reason == "cancelled"


def test_clients_are_served_in_turn(served: Served) -> None:
    expected, answers = expected_chat(make_writer()).text, list[Any]()
    threads = [
        threading.Thread(target=lambda: answers.append(served.ask("/v1/chat/completions", QUESTION))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(status, body["choices"][0]["message"]["content"]) for status, body in answers] == [(200, expected)] * 6


def test_a_server_that_stops_ends_its_texts(endless: Served) -> None:
    long, ended = TEXT | {"max_tokens": 100_000, "temperature": 1.5, "seed": 1, "model": "tiny"}, list[bytes]()

    def listen() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", endless.port, timeout=60)
        content = json.dumps(long | {"stream": True})
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
        ended.append(connection.getresponse().read())
        connection.close()

    threads = [threading.Thread(target=listen) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    endless.worker.stop()
    for thread in threads:
        thread.join()
    assert sorted(b"it is being stopped" in text for text in ended) == [False, True]
    assert all(text.endswith(b"data: [DONE]\n\n") or b"server_error" in text for text in ended)


def test_a_text_that_fails_ends_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Written:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(served.writer, "write", fail, raising=False)
        status, body = served.ask("/v1/completions", TEXT)
        assert (status, body["error"]["type"]) == (500, "server_error")
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        content = json.dumps({"model": "tiny", "stream": True} | TEXT)
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
        assert b'"type": "server_error"' in connection.getresponse().read()
        connection.close()
    assert served.ask("/v1/completions", TEXT)[0] == 200


def test_a_base_model_completes_and_says_that_it_does_not_chat() -> None:
    with serving(make_writer(chats=False)) as base:
        status, body = base.ask("/v1/chat/completions", QUESTION)
        assert status == 400
        assert "/v1/completions" in body["error"]["message"]
        assert base.ask("/v1/completions", TEXT)[0] == 200


def test_a_key_is_asked_for() -> None:
    with serving(make_writer(), api_key="秘密") as locked:
        assert "秘密" not in repr(ServerSettings("tiny", Sampling(), api_key="秘密"))
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "秘密".encode().decode("latin-1")}):
            assert locked.ask("/v1/models", headers=headers)[0] == 401
            assert locked.ask("/v1/completions", TEXT, headers=headers)[0] == 401
    with serving(make_writer(), api_key="secret") as locked:
        assert locked.ask("/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        assert [model.id for model in locked.client(api_key="secret").models.list()] == ["tiny"]


def test_pages_of_other_origins_may_ask_only_where_they_are_named() -> None:
    def allowed(server: Served, origin: str = "http://page.example") -> str | None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/v1/models", headers={"Origin": origin})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.getheader("access-control-allow-origin")

    with serving(make_writer()) as closed:
        assert allowed(closed) is None
        assert allowed(closed, "http://localhost:3000") == "http://localhost:3000"
    with serving(make_writer(), allow_origins=("http://page.example",)) as opened:
        assert allowed(opened) == "http://page.example"


def test_bodies_without_end_are_refused(shared: Served) -> None:
    from onecard.handover.gate import MOST_BODY_BYTES

    def many() -> Iterator[bytes]:
        for _ in range(6):
            yield b" " * 2**20

    bodies: list[Any] = [b" " * (MOST_BODY_BYTES + 1), many()]
    for body in bodies:
        status, answer = shared.ask("/v1/completions", body)
        assert (status, "larger than" in answer["error"]["message"]) == (413, True)
    assert shared.ask("/v1/completions", TEXT)[0] == 200


def test_megabytes_of_text_are_refused_before_they_are_encoded(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.writer, "encode_text", None, raising=False)
    status, body = shared.ask("/v1/completions", TEXT | {"prompt": "word " * 10**5})
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert "500,000 characters" in body["error"]["message"]


def test_too_many_that_wait_are_told_to_come_again(endless: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.handover.worker.MOST_WAITING", 2)
    long = TEXT | {"max_tokens": 100_000, "temperature": 1.5, "seed": 1, "stream": True}
    lines = [endless.ask_and_stay("/v1/completions", long) for _ in range(3)]
    status, body = endless.ask("/v1/completions", TEXT)
    assert (status, body["error"]["code"]) == (503, "server_busy")
    for line in lines:
        line.close()  # also those that still wait make room at once
    endless.wait_for_ends(1)
    time.sleep(0.6)
    assert endless.ask("/v1/completions", TEXT)[0] == 200


def test_health_needs_no_key() -> None:
    with serving(make_writer(), api_key="secret") as locked:
        assert locked.ask("/health") == (200, {"status": "ok"})


def test_a_private_server_is_not_asked_under_a_name_of_the_internet() -> None:
    with serving(make_writer(), is_private=True, allow_origins=("https://page.example",)) as private:
        found = {
            host: private.ask("/v1/models", headers={"Host": host})[0]
            for host in ("localhost:8000", "[::1]:8000", "10.0.0.2", "pc.local", "page.example", "evil.example", "]x[")
        }
    assert [host for host, status in found.items() if status != 200] == ["evil.example", "]x["]


@pytest.mark.parametrize(
    ("changes", "status"),
    [({"tool_choice": "auto"}, 200), ({"logprobs": 0}, 400), ({"n": True}, 400), ({"logprobs": False}, 200)],
)
def test_what_is_harmless_is_told_by_its_type_too(changes: dict[str, Any], status: int, shared: Served) -> None:
    assert shared.ask("/v1/completions", TEXT | changes)[0] == status
