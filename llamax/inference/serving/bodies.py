"""The bodies of requests: OpenAI's chat and text completions, and those of TGI.

A field that would change the answer in a way that llamax does not have is refused by name, unless
it has its neutral value; those that change nothing are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

Stop = Annotated[str, Field(max_length=1000)]
Stops = Annotated[list[Stop], Field(max_length=16)]
Ids = Annotated[list[int], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]

# Fields that change no answer.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention", "prediction", "return_timings"),
}
# Fields that llamax does not have, and the values with which they change no answer.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "typical_p": (1,),
    "min_p": (0,),
    "watermark": (False,),
    "grammar": (),
    "truncate": (),
    "adapter_id": (),
    "decoder_input_details": (False,),
    "top_n_tokens": (0,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
# What to send in fields of several forms, where pydantic would name the first form alone.
FORMS = {
    "prompt": "send a text or a list of texts, or ids or a list of them; no list may be empty",
    "stop": "send a text or up to 16, of at most 1000 characters each",
}


class BodyError(Exception):
    """A body that is refused; ``field`` is the name of the field concerned, or empty."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Body(BaseModel):
    """What bodies have in common."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    @model_validator(mode="after")
    def _no_other_fields(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None or value in NEUTRAL.get(name, ()):
                continue
            known = "is not supported" if name in NEUTRAL else "is not a field of this request"
            raise BodyError(f"{name} {known}; leave it out", name)
        return self


class OpenAIBody(Body):
    """What bodies of OpenAI's requests have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1000)] | None = None
    seed: int | None = None
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None


class ChatBody(OpenAIBody):
    """``/v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionBody(OpenAIBody):
    """``/v1/completions``."""

    prompt: str | Ids | Prompts | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class Parameters(Body):
    """``parameters`` of TGI's requests."""

    max_new_tokens: Count | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    do_sample: StrictBool | None = None
    seed: int | None = None
    stop: Stops | None = None
    stop_sequences: Stops | None = None
    return_full_text: StrictBool | None = None
    details: StrictBool | None = None


class GenerateBody(Body):
    """``/generate`` and the forms of it that SageMaker and the Hub's client send."""

    inputs: str
    parameters: Parameters = Parameters()
    stream: StrictBool | None = None
    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_parameters(cls, body: Any) -> Any:
        if isinstance(body, Mapping) and body.get("parameters", ...) is None:
            return {key: value for key, value in body.items() if key != "parameters"}
        return body


def parse(kind: type[Body], body: object) -> Any:
    """A body of a kind; raises BodyError with one line for the first thing that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = _field(first["loc"])
        raise BodyError(f"{field}: {FORMS.get(field, first['msg'])}", field) from None


def _field(location: Sequence[str | int]) -> str:
    """The name of a field in the body; pydantic adds the kinds that were tried."""
    name, *inside = location or ("",)
    deeper = [part for part in inside[:1] if isinstance(part, int) or name == "parameters"]
    return ".".join(map(str, (name, *deeper)))
