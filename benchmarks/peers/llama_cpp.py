"""llama.cpp beside llamax: an exported folder as a GGUF file, and llama.cpp's server over it.

    python benchmarks/peers/llama_cpp.py convert hub model.gguf --type f32
    python benchmarks/peers/llama_cpp.py serve model.gguf --slots 16 --length 256

Runs in an environment with ``gguf`` and ``xllamacpp`` (MIT; llama.cpp prebuilt, with its server).
The vocabulary of the file is the decimal numbers of the ids, so that the text of an answer names
its ids whatever the folder's tokenizer is.  The server prints its address and process, and runs
until stdin closes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="write a GGUF file")
    command.add_argument("hub", type=Path, help="exported folder")
    command.add_argument("out", type=Path, help="file to write")
    command.add_argument("--type", choices=("f32", "bf16", "q8_0"), default="f32")
    command = commands.add_parser("serve", help="serve a GGUF file until stdin closes")
    command.add_argument("file", type=Path, help="GGUF file")
    command.add_argument("--slots", type=int, default=16, help="requests at once")
    command.add_argument("--length", type=int, default=256, help="tokens of a request")
    command.add_argument("--threads", type=int, default=2, help="threads that compute")
    command.add_argument("--cache", choices=("f32", "f16"), default="f32")
    command.add_argument("--program", type=Path, help="llama-server, in place of xllamacpp's")
    options = parser.parse_args()
    if options.command == "convert":
        convert(options.hub, options.out, options.type)
    else:
        serve(options)


def convert(hub: Path, out: Path, kind: str) -> None:
    """Write the weights of a Llama as llama.cpp's own converter does; matrices as ``kind``."""
    import gguf

    config = json.loads((hub / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    vocab, width = config["vocab_size"], config["hidden_size"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    head_dim = config.get("head_dim") or width // heads["q"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(vocab)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[kind]
    )
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"\u2581{number}" for number in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    matrix = gguf.GGMLQuantizationType[kind.upper()]
    for path in sorted(hub.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            weight = tensor.float()
            above, _, leaf = name.rpartition(".")
            for part in "qk":
                if above.endswith(f"self_attn.{part}_proj"):
                    weight = interleave(weight, heads[part])
            data = weight.numpy()
            if data.ndim == 2 and matrix is not gguf.GGMLQuantizationType.F32:
                data = gguf.quantize(np.ascontiguousarray(data), matrix)
                writer.add_tensor(rename(above, leaf), data, raw_dtype=matrix)
            else:
                writer.add_tensor(rename(above, leaf), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k in the order of a rotary embedding of neighbours, not of halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def rename(above: str, leaf: str) -> str:
    """The name of a tensor in a GGUF file."""
    layer = ""
    if above.startswith("model.layers."):
        _, _, number, above = above.split(".", 3)
        layer = f"blk.{number}."
    return f"{layer}{NAMES[above]}.{leaf}"


def serve(options: argparse.Namespace) -> None:
    if options.program:
        run(options)
        return
    server = server_of(options.file, options.slots, options.length, options.threads, options.cache)
    print(f"listening {server.listening_address} {os.getpid()}", flush=True)
    sys.stdin.read()


def server_of(file: Path, slots: int, length: int, threads: int, cache: str) -> Any:
    """xllamacpp's server over a GGUF file; ``cache``: type of keys and values."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.n_ctx = slots, context(slots, length)
    params.cont_batching, params.kv_unified, params.cache_prompt = True, False, False
    params.cache_ram_mib, params.fit_params = 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    params.cache_type_k = params.cache_type_v = kind
    params.hostnames, params.port = ["127.0.0.1"], 0
    return xllamacpp.Server(params)


def context(slots: int, length: int) -> int:
    """The tokens of all slots; llama.cpp rounds the length of each up so."""
    return slots * -(-length // 256) * 256


def completions(url: str, prompt: list[int], new: int) -> list[int]:
    """The ids with which a server continues a prompt greedily."""
    body = {"prompt": prompt, "n_predict": new, "temperature": 0, "cache_prompt": False}
    body |= {"ignore_eos": True, "samplers": ["top_k"], "top_k": 1}
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), head)
    with urllib.request.urlopen(request) as reply:
        answer = json.load(reply)
    assert answer["tokens_predicted"] == new
    return list(map(int, answer["content"].split()))


def run(options: argparse.Namespace) -> None:
    """Run a llama-server that was built from source."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    size = context(options.slots, options.length)
    settings = {"-m": options.file, "-c": size, "-np": options.slots, "-t": options.threads}
    settings |= {"-tb": options.threads, "-ctk": options.cache, "-ctv": options.cache}
    settings |= {"--host": "127.0.0.1", "--port": port, "--cache-ram": 0, "-fit": "off"}
    command = [options.program, *(str(word) for pair in settings.items() for word in pair)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None and not healthy(url):
        time.sleep(0.2)
    if server.poll() is None:
        print(f"listening {url} {server.pid}", flush=True)
        sys.stdin.read()
    server.terminate()
    server.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health"):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
