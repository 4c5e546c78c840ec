"""What the replies of a server mean: no completion, only reasoning, cut off, a parameter refused, too large a limit."""
import json
import re
from functools import partial

import pytest
from conftest import completion_of
from test_endpoint import CHATS, TEXTS, echo, stored

from data import UsageError


@pytest.fixture
def serve(serve):
    """serve(*script, rule=echo) starts a Server."""
    return partial(serve, rule=echo)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "replies.jsonl"


@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
@pytest.mark.parametrize("body, words", [
    (b"<html>Bad gateway", "HTTP 200 <html>Bad gateway"), (b"\xff", "HTTP 200"), (b"{}", "HTTP 200 {}"),
    (b"[1]", "[1]"), (b"[" * 100_000, "HTTP 200 [["), (b"", "HTTP 200 without a body"),
    (completion_of(None), '"content": null'), (completion_of(3), '"content": 3'), (b"null", "HTTP 200 null"),
    (completion_of("Hi").replace(b'"content": "Hi"', b'"content": null, "refusal": "I must not."'), "200 I must not."),
    (b"Hi", "HTTP 200 Hi"), (b'data: {"choices": [{"delta": {"content": "H"}}]}\n\ndata: [DONE]', "HTTP 200 data: "),
    (b'{"object": "chat.completion.chunk", "choices": [{"delta": {"content": "H"}, "finish_reason": null}]}', "chunk"),
    (b'{"choices": [{"message": {"content": "Jon has', "Jon has"), (completion_of([{"type": "image"}])[:-1], "image"),
    (completion_of(["Hi"]), "Hi"), (completion_of([{"type": "text"}]), "text"),
    (b'"choices"', "choices"), (b'{"choices": []}', "choices"),
    (b'{"choices": ["Hi"]}', "Hi"), (b'{"choices": {"0": "H"}}', '"0": "H"'),
    (b'{"error": {"message": "The model is\\noverloaded", "code": 503}}', "overloaded"),
    (b'{"object": "error", "message": "CUDA out of memory", "choices": null}', "CUDA out of memory"),
    (json.dumps({"id": "1" * 300, "choices": [{"finish_reason": "error", "error": {"message": "upstream is down"},
                                               "message": {"content": ""}}]}).encode(), "200 error: upstream is down")])
def test_a_success_without_a_completion_is_an_error_with_its_words(serve, cache, body, words, content_type):
    server = serve((200, {"Content-Type": content_type}, body))
    endpoint = server.endpoint(parallel=1, cache=cache)
    with pytest.raises(UsageError, match=f"^no reply from http://.*{re.escape(words)}.*MODEL") as caught:
        endpoint.complete(CHATS[:2])
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert TEXTS[0] not in (stored(cache) if cache.exists() else [])
    assert endpoint.complete(CHATS[:2]) == TEXTS[:2] and len(server.requests) == 3


@pytest.mark.parametrize("content", [None, "", " \n"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_nothing_but_reasoning_is_an_error(serve, cache, content, field):
    body = json.loads(completion_of(content))
    body["choices"][0]["message"][field] = "Let me see. The label is CORRECT"
    server = serve((200, {}, json.dumps(body).encode()))
    with pytest.raises(UsageError, match="no content, only reasoning: Let me see. The label is CORRECT"):
        server.endpoint(cache=cache).complete([CHATS[0]])
    assert not cache.exists()
    body["choices"][0]["message"]["content"] = "Hello"
    assert serve((200, {}, json.dumps(body).encode())).endpoint().complete([CHATS[0]]) == ["Hello"]


@pytest.mark.parametrize("reason", ["stop", None, "eos", ""])
@pytest.mark.parametrize("content", [
    "Hi.", [{"type": "text", "text": "Hi"}, {"type": "text", "text": "."}],
    [{"type": "thinking", "thinking": [{"type": "text", "text": "Hello?"}]}, {"type": "text", "text": "Hi."}]])
def test_a_reply_in_parts_is_its_text_whatever_names_its_end(serve, cache, reason, content):
    server = serve((200, {}, completion_of(content, reason)))
    assert server.endpoint(cache=cache).complete([CHATS[0]]) == ["Hi."] and stored(cache) == ["Hi."]


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "content_filter", "model_length", "incomplete"])
@pytest.mark.parametrize("content", ["question", None, ""])
def test_a_reply_that_was_cut_off_is_no_reply(serve, cache, reason, content):
    server = serve(*[(200, {}, completion_of(content, reason))] * 2)
    endpoint = server.endpoint(cache=cache)
    assert endpoint.complete([CHATS[0]]) == [""] and not cache.exists()
    [[cut]] = endpoint.sample([endpoint.encode(CHATS[0])])
    assert (cut.text, cut.finished) == (content or "", False), "its text is there to be read, as of a local model"
    assert endpoint.complete([CHATS[0]]) == ["question 0"] and len(server.requests) == 3


