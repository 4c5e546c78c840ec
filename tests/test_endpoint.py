"""Hosted models against a local server that misbehaves on demand: replies, retries, errors, keys, the cache."""
import json
import logging
import signal
import socket
import sys
import threading
import time
from functools import partial

import pytest
from conftest import Client

from data import UsageError

KEY = "sk-very-secret-123"


def user(text):
    return [{"role": "user", "content": text}]


def echo(chat):
    return chat[-1]["content"]


CHATS = [user(f"question {i}") for i in range(6)]
TEXTS = [f"question {i}" for i in range(6)]


@pytest.fixture
def serve(serve):
    """serve(*script, rule=echo) starts a Server."""
    return partial(serve, rule=echo, key=KEY)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "new" / "replies.jsonl"


def stored(cache):
    return [json.loads(line)["reply"] for line in cache.read_text().splitlines()]


# --- requests and replies ---

def test_a_request(serve):
    server = serve()
    assert server.endpoint().complete([CHATS[0]], 77) == ["question 0"]
    request, = server.requests
    assert request["path"] == "/v1/chat/completions" and request["headers"]["Authorization"] == f"Bearer {KEY}"
    assert request["model"] == "judge-1" and request["temperature"] == 0 and request["max_tokens"] == 77
    assert request["messages"] == CHATS[0]
    assert server.endpoint().complete([]) == [] and len(server.requests) == 1


def test_the_full_address_of_a_request_works_too(serve):
    server = serve()
    for end in ("/", "/chat/completions", "/chat/completions/"):
        assert Client(server.url + end, "judge-1").complete([CHATS[0]]) == ["question 0"]
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}


def test_parallel_requests_keep_their_order(serve):
    def slow(chat):
        time.sleep(0.002 * (sum(map(ord, echo(chat))) * 7 % 20))
        return echo(chat)

    server = serve(rule=slow)
    chats = [user(str(i)) for i in range(40)]
    assert server.endpoint().complete(chats) == [str(i) for i in range(40)]
    assert 2 <= server.most_open <= 8 and len(server.requests) == 40


# --- failures ---

@pytest.mark.parametrize("failure", [(429, {}, b""), (500, {}, b"oops"), (503, {}, b""), (408, {}, b""), None])
def test_a_passing_failure_is_retried(serve, failure):
    server = serve(*[failure or (lambda chat: None)] * 3)
    assert server.endpoint().complete([CHATS[0]]) == ["question 0"] and len(server.requests) == 4


def test_retry_after_is_respected(serve):
    server = serve((429, {"Retry-After": "0.3"}, b""))
    begin = time.monotonic()
    assert server.endpoint().complete([CHATS[0]]) == ["question 0"] and 0.3 <= time.monotonic() - begin < 10


def test_a_timeout_is_retried(serve):
    def late(chat):
        time.sleep(0.5)
        return "late"

    server = serve(late)
    assert server.endpoint(timeout=0.1).complete([CHATS[0]]) == ["question 0"] and len(server.requests) == 2
    server = serve(rule=late)
    with pytest.raises(UsageError, match=r"^no reply from http://127.0.0.1:\d+/v1 \(timed out\)"):
        server.endpoint(timeout=0.05, max_retries=1).complete([CHATS[0]])
    assert len(server.requests) == 2


def test_no_server_there(serve):
    server = serve()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UsageError) as caught:
        Client(url, "judge-1", KEY, max_retries=1).complete(CHATS)
    text = str(caught.value)
    assert url in text and "refused" in text and "JUDGE_URL" in text and KEY not in text and "\n" not in text
    assert not server.requests


def test_the_last_failure_is_shown(serve):
    server = serve(rule=(500, {}, b"out of\nmemory"))
    with pytest.raises(UsageError, match=r"no reply from .*\(HTTP 500 out of memory\)"):
        server.endpoint().complete([CHATS[0]])
    assert len(server.requests) == 6


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
@pytest.mark.parametrize("is_json", [True, False])
def test_a_refusal_is_final(serve, status, is_json):
    words = f"bad key {KEY}\nor model" + " and so on" * 99
    body = json.dumps({"error": {"message": words}}) if is_json else words
    server = serve(rule=(status, {}, body.encode()))
    with pytest.raises(UsageError, match=f"HTTP {status} bad key .*or model.*MANAGER_API_KEY") as caught:
        server.endpoint(env_prefix="MANAGER").complete([CHATS[0]])
    assert KEY not in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert len(server.requests) == 1


def test_a_failure_cancels_what_has_not_started(serve, cache):
    server, chats = serve(echo, echo, echo, (401, {}, b"no")), [user(str(i)) for i in range(100)]
    with pytest.raises(UsageError, match="HTTP 401 no"):
        server.endpoint(parallel=1, cache=cache).complete(chats)
    assert stored(cache)[:3] == ["0", "1", "2"] and len(server.requests) < 20, "the rest was cancelled"
    assert len(stored(cache)) == len(server.requests) - 1
    assert server.endpoint(cache=cache).complete(chats) == [str(i) for i in range(100)] and len(server.requests) == 101


