"""A model behind ``llamax serve``, with adapters of it, and requests of clients."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import torch
import transformers
from peft import LoraConfig, get_peft_model

from support.instruction import llama2_tokenizer
from support.models import DECIDED
from support.served import Server, served

TEMPLATE = (
    "{% for message in messages %}{{ bos_token if loop.first else '' }}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ADAPTERS = {"poet": ["q_proj", "v_proj"], "judge": "all-linear"}


def make_served(folder: Path) -> None:
    """hub, a random model with a chat template; poet and judge, adapters of it by peft."""
    tokenizer = llama2_tokenizer(folder)
    transformers.set_seed(0)
    config = transformers.LlamaConfig(**DECIDED.to_hub("float32"))
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hub")
    (folder / "hub" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    (folder / "hub" / "chat_template.jinja").write_text(TEMPLATE)
    for rank, (name, targets) in enumerate(ADAPTERS.items(), 3):
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "hub")
        tuned = get_peft_model(base, LoraConfig(r=rank, lora_alpha=9, target_modules=targets))
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.5)
        tuned.save_pretrained(folder / name)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of the models of ``make_served``, in front of which nothing may go wrong."""
    adapters = [f"--adapter={name}={folder / name}" for name in ADAPTERS]
    with served(folder / "hub", *adapters, "--slots=5", "--max-body=4KiB", "--queue=64") as server:
        yield server
        assert server.process.poll() is None, server.log
        assert "Traceback" not in server.log


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server: Server, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and content of a request as it is, without a client's checks."""
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    status, content = raw.split(b"\r\n\r\n", 1)
    return int(status.split()[1]), content


def metric(server: Server, name: str) -> float:
    with openai.DefaultHttpxClient() as http:
        text = http.get(f"{server.url}/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0