@pytest.mark.parametrize("reason", ["abort", "Aborted", "cancelled", "insufficient_system_resource"])
@pytest.mark.parametrize("content", ["question", None, ""])
def test_a_reply_that_the_server_gave_up_is_an_error(serve, cache, reason, content):
    endpoint = serve((200, {}, completion_of(content, reason))).endpoint(cache=cache)
    with pytest.raises(UsageError, match=rf"no reply from .*HTTP 200 {reason.lower()}: "):
        endpoint.complete([CHATS[0]])
    assert not cache.exists() and endpoint.complete([CHATS[0]]) == ["question 0"]


def refusal(name):
    message = f"Unsupported parameter: '{name}' is not supported with this model. Use 'x' instead."
    return 400, {}, json.dumps({"error": {"message": message, "param": name, "type": "invalid"}}).encode()


@pytest.mark.parametrize("names", [["max_tokens"], ["temperature"], ["max_tokens", "temperature"]])
def test_only_the_parameter_that_the_model_refuses_is_left_out(serve, names):
    server = serve(*map(refusal, names))
    assert server.endpoint(parallel=1).complete(CHATS[:3]) == TEXTS[:3]
    assert len(server.requests) == len(names) + 3, "it is refused once for all chats"
    for i, request in enumerate(server.requests):
        assert {"temperature", "max_tokens"} - set(request) == set(names[:i])
        assert request["messages"] == CHATS[max(0, i - len(names))]
    assert server.endpoint().complete([CHATS[0]]) == ["question 0"] and server.requests[-1]["max_tokens"] == 512


def test_a_refused_parameter_stays_left_out(serve):
    server = serve(refusal("max_tokens"))
    endpoint = server.endpoint()
    assert [endpoint.complete([chat]) for chat in CHATS[:2]] == [[text] for text in TEXTS[:2]]
    assert ["max_tokens" in request for request in server.requests] == [True, False, False]


VLLM = ("'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context length is 2048 tokens "
        "and your request has 1800 input tokens (512 > 2048 - 1800).")
PYDANTIC = [{"type": "greater_than", "loc": ["body", "temperature"], "msg": "Input should be greater than 0",
             "input": {"temperature": 0, "max_tokens": 512}}]
TOO_LONG = [{"loc": ["body", "max_tokens"], "msg": "Input should be less than or equal to 128",
             "input": {"temperature": 0, "max_tokens": 512}}]


