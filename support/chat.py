"""A model's chat template: which messages it can render, and the token with which it ends a reply."""
import logging
from datetime import datetime
from itertools import product

from data import UsageError, is_tiny

DATE = datetime(2024, 7, 26)  # for templates that write today's date: prompts must not change from day to day
OPTIONS = {"date_string": DATE.strftime("%d %b %Y"), "strftime_now": DATE.strftime,  # Llama's name, that of others
           "enable_thinking": False}  # Qwen3
SYSTEM, USER, REPLY = "Be brief.", "Hello there.", "Good morning."


class ChatTemplate:
    """
    Renders chats with a tokenizer's template. Where the template drops or refuses the system message, its text becomes
    the head of the user's message; where it reads content parts only, it gets content parts. UsageError if a message
    does not arrive in the prompt either way. The tiny model's template drops the system message on purpose.
    """

    def __init__(self, tokenizer, name: str):
        self.tokenizer, self.merges_system, self.uses_parts = tokenizer, False, False
        if not is_tiny(name):
            self._find_format(name)
        self.end_of_turn = self._find_end_of_turn()  # a token id, or None if the template writes no special token

    def render(self, messages: list[dict], **options):
        """Token ids of a chat, or its text with tokenize=False."""
        if self.merges_system and messages[0]["role"] == "system":
            system, user, *others = messages
            messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]
        if self.uses_parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        return self.tokenizer.apply_chat_template(messages, return_dict=False, **OPTIONS, **options)

    def _find_format(self, name):
        """Set `merges_system` and `uses_parts`: the first combination with which all words arrive in the prompt."""
        reason = "it drops the user's message"
        for self.merges_system, self.uses_parts in product((False, True), repeat=2):
            try:
                text = self.render([message("system", SYSTEM), message("user", USER)], tokenize=False)
            except Exception as error:  # whatever a template raises; some refuse system messages
                reason = " ".join(str(error).split())[:200]
                continue
            if SYSTEM in text and USER in text:
                break
        else:
            raise UsageError(f"model {name}: its chat template fails ({reason}); choose a model whose template "
                             "accepts text messages")
        if self.merges_system:
            logging.warning("model %s: its chat template has no place for the system message; the instructions are "
                            "put at the head of the user's message", name)

    def _find_end_of_turn(self):
        """The special token after an assistant's reply. A base model's EOS token can be another one."""
        try:
            text = self.render([message("user", USER), message("assistant", REPLY)], tokenize=False)
        except Exception:  # the template cannot render replies
            return None
        _, reply, after = text.rpartition(REPLY)
        ids = self.tokenizer.encode(after.lstrip(), add_special_tokens=False) if reply else []
        return ids[0] if ids and ids[0] in self.tokenizer.added_tokens_decoder else None


def message(role, content):
    return {"role": role, "content": content}
