"""A model's chat template: which messages it can render, and the token with which it ends a reply."""
import logging
from datetime import datetime
from itertools import product

from data import UsageError, is_tiny
from support.text import chat_messages, normalize_whitespace

DATE = datetime(2024, 7, 26)  # some templates write today's date: prompts must not change from day to day
OPTIONS = {"date_string": f"{DATE:%d %b %Y}", "enable_thinking": False}  # names that templates of Llama and Qwen3 read
# Other templates call strftime_now, which transformers defines. This macro hides it; a function cannot be passed.
FIXED_DATE = "{% macro strftime_now(format) %}{{ format.replace('%-', '%')" + "".join(
    f".replace('%{code}', '{DATE:%{code}}')" for code in "AaBbdeHIjMmpSYy") + " }}{% endmacro %}{{ '' }}"
SYSTEM, USER, REPLY = "Be brief.", "Hello there.", "Good morning."


class ChatTemplate:
    """
    Renders chats with a tokenizer's template. Where the template drops or refuses the system message, its text becomes
    the head of the user's message; where it reads content parts only, it gets content parts. UsageError if a message
    does not arrive in the prompt either way. The tiny model's template drops the system message on purpose.
    """

    def __init__(self, tokenizer, name: str):
        self.tokenizer, self.merges_system, self.uses_parts = tokenizer, False, False
        try:  # takes the template named "default" if there are several
            self.template = tokenizer.chat_template and tokenizer.get_chat_template()
        except ValueError:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise UsageError(f"model {name}: its tokenizer has the chat templates {names}; name one of them 'default' "
                             "in the model's folder") from None
        if "strftime_now" in (self.template or ""):
            self.template = FIXED_DATE + self.template
        if self.template and not is_tiny(name):
            self._find_format(name)
        self.end_of_turn = self._find_end_of_turn()

    def render(self, messages: list[dict], **options):
        """Token ids of a chat, or its text with tokenize=False."""
        if self.merges_system and messages[0]["role"] == "system":
            system, user, *others = messages
            messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]
        if self.uses_parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, return_dict=False, **OPTIONS, **options)

    def _find_format(self, name):
        """Set `merges_system` and `uses_parts`: the first combination with which all words arrive in the prompt."""
        reason = "it drops the user's message"
        for self.merges_system, self.uses_parts in product((False, True), repeat=2):
            try:
                text = self.render(chat_messages(SYSTEM, USER), tokenize=False, add_generation_prompt=True)
            except Exception as error:  # whatever a template raises; some refuse system messages
                reason = normalize_whitespace(str(error))[:200]
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
        """The special token after an assistant's reply, else the EOS token. A base model's EOS can be another one."""
        chat = [{"role": "user", "content": USER}, {"role": "assistant", "content": REPLY}]
        try:
            text = self.render(chat, tokenize=False)
        except Exception:  # there is no template, or it cannot render replies
            return self.tokenizer.eos_token_id
        _, reply, after = text.rpartition(REPLY)
        ids = self.tokenizer.encode(after.lstrip(), add_special_tokens=False) if reply else []
        special = {*self.tokenizer.added_tokens_decoder} - {self.tokenizer.unk_token_id}
        return ids[0] if ids and ids[0] in special else self.tokenizer.eos_token_id
