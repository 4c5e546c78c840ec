"""
Language models behind an OpenAI-compatible server, through the `openai` package (optional: pip install openai).

    endpoint = CachedEndpoint(Endpoint.from_environment("MANAGER"), "~/.cache/memory-r1/teacher.jsonl")
    endpoint.complete([[{"role": "user", "content": "Hi"}]])        # ["Hello!"]
"""
import hashlib
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from data import UsageError
from support.distributed import rank0_result
from support.run import append_rows, read_rows
from support.text import normalize_whitespace

MAX_TRIES = 3  # requests for one reply while the server sends something unusable
URL = re.compile(r"(?ai)https?://([\w-]+(\.[\w-]+)*|\[[\da-f:]+\])(:\d{1,5})?(/[^\s?#@]*)?")


class Endpoint:
    """A hosted model with greedy decoding. Errors are one-line UsageErrors that never show the key."""

    def __init__(self, url: str, model: str, key: str = "", env_prefix: str = "JUDGE", timeout: float = 60,
                 max_retries: int = 5, parallel: int = 8):
        self.url, self.model, self.key, self.parallel = url, model, key, parallel
        self.variables = f"{env_prefix}_URL, {env_prefix}_MODEL and {env_prefix}_API_KEY"  # error messages name these
        if not URL.fullmatch(url) or not (key.isascii() and key.isprintable()):
            raise UsageError(f"check {self.variables}: the URL must look like http://localhost:8000/v1, without user, "
                             "password and query; the key must be printable ASCII")
        try:
            import openai
        except ImportError:
            raise UsageError("a hosted model needs the openai package: pip install openai") from None
        self.openai = openai
        self.headers = {"Authorization": f"Bearer {key}" if key else openai.omit}  # never the client's default key
        self.client = openai.OpenAI(
            base_url=url.rstrip("/").removesuffix("/chat/completions"), api_key=key or "none", timeout=timeout,
            max_retries=max_retries, http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._check]}))

    @classmethod
    def from_environment(cls, env_prefix: str = "JUDGE", **options) -> "Endpoint":
        """Read JUDGE_URL (or OPENAI_BASE_URL), JUDGE_MODEL and JUDGE_API_KEY (or OPENAI_API_KEY; empty: no key)."""
        get = os.environ.get
        url, model = get(f"{env_prefix}_URL") or get("OPENAI_BASE_URL"), get(f"{env_prefix}_MODEL")
        if not (url and model):
            raise UsageError(f"no hosted model: set {env_prefix}_URL (or OPENAI_BASE_URL) and {env_prefix}_MODEL, "
                             f"and {env_prefix}_API_KEY (or OPENAI_API_KEY) if the server needs a key")
        key = get(f"{env_prefix}_API_KEY", get("OPENAI_API_KEY", ""))
        return cls(url.strip(), model.strip(), key.strip(), env_prefix, **options)

    def complete(self, chats, max_new_tokens: int = 512, is_usable=bool, on_reply=lambda i, reply: None) -> list[str]:
        """
        Return one reply per chat, in order; "" if it was cut off or empty. A reply that is not `is_usable` is requested
        again. `on_reply(i, reply)` is called for each usable reply as it arrives, in any thread.
        """
        self.failures: list[BaseException] = []  # no request is sent after the first
        limits = {"temperature": 0, "max_tokens": max_new_tokens}  # `_request` removes what the model refuses

        def work(i):
            try:
                reply = self._request(chats[i], limits, is_usable)
                if is_usable(reply):
                    on_reply(i, reply)
                return reply
            except Exception as error:
                self.failures.append(self._explain(error))
                raise self.failures[0] from None

        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                replies = pool.map(work, range(len(chats)))
                return list(tqdm(replies, self.model, len(chats), leave=False, disable=None, delay=3))
            except KeyboardInterrupt as error:
                self.failures.append(error)
                raise

    def _check(self, request):
        if self.failures:  # the client's retries pass here too
            raise self.failures[0]

    def _request(self, messages, limits: dict, is_usable) -> str:
        for _ in range(MAX_TRIES):
            sent = dict(limits)
            try:
                response = self.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, extra_headers=self.headers, **sent)
            except self.openai.BadRequestError as error:
                refused = [name for name in (error.param, *sent) if name in sent and name in str(error.body)]
                if not refused:
                    raise
                limits.pop(refused[0], None)
                continue
            reply, is_cut_off = read_reply(response.http_response.text)
            if is_cut_off or is_usable(reply):  # a greedy reply that was cut off would be cut off again
                break
        return reply

    def _explain(self, error: Exception) -> Exception:
        """A UsageError for an error of the client or the server."""
        if not isinstance(error, self.openai.OpenAIError):
            return error
        words = error.__cause__ or error  # a lost connection has a cause
        if isinstance(error, self.openai.APIStatusError):
            body = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
            words = f"HTTP {error.status_code} {body}"
        words = normalize_whitespace(str(words).replace(self.key or "\0", "***"))[:200]
        return UsageError(f"no reply from {self.url} ({words}): check {self.variables}, then run the command again")


