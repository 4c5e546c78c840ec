"""Shared by several tests: policies that follow a rule or sample letters at random, and a local server."""
import json
import os
import signal
import socket
import string
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny_models import save_models, wake_adapter
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from toys import letter_policy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from policy import Completion, Policy
from support.endpoint import Endpoint

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
    torch.set_num_threads(1)
SPECIAL = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = ("{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


class Fake:
    """A policy whose completions are rule(messages) and whose tokens are words. It records its calls."""
    name = "fake"

    def __init__(self, rule=lambda messages: ""):
        self.rule, self.words, self.chats, self.role = rule, {}, {}, "nobody"
        self.calls = []  # (role, number of prompts, options) of each `sample`

    def encode(self, messages):
        words = "\n".join(message["content"] for message in messages).split()
        ids = [self.words.setdefault(word, len(self.words)) for word in words]
        self.chats[tuple(ids)] = messages
        return ids

    @contextmanager
    def using(self, name):
        before, self.role = self.role, name
        try:
            yield self
        finally:
            self.role = before

    def sample(self, prompts, n=1, max_new_tokens=64, temperature=1.0):
        self.calls.append((self.role, len(prompts), (n, max_new_tokens, temperature)))
        texts = [self.rule(self.chats[tuple(prompt)]) for prompt in prompts]
        return [[Completion([0], [0.0], True, text)] * n for text in texts]


@pytest.fixture(scope="module")
def one_thread():
    """For modules with models so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake():
    return Fake


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    letters = [*SPECIAL, *(char for char in string.printable if char not in "\t\r\x0b\x0c")]
    spelled = Tokenizer(models.WordLevel({word: i for i, word in enumerate(letters)}, unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    spelled.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spelled, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
        additional_special_tokens=SPECIAL[3:], chat_template=TEMPLATE)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2, eos_token_id=2, pad_token_id=0))
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    """tiny(b=0.2): a new policy with one adapter, "agent", whose B has this standard deviation."""
    return lambda b=0.2: letter_policy(tiny_folder, b)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """A folder with a subfolder for each model family of tiny_models.CONFIGS."""
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


@pytest.fixture
def load(model_folders):
    """load(kind, adapters): a policy on a random model of this family, with adapters that change something."""
    def load(kind="qwen2", adapters=("manager",), **options):
        torch.set_num_threads(1)  # with models this small, threads only wait for each other
        policy = Policy.load(model_folders / kind, device="cpu", **options)
        for i, name in enumerate(adapters):
            torch.manual_seed(100 + i)
            policy.add_adapter(name, rank=4, alpha=8)
            wake_adapter(policy, name)
        return policy
    return load


class Client(Endpoint):
    """An endpoint with a method for chats in, texts out: "" if a reply was cut off or empty."""

    def complete(self, chats, max_new_tokens=512):
        return [text if is_finished else "" for text, is_finished in self.read_replies(chats, max_new_tokens)]


class Backlog(ThreadingHTTPServer):
    request_queue_size = 64  # with the default of 5, some of 8 concurrent requests would wait for a second


class Server:
    """
    Answers request i with script[i], later requests with `rule`. Both are a text, a (status, headers, body) or a
    function of the messages that returns one of these, or None to drop the connection; if it `sees_body`, a function
    of the whole request.
    """

    def __init__(self, script, rule, key, sees_body):
        self.script, self.rule, self.key, self.requests, self.lock = list(script), rule, key, [], threading.Lock()
        self.num_open, self.most_open, self.sees_body = 0, 0, sees_body

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append({"path": handler.path, "headers": headers_of(handler), **body})
            action = self.script.pop(0) if self.script else self.rule
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        reply = action(body if self.sees_body else body["messages"]) if callable(action) else action
        with self.lock:
            self.num_open -= 1
        if reply is None:
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        status, headers, content = reply if isinstance(reply, tuple) else (200, {}, completion_of(reply))
        handler.send_response(status)
        defaults = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
        for name, value in {**defaults, **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def endpoint(self, **options):
        return Client(self.url, "judge-1", **{"timeout": 5, "key": self.key, **options})


def headers_of(handler):
    return {name.title(): value for name, value in handler.headers.items()}


def completion_of(text, finish_reason="stop"):
    """The body of a chat completion."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


@pytest.fixture
def serve(monkeypatch):
    """serve(*script, rule=...) starts a Server on a free port. Clients repeat a failed request after 10 ms."""
    pytest.importorskip("openai", reason="hosted models need the openai package")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = []

    def start(*script, rule, key="", sees_body=False):
        server = Server(script, rule, key, sees_body)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                try:
                    server.answer(self)
                except OSError:
                    pass  # the client has closed the connection

            def do_GET(self):
                server.requests.append({"path": self.path, "headers": headers_of(self)})
                self.send_error(404)

            def log_message(self, *_):
                pass

        http = Backlog(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(http)
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


@pytest.fixture(autouse=True)
def handle_ctrl_c():
    """Python ignores Ctrl-C in a process that a shell script started in the background. Handle it here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
