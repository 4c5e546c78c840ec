"""
Language models behind an OpenAI-compatible server, through the `openai` package (optional: pip install openai).

    endpoint = Endpoint.from_environment("MANAGER", cache="~/.cache/memory-r1/teacher.jsonl")
    endpoint.read_replies([[{"role": "user", "content": "Hi"}]], 512)  # [("Hello!", True)]
"""
import hashlib
import json
import os
import re
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from math import inf
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

from tqdm import tqdm

from data import UsageError
from support.distributed import rank0_result
from support.run import append_rows, read_rows
from support.text import normalize_whitespace

UNFINISHED = ("length", "max_tokens", "model_length", "content_filter", "incomplete")  # finish reasons, again the same
FAILED = ("error", "abort", "aborted", "cancelled", "insufficient_system_resource")  # another request may succeed
TOO_LARGE = re.compile(r"(?i)too (large|big|high|long|many)|at most|maximum|exceed|limit|reduce|<=|between|range|"
                       r"(less|larger|greater|more) than")
CHAT_TOO_LONG = re.compile(r"(?i)prompt|input tokens|messages")  # the limit depends on this chat, others keep theirs
URL = re.compile(r"(?ai)https?://([\w-]+(\.[\w-]+)*|\[[\da-f:]+\])(:\d{1,5})?(/[^\s?#@]*)?")


def words_of(body) -> str:
    """The server's own words in the body of an error, without the "input" with which some repeat the request."""
    if isinstance(body, dict):
        body = next((body[key] for key in ("message", "detail", "error") if body.get(key)), body)
    if isinstance(body, list):
        body = [{key: one[key] for key in ("loc", "msg") if key in one} if isinstance(one, dict) else one
                for one in body]
    return str(body)


