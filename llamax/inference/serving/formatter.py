"""From the messages or the text of a request to the ids of a prompt, for one served model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from llamax.data.chat.encode import Encoder
from llamax.data.chat.templates import Span
from llamax.inference.engine import LoadedModel, begin_id, chat_template
from llamax.inference.prompts import PromptFormat, check_encodable, question_of
from llamax.runtime.errors import ConfigError, DataError

ROLES = {"developer": "system"}  # OpenAI's newer name
KNOWN = ("system", "user", "assistant", "tool", "function")  # beside those of the template


class PromptIds(NamedTuple):
    """A prompt, and the tokens that end its answer."""

    ids: list[int]
    stop_ids: set[int]


class Formatter:
    """Formats requests for one model, in the main thread: a timer bounds the template's time.

    ``template``: that of conversations; by default that of training, else the folder's chat
    template.  Raises DataError for one that cannot be used.
    """

    def __init__(self, loaded: LoadedModel, template: str = "") -> None:
        self.tokenizer, begin = loaded.tokenizer, begin_id(loaded, None)
        self._begin, self._ends = begin, loaded.ends
        self._encoder = Encoder(loaded.tokenizer, bos=begin is not None)
        self._chat: PromptFormat | None = None
        if template or loaded.prompt or (template := chat_template(loaded)):
            self._chat = PromptFormat(self.tokenizer, begin, template, record=loaded.prompt)

    def text(self, text: str) -> PromptIds:
        """The ids of a text; names of special tokens in it are these tokens, as for TGI and vLLM.

        Raises DataError for a text that has no tokens.
        """
        if not text:
            if self._begin is None:
                raise DataError("the prompt is empty, and the model has no BOS token to begin with")
            return PromptIds([self._begin], self._ends)
        check_encodable(text)
        (tokens,) = self._encoder.encode([[Span(text, False)]], prompts=True)
        return PromptIds([int(i) for i in tokens.ids], self._ends)

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> PromptIds:
        """The ids of a conversation up to the next answer.

        Names of special tokens inside messages are text.  Raises ConfigError if the model has no
        template, and DataError for messages that it cannot format.
        """
        if self._chat is None:
            raise ConfigError(
                "the model has no chat template; send a text, or start the server with `template`"
            )
        roles = {*ROLES, *KNOWN, *self._chat.template.texts}
        turns = [_turn(number, message, roles) for number, message in enumerate(messages)]
        if turns[-1]["role"] == "assistant":
            raise DataError("the last message is the assistant's; end with one that it answers")
        row = {"messages": turns} if self._chat.chat else _question(turns)
        prompt = self._chat.prompt(row, "messages")
        return PromptIds(prompt.ids, {*self._ends, *self._chat.stop_ids})


def _turn(number: int, message: Mapping[str, Any], roles: Collection[str]) -> dict[str, Any]:
    """A message with its content as one text.

    The role must be one of ``roles``: templates write it without a look at special tokens in it.
    Other keys may be null or empty, as in answers that a client sends back.
    """
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"messages[{number}] has no role; give user, assistant or system")
    if role not in roles:
        raise DataError(f"messages[{number}] has an unknown role; give user, assistant or system")
    if isinstance(content, list):
        for part in content:
            is_text = isinstance(part, Mapping) and part.get("type") == "text"
            if not (is_text and isinstance(part.get("text"), str)):
                raise DataError(f"messages[{number}] has a part that is no text; send texts alone")
        content = "".join(part["text"] for part in content)
    known = ("role", "content", "name")
    if strange := [key for key, value in message.items() if key not in known and value]:
        raise DataError(f"messages[{number}]: {strange[0]} is not supported; leave it out")
    if not isinstance(content, str):
        raise DataError(f"messages[{number}] has no text as its content; give one")
    check_encodable(content)
    return {"role": ROLES.get(role, role), "content": content}


def _question(turns: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The row of a template that holds one question."""
    if (row := question_of(turns)) is None:
        raise DataError(
            "the model's template holds one question and not a conversation; send one message of "
            "the user, and at most one of the system before it"
        )
    return row
