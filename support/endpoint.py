"""
Language models behind an OpenAI-compatible server, through the `openai` package (optional: pip install openai).

    endpoint = Endpoint.from_environment("MANAGER", cache="~/.cache/memory-r1/teacher.jsonl")
    endpoint.complete([[{"role": "user", "content": "Hi"}]])        # ["Hello!"]
"""
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from data import UsageError
from support.distributed import rank0_result
from support.run import append_rows, read_rows
from support.text import normalize_whitespace

URL = re.compile(r"(?ai)https?://([\w-]+(\.[\w-]+)*|\[[\da-f:]+\])(:\d{1,5})?(/[^\s?#@]*)?")


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
        self.cache = Path(cache).expanduser() if cache else None
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

    def complete(self, chats, max_new_tokens: int = 512) -> list[str]:
        """One reply per chat, in order; "" if it was cut off or empty. An error cancels unsent chats."""
        keys = [hashlib.sha256(json.dumps([self.name, max_new_tokens, chat]).encode()).hexdigest() for chat in chats]
        missing = {key: chat for key, chat in zip(keys, chats, strict=True) if not self.replies.get(key)}

        def work(key):
            if reply := self.request(missing[key], max_new_tokens):
                self.replies[key] = reply
                if self.cache:
                    append_rows(self.cache, [{"key": key, "reply": reply}])

        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                list(tqdm(pool.map(work, missing), self.name, len(missing), leave=False, disable=None, delay=3))
            except self.openai.OpenAIError as error:
                raise self.usage_error(error) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error or Ctrl-C at any moment
        return [self.replies.get(key, "") for key in keys]

    def request(self, chat, max_new_tokens: int) -> str:
        """A reply, "" if it was cut off or is no completion. A parameter that the model refuses is not sent again."""
        limits = {"temperature": 0, "max_tokens": max_new_tokens}
        sent = {name: value for name, value in limits.items() if name not in self.refused}
        try:
            choice = self.client.chat.completions.create(model=self.name, messages=chat, extra_headers=self.headers,
                                                         **sent).choices[0]
            text = choice.message.content
            return text if isinstance(text, str) and choice.finish_reason != "length" else ""
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return ""  # the client does not check what the server sends
        except self.openai.BadRequestError as error:
            refused = {name for name in sent if name in str(error.body)}
            if not refused:
                raise
            self.refused |= refused
        return self.request(chat, max_new_tokens)

    def usage_error(self, error) -> UsageError:
        words = error.__cause__ or error  # a lost connection has a cause
        if isinstance(error, self.openai.APIStatusError):
            body = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
            words = f"HTTP {error.status_code} {body}"
        words = normalize_whitespace(str(words).replace(self.key or "\0", "***"))[:200]
        return UsageError(f"no reply from {self.url} ({words}): check {self.variables}, then run the command again")

    # The methods of a Policy. Prompt ids are the bytes of the chat; reply ids are unknown.

    def encode(self, messages: list[dict]) -> list[int]:
        return list(json.dumps(messages).encode())

    def using(self, adapter):
        return nullcontext(self)

    def sample(self, prompts, n=1, max_new_tokens=64, temperature=0):
        """One greedy completion per prompt, whatever `n` and `temperature` are. Rank 0 sends the requests."""
        replies = rank0_result(self.complete, [json.loads(bytes(prompt)) for prompt in prompts], max_new_tokens)
        return [[SimpleNamespace(ids=[], logps=[], finished=bool(reply), text=reply)] for reply in replies]
