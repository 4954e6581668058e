"""Templates: from the fields of a row to the text that a model is trained on.

A template is Jinja text.  It reads either the fields of a row or ``messages``, the same as a list
of {"role", "content"}; ``{% generation %}`` marks what the model is to answer::

    ### Instruction            spans:  "### Instruction\\nWho?\\n\\n### Answer\\n"    prompt
    Who?                               "Nobody."                               answer

    ### Answer
    {% generation %}Nobody.{% endgeneration %}

Templates without the tag are rendered twice: a conversation up to an answer (with
``add_generation_prompt``) must be the beginning of the conversation with the answer; the rest is
the answer.

The name of a special token inside a field is text and must not become the token.  So a noncharacter
(``SHIELD``) is put into it before rendering, and removed after the template's own tokens were
found.  The space before an answer belongs to the answer: tokens do not end there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from llamax.data.chat.jinja_sandbox import START, STOP, Program, Sandbox
from llamax.runtime.errors import DataError

SHIELD, ANSWER = "\ufdd2", "\ufdd3"  # inside special tokens; in place of an answer
ANSWER_END = "\ufdd4"  # after a message to be continued

BUILT_IN = {
    "dolly": (
        "### Instruction\n{{ instruction }}\n\n"
        "{% if context %}### Context\n{{ context }}\n\n{% endif %}"
        "### Answer\n{% generation %}{{ answer }}{% endgeneration %}"
    ),
    "alpaca": (
        "Below is an instruction that describes a task"
        "{% if context %}, paired with an input that provides further context{% endif %}"
        ". Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ instruction }}\n\n"
        "{% if context %}### Input:\n{{ context }}\n\n{% endif %}"
        "### Response:\n{% generation %}{{ answer }}{% endgeneration %}"
    ),
    "usr-bot": (
        "{% for message in messages %}"
        "{% if not loop.first %}{{ '\n' }}{% endif %}"
        "{% if message.role == 'assistant' %}"
        "<bot>{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}"
        "{% elif message.role == 'user' %}<usr> {{ message.content }}"
        "{% else %}{{ message.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}<bot>{% endif %}"
    ),
    "human-assistant": (
        "{% for message in messages %}"
        "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
        "{% if message.role == 'assistant' %}"
        "Assistant:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}"
        "{% elif message.role == 'user' %}Human: {{ message.content }}"
        "{% else %}{{ message.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n' }}Assistant:{% endif %}"
    ),
    "llama2-chat": (
        "{% set start = 0 %}"
        "{% if messages[0].role == 'system' %}{% set start = 1 %}{% endif %}"
        "{% for message in messages[start:] %}"
        "{% if message.role == 'assistant' %}"
        "{% generation %} {{ message.content | trim }} {{ eos_token }}{% endgeneration %}"
        "{% else %}"
        "{{ bos_token }}[INST] "
        "{% if loop.first and start %}"
        "{{ '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' }}"
        "{% endif %}"
        "{{ message.content | trim }} [/INST]"
        "{% endif %}"
        "{% endfor %}"
    ),
    "llama3-chat": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content | trim }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ message.content | trim }}<|eot_id|>{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}"
    ),
}
NEEDS = {"llama3-chat": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}

# Variables of a template that no column of a row sets.
RESERVED = frozenset(
    ("messages", "instruction", "context", "answer", "system", "add_generation_prompt")
    + tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
    + tuple(Sandbox().globals)
)

# Names of a message's reasoning.  As in transformers, a template finds it under the first two.
REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]  # "role", "content" (text, or absent), and what else a template reads


class Span(NamedTuple):
    """A piece of a sample's text, and whether it is part of an answer."""

    text: str
    answer: bool


class Sample(NamedTuple):
    """The fields of a row, whatever its columns are called; a prompt has no answer.

    ``variables``: further variables of the template, such as ``tools``; ``unread``: the names of
    the other columns that hold something.
    """

    messages: Sequence[Message]
    instruction: str = ""
    context: str = ""
    answer: str = ""
    system: str = ""
    variables: Mapping[str, Any] = MappingProxyType({})
    unread: Sequence[str] = ()