@pytest.mark.parametrize("status, body, sent", [
    (422, {"error": "Input validation error: `temperature` must be strictly positive"}, (None, 512)),
    (422, {"detail": PYDANTIC}, (None, 512)), (400, {"message": "Temperature: 0 is not allowed"}, (None, 512)),
    (422, {"error": {"message": "must be positive", "param": "temperature"}}, (None, 512)),
    (400, {"error": {"message": "temperature must be 1", "param": ["temperature"]}}, (None, 512)),
    (400, {"error": {"message": "temperature must be 1", "param": {"a": 1}}}, (None, 512)),
    (400, {"object": "error", "message": VLLM, "request": {"temperature": 0}}, (0, 256)),
    (422, {"detail": TOO_LONG}, (0, 256)),
    (400, {"message": "max_tokens: 512 > 128, which is the maximum allowed number of output tokens"}, (0, 256)),
    (400, {"message": "Invalid max_tokens value, the valid range of max_tokens is [1, 384]"}, (0, 256)),
    (400, {"message": "2312 tokens (1800 in the messages, 512 in the completion). Reduce their length"}, (0, 256))])
def test_a_refused_temperature_is_left_out_and_too_large_a_limit_lowered(serve, status, body, sent):
    server = serve((status, {}, json.dumps(body).encode()))
    assert server.endpoint().complete([CHATS[0]]) == ["question 0"] and len(server.requests) == 2
    assert (server.requests[1].get("temperature"), server.requests[1].get("max_tokens")) == sent


def test_a_limit_is_lowered_until_it_fits_or_the_error_shown(serve):
    server = serve(*[(400, {}, json.dumps({"error": {"message": VLLM, "param": "max_tokens"}}).encode())] * 3)
    assert server.endpoint(parallel=1).complete(CHATS[:2]) == TEXTS[:2], "512, 256, 128, 64, and 512 for the next chat"
    assert [request["max_tokens"] for request in server.requests] == [512, 256, 128, 64, 512]
    assert {request["temperature"] for request in server.requests} == {0}
    server = serve(rule=(400, {}, b"the prompt alone exceeds 2048 tokens"))
    with pytest.raises(UsageError, match="HTTP 400 the prompt alone exceeds 2048 tokens"):
        server.endpoint().complete([CHATS[0]], 4)
    assert [request["max_tokens"] for request in server.requests] == [4, 2, 1]


@pytest.mark.parametrize("message", [
    "max_tokens is too large: {}. This model supports at most 100 completion tokens, whereas you provided {}.",
    "max_tokens: {} > 100, which is the maximum allowed number of output tokens for judge-1",
    "`max_tokens` must be less than or equal to `100`", "Invalid max_tokens value, the valid range is [1, 100]"])
def test_a_limit_that_is_too_large_for_the_model_is_lowered_once_for_all_chats(serve, message):
    def answer(body):
        if body["max_tokens"] > 100:
            return 400, {}, json.dumps({"error": {"message": message.replace("{}", str(body["max_tokens"]))}}).encode()
        return echo(body["messages"])

    server = serve(sees_body=True, rule=answer)
    endpoint = server.endpoint(parallel=1)
    assert endpoint.complete(CHATS[:3]) == TEXTS[:3] and endpoint.complete(CHATS[3:], 80) == TEXTS[3:]
    assert [request["max_tokens"] for request in server.requests] == [512, 256, 128, 64, 64, 64, 64, 64, 64]


@pytest.mark.parametrize("long", ["the request exceeds the available context size of 2048 tokens", VLLM])
def test_a_long_chat_does_not_lower_a_limit_that_worked(serve, long):
    server = serve(echo, *[(400, {}, json.dumps({"error": {"message": long}}).encode())] * 4)
    assert server.endpoint(parallel=1).complete(CHATS[:4]) == TEXTS[:4]
    assert [request["max_tokens"] for request in server.requests] == [512, 512, 256, 128, 64, 32, 512, 512]


def test_a_parameter_named_by_plain_text_and_one_that_is_refused_for_good(serve):
    server = serve((400, {}, b"this model has no temperature"))
    assert server.endpoint().complete([CHATS[0]]) == ["question 0"]
    assert "temperature" not in server.requests[1] and server.requests[1]["max_tokens"] == 512
    server = serve(rule=(400, {}, b"no temperature, please"))
    with pytest.raises(UsageError, match="HTTP 400 no temperature, please"):
        server.endpoint().complete([CHATS[0]])
    assert len(server.requests) == 2