def test_a_failure_keeps_the_replies_in_progress(serve, cache):
    failed = threading.Event()

    def rule(chat):
        if chat == CHATS[0]:
            failed.set()
            return 401, {}, b"no"
        failed.wait(5)
        time.sleep(0.2)
        return echo(chat)

    server = serve(rule=rule)
    with pytest.raises(UsageError, match="HTTP 401"):
        server.endpoint(parallel=3, cache=cache).complete(CHATS)
    assert 1 <= len(server.requests) < 6 and len(stored(cache)) == len(server.requests) - 1


def test_many_chats_fail_at_once(serve):
    server = serve(rule=(401, {}, b"no"))
    with pytest.raises(UsageError, match="HTTP 401"):
        server.endpoint().complete([user(str(i)) for i in range(5000)])
    assert len(server.requests) < 500


def test_ctrl_c_keeps_the_replies_and_sends_nothing_more(serve, cache):
    def rule(chat):
        if len(server.requests) == 20:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if len(server.requests) >= 20:
            time.sleep(0.2)  # time for the main thread to notice, however busy the machine is
        return echo(chat)

    server = serve(rule=rule)
    with pytest.raises(KeyboardInterrupt):
        server.endpoint(cache=cache).complete([user(str(i)) for i in range(1000)])
    assert 12 <= len(stored(cache)) <= len(server.requests) < 1000
    num_requests = len(server.requests)
    time.sleep(0.1)
    assert len(server.requests) == num_requests


# --- cache ---

def test_no_reply_is_paid_for_twice(serve, cache):
    server = serve()
    endpoint = server.endpoint(cache=cache)
    assert endpoint.complete([CHATS[0], CHATS[1], CHATS[0]]) == [TEXTS[0], TEXTS[1], TEXTS[0]]
    assert len(server.requests) == 2 and sorted(stored(cache)) == TEXTS[:2]
    assert server.endpoint(key="another", cache=cache).complete(CHATS[:2]) == TEXTS[:2]
    assert len(server.requests) == 2 and KEY not in cache.read_text()
    assert endpoint.complete(CHATS[:1], 99) == TEXTS[:1] and len(server.requests) == 3, "other limits, other replies"
    other = Client(server.url, "judge-2", cache=cache)
    assert other.complete(CHATS[:1]) == TEXTS[:1] and len(server.requests) == 4
    assert len(stored(cache)) == 4
    without = server.endpoint()
    assert [without.complete(CHATS[:1]) for _ in range(2)] == [TEXTS[:1]] * 2 and len(server.requests) == 5


def test_a_torn_line_is_asked_again(serve, cache):
    server = serve()
    server.endpoint(cache=cache).complete(CHATS[:2])
    whole = cache.read_bytes()
    for torn in (whole[:-1], whole[:-20], whole[:70], b"\xff\xfe{" + whole):
        cache.write_bytes(torn)
        assert server.endpoint(cache=cache).complete(CHATS[:2]) == TEXTS[:2]
        assert set(whole.split(b"\n")) <= {*cache.read_bytes().split(b"\n"), b""}, "whole lines stay"
        num_requests = len(server.requests)
        assert server.endpoint(cache=cache).complete(CHATS[:2]) == TEXTS[:2]
        assert len(server.requests) == num_requests


def test_a_line_of_something_else_is_no_reply(serve, cache):
    cache.parent.mkdir()
    cache.write_text('[1]\n{"key": 3}\n{"key": [2], "reply": 3}\n{"reply": "x"}\nnull\n\n')
    assert serve().endpoint(cache=cache).complete(CHATS[:1]) == TEXTS[:1]


def test_a_reply_is_on_the_disk_before_the_next_comes(serve, cache):
    seen = []

    def second(chat):
        deadline = time.monotonic() + 5
        while not cache.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(stored(cache))
        return echo(chat)

    serve(echo, second).endpoint(parallel=1, cache=cache).complete(CHATS[:2])
    assert seen == [TEXTS[:1]]


def test_a_cache_that_cannot_be_used(serve, tmp_path):
    server = serve()
    (tmp_path / "file").write_text("")
    (tmp_path / "replies.jsonl").mkdir()
    for path in (tmp_path / "file" / "replies.jsonl", tmp_path / "replies.jsonl"):
        with pytest.raises(UsageError, match="the cache .*replies.jsonl cannot be used"):
            server.endpoint(cache=path)
    endpoint = server.endpoint(parallel=1, cache=tmp_path / "new" / "replies.jsonl")
    (tmp_path / "new").rmdir()
    with pytest.raises(UsageError, match="new.* cannot be written"):
        endpoint.complete([user(str(i)) for i in range(100)])
    assert len(server.requests) < 20


# --- keys and addresses ---