class Endpoint:
    """
    A hosted model with greedy decoding, also for use as a `Policy`. Each reply is appended to the file `cache` when it
    arrives, so none is paid for twice. Errors are one-line UsageErrors that never show the key.
    """

    def __init__(self, url: str, model: str, key: str = "", env_prefix: str = "JUDGE", cache: str | Path | None = None,
                 parallel: int = 8, **client_options):
        self.url, self.name, self.key, self.parallel = url, model, key, parallel
        self.variables = f"{env_prefix}_URL, {env_prefix}_MODEL and {env_prefix}_API_KEY"  # error messages name these
        if not URL.fullmatch(url) or not (key.isascii() and key.isprintable()):
            raise UsageError(f"check {self.variables}: the URL must look like http://localhost:8000/v1, without user, "
                             "password and query; the key must be printable ASCII")
        try:
            import openai
        except ImportError:
            raise UsageError("a hosted model needs the openai package: pip install openai") from None
        self.openai = openai
        self.client = openai.OpenAI(base_url=url.rstrip("/").removesuffix("/chat/completions"), api_key=key or "none",
                                    **{"timeout": 60, "max_retries": 5, **client_options})
        self.headers = {"Authorization": f"Bearer {key}" if key else openai.omit}  # never the client's default key
        self.refused: set[str] = set()  # parameters that the model does not accept
        self.limit, self.worked = inf, 0  # max_tokens: more than `limit` was refused; the most that was accepted
        self.cache, self.cache_lock = Path(cache).expanduser() if cache else None, Lock()
        try:
            if cache:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
            rows = read_rows(self.cache) if cache else []
        except OSError as error:
            raise UsageError(f"the cache {self.cache} cannot be used: {error.strerror}") from None
        self.replies = {str(row.get("key")): row["reply"] for row in rows if isinstance(row.get("reply"), str)}

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

    def read_replies(self, chats, max_new_tokens: int) -> list[tuple[str, bool]]:
        """(text, whether it is finished) of each chat. Finished replies are cached. An error cancels unsent chats."""
        keys = [hashlib.sha256(json.dumps([self.name, max_new_tokens, chat]).encode()).hexdigest() for chat in chats]
        missing = {key: chat for key, chat in zip(keys, chats, strict=True) if not self.replies.get(key)}

        def work(key):
            text, is_finished = self.request(missing[key], max_new_tokens)
            if is_finished:
                self.replies[key] = text
                if self.cache:
                    with self.cache_lock:  # else a thread may see half of another's line and end it
                        append_rows(self.cache, [{"key": key, "reply": text}])
            return text, is_finished

        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                found = list(tqdm(pool.map(work, missing), self.name, len(missing), leave=False, disable=None, delay=3))
            except self.openai.APIStatusError as error:
                raise self.usage_error(f"HTTP {error.status_code} {words_of(error.body)}") from None
            except self.openai.OpenAIError as error:
                raise self.usage_error(error.__cause__ or error) from None  # a lost connection has a cause
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error or Ctrl-C at any moment
        new = dict(zip(missing, found, strict=True))
        return [new.get(key) or (self.replies[key], True) for key in keys]

    def request(self, chat, max_new_tokens: int) -> tuple[str, bool]:
        """(text, whether it is finished). A parameter that the model refuses is not sent again; too large a limit is
        halved: for this chat if it is a long one, else for all."""
        sent = {"temperature": 0, "max_tokens": min(max_new_tokens, self.limit)}
        while True:
            sent = {name: value for name, value in sent.items() if name not in self.refused}
            try:
                response = self.client.chat.completions.with_raw_response.create(
                    model=self.name, messages=chat, extra_headers=self.headers, **sent)
                self.worked = max(self.worked, sent.get("max_tokens", 0))
                return self.read_response(response)
            except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
                words = words_of(error.body).lower()
                if "token" in words and TOO_LARGE.search(words) and sent.get("max_tokens", 1) > 1:
                    sent["max_tokens"] //= 2
                    if not CHAT_TOO_LONG.search(words):
                        self.limit = max(self.worked, min(self.limit, sent["max_tokens"]))
                    continue
                refused = {str(error.param)} & {*sent} or {name for name in sent if name in words}
                if not refused:
                    raise
                self.refused |= refused

    def read_response(self, response) -> tuple[str, bool]:
        """(text, whether it is finished) of a response with status 200; UsageError if it holds no completion."""
        try:
            choice = response.parse().choices[0]
            message, reason = choice.message, str(choice.finish_reason).lower()
            text = message.content
            if isinstance(text, list):  # Mistral's: the reasoning is a part of its own
                text = "".join(part["text"] for part in text if part["type"] == "text")
            problem = getattr(choice, "error", None) or getattr(message, "refusal", None)
            reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # the client checks nothing
            raise self.usage_error(f"HTTP 200 {response.text or 'without a body'}") from None
        if reason in UNFINISHED:
            return text if isinstance(text, str) else "", False
        if reason in FAILED:
            raise self.usage_error(f"HTTP 200 {reason}: {words_of(problem or response.text)}")
        if not isinstance(text, str) or (reasoning and not text.strip()):
            raise self.usage_error(f"no content, only reasoning: {reasoning}" if reasoning
                                   else f"HTTP 200 {words_of(problem or response.text)}")
        return text, bool(text.strip())

    def usage_error(self, words) -> UsageError:
        words = normalize_whitespace(str(words).replace(self.key or "\0", "***"))[:200]
        return UsageError(f"no reply from {self.url} ({words}): check {self.variables}, then run the command again")

    # The methods of a Policy. A prompt id is four bytes of the chat, about a token; reply ids are unknown.

    def encode(self, messages: list[dict]) -> list[int]:
        chat = json.dumps(messages).encode()
        return array("I", chat + b" " * (-len(chat) % 4)).tolist()

    def using(self, adapter):
        return nullcontext(self)

    def sample(self, prompts, n=1, max_new_tokens=64, temperature=0):
        """One greedy completion per prompt, whatever `n` and `temperature` are. Rank 0 sends the requests."""
        chats = [json.loads(array("I", prompt).tobytes()) for prompt in prompts]
        replies = rank0_result(self.read_replies, chats, max_new_tokens)
        return [[SimpleNamespace(ids=[], logps=[], finished=is_finished, text=text)] for text, is_finished in replies]