def read_reply(body: str) -> tuple[str, bool]:
    """(text, whether it was cut off): '{"choices": [{"message": {"content": "Hi"}}]}' -> ("Hi", False)"""
    try:
        choice = json.loads(body)["choices"][0]
        text, is_cut_off = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", False  # not a completion
    return "" if is_cut_off or not isinstance(text, str) else text, is_cut_off


class CachedEndpoint:
    """An endpoint whose replies are stored in a JSONL file as they arrive: no reply is paid for twice."""

    def __init__(self, endpoint: Endpoint, path: str | Path):
        self.endpoint, self.model, self.path = endpoint, endpoint.model, Path(path).expanduser()
        self.lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = [row for row in read_rows(self.path) if isinstance(row.get("reply"), str)]
        except OSError as error:
            raise UsageError(f"the cache {self.path} cannot be used: {error.strerror}") from None
        self.replies = {str(row.get("key")): row["reply"] for row in rows}

    def complete(self, chats, max_new_tokens: int = 512, is_usable=bool) -> list[str]:
        """As `Endpoint.complete`; only replies that are missing or not usable are requested."""
        keys = [hashlib.sha256(json.dumps([self.model, max_new_tokens, chat]).encode()).hexdigest() for chat in chats]
        missing = {key: chat for key, chat in zip(keys, chats, strict=True) if not is_usable(self.replies.get(key, ""))}
        new_keys = list(missing)

        def store(i, reply):
            with self.lock:
                self.replies[new_keys[i]] = reply
                append_rows(self.path, [{"key": new_keys[i], "reply": reply}])

        replies = self.endpoint.complete(list(missing.values()), max_new_tokens, is_usable, store)
        found = self.replies | dict(zip(new_keys, replies, strict=True))
        return [found[key] for key in keys]


class EndpointPolicy:
    """A hosted model in place of a `Policy`. Prompt ids are the bytes of the chat; reply ids are unknown."""

    def __init__(self, endpoint: Endpoint | CachedEndpoint):
        self.endpoint, self.name = endpoint, endpoint.model

    def encode(self, messages: list[dict]) -> list[int]:
        return list(json.dumps(messages).encode())

    def using(self, adapter):
        return nullcontext(self)

    def sample(self, prompts, n=1, max_new_tokens=64, temperature=0):
        """One greedy completion per prompt, whatever `n` and `temperature` are. Process 0 sends the requests."""
        chats = [json.loads(bytes(prompt)) for prompt in prompts]
        replies = rank0_result(self.endpoint.complete, chats, max_new_tokens)
        return [[SimpleNamespace(ids=[], logps=[], finished=bool(reply), text=reply)] for reply in replies]