def test_the_key_shows_nowhere(serve, cache, capfd, caplog):
    caplog.set_level(logging.INFO)
    server = serve((500, {}, KEY.encode()))
    endpoint = server.endpoint(cache=cache)
    assert endpoint.complete(CHATS[:1]) == TEXTS[:1]
    assert KEY not in repr(endpoint) + cache.read_text() + caplog.text + "".join(capfd.readouterr())


def test_without_a_key_none_is_sent(serve, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "sk-private")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer sk-private")
    server = serve()
    monkeypatch.setenv("JUDGE_URL", server.url)
    monkeypatch.setenv("JUDGE_MODEL", "small")
    monkeypatch.setenv("JUDGE_API_KEY", "")
    assert Client.from_environment().complete(CHATS[:1]) == TEXTS[:1]
    monkeypatch.setenv("JUDGE_API_KEY", "own\n")
    assert Client.from_environment().complete(CHATS[:1]) == TEXTS[:1]
    first, second = server.requests
    assert "Authorization" not in first["headers"] and "sk-private" not in str(server.requests)
    assert second["headers"]["Authorization"] == "Bearer own"


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_redirect_to_another_server_gets_no_key(serve, status):
    other = serve()
    server = serve(rule=(status, {"Location": f"{other.url}/x"}, b""))
    if status == 302:  # becomes a GET, which the other server refuses
        with pytest.raises(UsageError, match="HTTP 404"):
            server.endpoint().complete(CHATS[:1])
    else:
        assert server.endpoint().complete(CHATS[:1]) == TEXTS[:1]
    assert len(other.requests) == 1 and KEY not in str(other.requests)


@pytest.mark.parametrize("url", [
    "file:///etc/passwd", "localhost:8000", "http://", "http://a b", "", "http://a:port/v1",
    "http://ann:p/ss@host/v1", "http://ann:pass@host/v1", "http://host/v1?key=v3cret"])
def test_a_malformed_address_is_not_shown(url):
    with pytest.raises(UsageError, match="^check JUDGE_URL, .* must look like http://localhost:8000/v1") as caught:
        Client(url, "judge-1")
    assert not any(word in str(caught.value) for word in ("ann", "passwd", "v3cret"))


@pytest.mark.parametrize("key", ["two\nlines-of-secret", "sécret-€"])
def test_a_key_that_no_header_holds(key):
    with pytest.raises(UsageError, match="check JUDGE_URL, JUDGE_MODEL and JUDGE_API_KEY.*printable ASCII") as caught:
        Client("http://localhost/v1", "judge-1", key)
    assert "secret" not in str(caught.value) and "€" not in str(caught.value)


def test_the_environment(serve, monkeypatch):
    for name in ("JUDGE_URL", "JUDGE_MODEL", "JUDGE_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_KEY", "MANAGER_URL"):
        monkeypatch.delenv(name, raising=False)

    def found(**options):
        endpoint = Client.from_environment(**options)
        return endpoint.url, endpoint.name, endpoint.key

    with pytest.raises(UsageError, match=r"JUDGE_URL \(or OPENAI_BASE_URL\) and JUDGE_MODEL, and JUDGE_API_KEY"):
        found()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://one/v1")
    with pytest.raises(UsageError, match="JUDGE_MODEL"):
        found()
    monkeypatch.setenv("JUDGE_MODEL", "small")
    serve()  # skips the rest where the client is not installed
    assert found() == ("http://one/v1", "small", "")
    monkeypatch.setenv("OPENAI_API_KEY", "general\n")
    monkeypatch.setenv("JUDGE_URL", "http://two/v1")
    assert found(timeout=3) == ("http://two/v1", "small", "general")
    monkeypatch.setenv("JUDGE_API_KEY", "")
    assert found()[2] == ""
    monkeypatch.setenv("JUDGE_API_KEY", "own")
    assert found()[2] == "own"
    with pytest.raises(UsageError, match=r"set MANAGER_URL .* MANAGER_MODEL"):
        found(env_prefix="MANAGER")


def test_without_the_client_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match="^a hosted model needs the openai package: pip install openai$"):
        Client("http://localhost:8000/v1", "judge-1")


def test_a_hosted_model_as_a_policy(serve, cache):
    server = serve(rule=lambda chat: "" if chat == CHATS[1] else f"é {echo(chat)}")
    policy = server.endpoint(cache=cache)
    prompts = [policy.encode(chat) for chat in CHATS[:2]]
    assert policy.name == "judge-1" and all(isinstance(token, int) for prompt in prompts for token in prompt)
    with policy.using("manager") as named:
        groups = named.sample(prompts, 1, 99, temperature=1.0)
    (first,), (second,) = groups
    assert (first.text, first.finished) == ("é question 0", True) and (second.text, second.finished) == ("", False)
    assert list(first.ids) == list(first.logps) == []
    assert {(request["temperature"], request["max_tokens"]) for request in server.requests} == {(0, 99)}
    assert policy.sample([]) == []