def make_sample(instruction: str, context: str = "", answer: str = "", system: str = "") -> Sample:
    """A question and its answer as a sample, with the same as messages."""
    question = f"{instruction}\n\n{context}" if context else instruction
    messages = [{"role": "user", "content": question}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    if answer:
        messages.append({"role": "assistant", "content": answer})
    return Sample(messages, instruction, context, answer, system)


class Template:
    """Renders samples.

    ``specials`` are the names of the tokenizer's special tokens; ``tokens`` are the texts of its
    named tokens, such as bos_token and pad_token, which a template reads by these names.
    ``columns``: the variables of the template that columns of a row may set.  Raises DataError if
    the source is not a template, or needs tokens that the tokenizer lacks.
    """

    def __init__(
        self,
        name: str,
        source: str,
        specials: Sequence[str] = (),
        tokens: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name, self.source, self.specials = name, source, tuple(specials)
        # Most texts hold no first character of a special token, and fewer still its first two.
        self._firsts = {special[:1] for special in self.specials}
        self._pairs = {special[:2] for special in self.specials}
        if missing := [token for token in NEEDS.get(name, ()) if token not in self.specials]:
            raise DataError(
                f"template {name} needs the token {missing[0]}, which the tokenizer lacks; use the "
                "tokenizer of a Llama 3 model, or another template"
            )
        self._program = Program(source, f"template {name}")
        fixed = {"bos_token": "", "eos_token": "", "tools": None, "documents": None}
        self._fixed = {**fixed, **tokens}
        self.columns = self._program.variables - RESERVED - tokens.keys()
        self.chat = "messages" in self._program.variables
        if not self.chat and "answer" not in self._program.variables:
            other = ", ".join(sorted(self.columns))
            hint = f" (it reads {other}; name columns by `fields`, as answer=NAME)" if other else ""
            raise DataError(
                f"template {name}: uses nothing of a row: it reads neither messages nor answer"
                f"{hint}; write one that does"
            )

    def reads(self, field: str) -> bool:
        """Whether the template puts a field into the text."""
        return self.chat or field in self._program.variables

    @property
    def variables(self) -> frozenset[str]:
        """The names of the variables that the template reads."""
        return self._program.variables

    def token(self, name: str) -> str:
        """The text of a named token, such as eos_token; empty if the tokenizer has none."""
        return str(self._fixed.get(name) or "")

    @property
    def words(self) -> frozenset[str]:
        """The keys that the template reads of objects, and its constant texts."""
        words = self._program.keys | self._program.texts
        return words | {*REASONING} if words & {*REASONING[:2]} else words

    @property
    def texts(self) -> frozenset[str]:
        """The constant texts of the template, such as the roles that it knows."""
        return self._program.texts

    def text(self, row: Sample) -> str:
        """The text of a whole sample, with marks; DataError if the template fails."""
        return self._render(row)

    def spans(self, row: Sample) -> list[Span]:
        """The text of a whole sample; DataError if the template yields no answer."""
        whole = self._render(row)
        every = _between_marks(whole) if self._program.marks else self._by_prompts(row, whole)
        found = [span for span in every if span.text]
        if not any(span.answer and not span.text.isspace() for span in found):
            raise DataError(
                f"template {self.name}: yields no answer for this row; correct the template"
            )
        return found

    def prompt(self, row: Sample) -> list[Span]:
        """The text of a prompt: that of a sample up to its answer."""
        if self.chat:
            text = self._render(row, prompt=True)
        elif self._program.marks:
            text = self._render(row._replace(answer="")).rpartition(START)[0]
        else:
            text = self._render(row, mark_answer=True).partition(ANSWER)[0]
        return [Span(text.replace(START, "").replace(STOP, ""), False)]

    def conversation(
        self,
        messages: Sequence[Message],
        generation_prompt: bool,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The text of a conversation with the beginning of the next answer, or up to its end.

        Without ``generation_prompt`` it ends where the text of the last message ends, as with
        ``continue_final_message`` of transformers.  ``variables``: further ones of the template,
        such as ``tools``.  Raises DataError if the template fails or drops the last message.
        """
        row = Sample(messages, variables=variables)
        if not generation_prompt and messages:
            last = {**messages[-1], "content": _with_end(messages[-1]["content"])}
            row = row._replace(messages=[*messages[:-1], last])
        text = self._render(row, generation_prompt)
        if not generation_prompt and messages:
            text, end, after = text.rpartition(ANSWER_END)
            if not end:
                raise DataError(
                    f"template {self.name}: leaves out the last message, which is to be "
                    "continued; correct the template"
                )
            if not after.startswith(" "):  # the template trims messages
                text = text.rstrip()
        for mark in (f"{ANSWER_END} ", ANSWER_END, START, STOP, SHIELD):
            text = text.replace(mark, "")
        return text

    def _by_prompts(self, row: Sample, whole: str) -> Iterator[Span]:
        """The spans of a template without marks."""
        if not self.chat:
            before = self._render(row, mark_answer=True).partition(ANSWER)[0]
            cuts = [(before, whole)]
        else:
            cuts = [
                (self._upto(row, i, prompt=True), self._upto(row, i + 1, prompt=False))
                for i, message in enumerate(row.messages)
                if message["role"] == "assistant"
            ]
        at = 0
        for before, after in cuts:
            if not (whole.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"template {self.name}: renders a conversation differently when more turns "
                    "follow, so its answers cannot be found; mark them with {% generation %}"
                )
            yield Span(whole[at : len(before)], False)
            yield Span(whole[len(before) : len(after)], True)
            at = len(after)
        yield Span(whole[at:], False)

    def _upto(self, row: Sample, count: int, prompt: bool) -> str:
        return self._render(row._replace(messages=row.messages[:count]), prompt)

    def _render(self, row: Sample, prompt: bool = False, mark_answer: bool = False) -> str:
        messages = [
            self._shielded_value(_with_reasoning(message)) | {"role": message["role"]}
            for message in (row.messages if self.chat else ())
        ]
        return self._program.render(
            {
                **self._fixed,
                **(self._shielded_value(row.variables) if row.variables else {}),
                "messages": messages,
                "instruction": self.shielded(row.instruction),
                "context": self.shielded(row.context),
                "answer": ANSWER if mark_answer else self.shielded(row.answer),
                "system": self.shielded(row.system),
                "add_generation_prompt": prompt,
            }
        )

    def shielded(self, text: str) -> str:
        """A field with a noncharacter inside the name of each special token.

        Raises DataError for a field that holds one of the marks.
        """
        if not text.isascii():
            for mark in (START, STOP, SHIELD, ANSWER):
                if mark in text:
                    raise DataError(f"a field holds the noncharacter U+{ord(mark):04X}; remove it")
        holds = text.__contains__
        if any(map(holds, self._firsts)) and any(map(holds, self._pairs)):
            for name in self.specials:
                if name in text:
                    text = text.replace(name, name[0] + SHIELD + name[1:])
        return text

    def _shielded_value(self, value: Any) -> Any:
        """A value of a row with all texts in it shielded."""
        if isinstance(value, str):
            return self.shielded(value)
        if isinstance(value, Mapping):
            return {self.shielded(str(k)): self._shielded_value(v) for k, v in value.items()}
        return [self._shielded_value(v) for v in value] if isinstance(value, list) else value


def _with_reasoning(message: Message) -> Message:
    """A message with its reasoning under the names that templates read."""
    values = (message[key] for key in REASONING if message.get(key) is not None)
    reasoning = next(values, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_end(content: Any) -> Any:
    """The content of a message with a mark after its (last) text."""
    if isinstance(content, str):
        return f"{content}{ANSWER_END} "
    parts = list(content or ())
    for i in reversed(range(len(parts))):
        if isinstance(parts[i], Mapping) and isinstance(parts[i].get("text"), str):
            parts[i] = {**parts[i], "text": _with_end(parts[i]["text"])}
            return parts
    raise DataError("the last message has no text that could be continued; give it one")


def unused(name: str, field: str) -> DataError:
    """The error for a parameter that template ``name`` does not use."""
    return DataError(
        f"`{field}`: template {name} reads neither messages nor {field} and would not use it; "
        "leave it out, or use human-assistant or a chat template"
    )


def _between_marks(text: str) -> list[Span]:
    before, *marked = text.split(START)
    found = [Span(before, False)]
    for piece in marked:
        answer, _, rest = piece.partition(STOP)
        found += (Span(answer, True), Span(rest, False))
    return found
