"""A model behind ``llamax serve``, with adapters of it, and requests of clients."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import openai
import torch
import transformers
from peft import LoraConfig, get_peft_model

from support.instruction import llama2_tokenizer
from support.models import DECIDED
from support.served import Server

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
