"""TGI's interface: ``/generate``, ``/generate_stream``, ``/`` and ``/info``."""

from __future__ import annotations

from typing import Any

from llamax.inference.serving.bodies import GenerateBody, Parameters
from llamax.inference.serving.formatter import PromptIds
from llamax.inference.serving.openai import Events, Reply, Stream
from llamax.inference.serving.scheduler import Step
from llamax.inference.serving.service import Answers, RequestSettings, Served, Service
from llamax.runtime.versions import LLAMAX

NEW_TOKENS = 100  # TGI's default
REASONS = {"eos": "eos_token", "stop": "stop_sequence", "length": "length"}


def info(service: Service) -> dict[str, Any]:
    """What ``/info`` says of the server."""
    scheduler = service.scheduler
    weight = next(scheduler.model.parameters())
    return {
        "model_id": service.name,
        "model_sha": None,
        "model_dtype": str(weight.dtype),
        "model_device_type": weight.device.type,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": scheduler.slots + scheduler.queue,
        "max_best_of": 1,
        "max_stop_sequences": 16,
        "max_input_tokens": scheduler.length - 1,
        "max_total_tokens": scheduler.length,
        "max_batch_total_tokens": scheduler.slots * scheduler.length,
        "max_client_batch_size": 1,
        "router": "llamax",
        "version": LLAMAX,
    }


async def generate(service: Service, body: GenerateBody, stream: bool, listed: bool) -> Reply:
    """The continuation of a text, or its events.

    ``listed``: whether the reply is a list of one, as that of ``/`` and ``/invocations``.
    """
    served = service.model(body.model)
    parameters = body.parameters
    service.check_room(1)
    prompt = served.formatter.text(body.inputs)
    answers = service.answers(served, [prompt], _settings(parameters, stream))
    before = body.inputs if parameters.return_full_text else ""
    if stream:
        return Stream(_events(served, prompt, answers, parameters, before), answers)
    (steps,) = await answers.gather()
    reply: dict[str, Any] = {"generated_text": before + "".join(step.text for step in steps)}
    if parameters.details:
        tokens = [_token(served, step) for step in steps]
        reply["details"] = _details(steps[-1], len(steps), parameters.seed) | {
            "prefill": [],
            "tokens": tokens,
        }
    return [reply] if listed else reply


async def _events(
    served: Served, prompt: PromptIds, answers: Answers, parameters: Parameters, before: str
) -> Events:
    made, text = 0, before
    async for _, step in answers.steps():
        made, text = made + 1, text + step.text
        event: dict[str, Any] = {
            "index": made,
            "token": _token(served, step),
            "generated_text": text if step.ended else None,
            "details": None,
        }
        if step.ended:
            event["details"] = _details(step, made, parameters.seed) | {
                "input_length": len(prompt.ids)
            }
        yield event


def _settings(parameters: Parameters, stream: bool) -> RequestSettings:
    """The settings of an answer; without a sign of sampling the most likely token, as in TGI."""
    drawn = (parameters.temperature, parameters.top_k, parameters.top_p)
    samples = parameters.do_sample or any(value is not None for value in drawn)
    stops = [*(parameters.stop or ()), *(parameters.stop_sequences or ())]
    return RequestSettings(
        parameters.max_new_tokens,
        NEW_TOKENS,
        parameters.temperature if samples else 0.0,
        parameters.top_k,
        parameters.top_p,
        parameters.seed,
        [stop for stop in stops if stop],
        top=0 if stream or parameters.details else None,
    )


def _token(served: Served, step: Step) -> dict[str, Any]:
    token = step.drawn.token
    return {
        "id": token,
        "text": step.text + (served.token_text(token) if step.ended == "eos" else ""),
        "logprob": step.drawn.logprob,
        "special": token in served.special,
    }


def _details(last: Step, made: int, seed: int | None) -> dict[str, Any]:
    return {"finish_reason": REASONS[last.ended], "generated_tokens": made, "seed": seed}
