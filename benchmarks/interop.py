"""Which programs read an exported folder, and continue prompts with the tokens of llamax?

Each client is installed at a pinned version into an environment of its own below ``--work``, with
torch from the environment of this program, and continues the prompts greedily.  A client without a
wheel for this machine is reported as not installed.  ``make interop`` runs it; it is not in CI.

    python benchmarks/interop.py                 a tiny model, trained here
    python benchmarks/interop.py --model demo/hub
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

PROMPTS = ("def __init__(self", "import os", "class Error(Exception", "return")
NEW = 24


class Client(NamedTuple):
    """A program that reads the folder; ``code`` prints the ids of each answer as JSON."""

    requirements: tuple[str, ...]
    code: str


TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
for ids in prompts:
    out = model.generate(torch.tensor([ids]), max_new_tokens=new, min_new_tokens=new,
                         do_sample=False, eos_token_id=None)
    answers.append(out[0, len(ids):].tolist())
"""
CTRANSLATE2 = """
import ctranslate2, transformers
from ctranslate2.converters import TransformersConverter
TransformersConverter(folder).convert(work + "/ct2", force=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = ctranslate2.Generator(work + "/ct2", compute_type="float32")
for ids in prompts:
    words = tokenizer.convert_ids_to_tokens(ids)
    (found,) = model.generate_batch([words], max_length=new, min_length=new, sampling_topk=1,
                                    include_prompt_in_result=False, end_token=[])
    answers.append(found.sequences_ids[0])
"""
LITGPT = """
import shutil, torch
from pathlib import Path
from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
source = json.loads(Path(folder, "config.json").read_text())
shutil.copytree(folder, work + "/lit", dirs_exist_ok=True)
heads, width = source["num_attention_heads"], source["hidden_size"]
config = Config(
    name="Llama-2-7b-hf", hf_config={}, block_size=source["max_position_embeddings"],
    vocab_size=source["vocab_size"], padded_vocab_size=source["vocab_size"],
    n_layer=source["num_hidden_layers"], n_head=heads, n_embd=width, head_size=width // heads,
    n_query_groups=source["num_key_value_heads"], rotary_percentage=1.0, parallel_residual=False,
    bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    intermediate_size=source["intermediate_size"], norm_eps=source["rms_norm_eps"],
    rope_base=int(source["rope_theta"]))
import litgpt.scripts.convert_hf_checkpoint as convert
convert.Config.from_name = classmethod(lambda cls, name, **more: config)
convert_hf_checkpoint(Path(work, "lit"), model_name="Llama-2-7b-hf")
model = GPT(config)
model.load_state_dict(torch.load(work + "/lit/lit_model.pth", mmap=True))
model.eval()
for ids in prompts:
    out = list(ids)
    for _ in range(new):
        out.append(int(model(torch.tensor([out]))[0, -1].argmax()))
    answers.append(out[len(ids):])
"""
MLX = """
import mlx.core as mx
from mlx_lm.utils import load_model
from pathlib import Path
model, _ = load_model(Path(folder))
for ids in prompts:
    out = list(ids)
    for _ in range(new):
        out.append(int(mx.argmax(model(mx.array([out]))[0, -1]).item()))
    answers.append(out[len(ids):])
"""
ONNX = """
import runpy
import onnxruntime_genai as og
sys.argv = ["builder", "-i", folder, "-o", work + "/onnx", "-p", "fp32", "-e", "cpu",
            "-c", work + "/cache"]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
model = og.Model(work + "/onnx")
for ids in prompts:
    options = og.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=len(ids) + new,
                               min_length=len(ids) + new)
    generator = og.Generator(model, options)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    answers.append([int(each) for each in generator.get_sequence(0)[len(ids):]])
"""
LLAMA_CPP = """
from pathlib import Path
from peers.llama_cpp import convert, completions, server_of
convert(Path(folder), Path(work, "f32.gguf"), "f32")
server = server_of(Path(work, "f32.gguf"), slots=1, length=256, threads=1, cache="f32")
answers = [completions(server.listening_address, ids, new) for ids in prompts]
"""
CLIENTS = {
    "transformers 4": Client(("transformers==4.57.6",), TRANSFORMERS),
    "transformers 5": Client(("transformers==5.24.0",), TRANSFORMERS),
    "ctranslate2": Client(("ctranslate2==4.8.5", "transformers==4.57.6"), CTRANSLATE2),
    "litgpt": Client(("litgpt==0.5.13", "transformers==4.57.6"), LITGPT),
    "mlx-lm": Client(("mlx-lm==0.32.2", "mlx[cpu]==0.32.4"), MLX),
    "onnxruntime-genai": Client(
        ("onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0", "transformers==5.24.0"),
        ONNX,
    ),
    "llama.cpp": Client(("gguf==0.17.1", "xllamacpp==2026.10.11549"), LLAMA_CPP),
}
FRAME = """
import json, sys
folder, work, prompts, new = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
sys.path.append(sys.argv[5])
answers = []
{code}
print("ANSWERS", json.dumps(answers))
"""


def tiny_model(work: Path) -> Path:
    """A trained and exported model of 0.2 M parameters, with a tokenizer of 512 pieces."""
    hub = work / "hub"
    if (hub / "config.json").exists():
        return hub
    text = work / "text"
    text.mkdir(parents=True, exist_ok=True)
    (text / "argparse.txt").write_text(Path(argparse.__file__).read_text())
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    program = [sys.executable, "-m", "llamax"]
    settings = [f"--model.{key}={value}" for key, value in sizes.items()]
    settings += ["--data.path=data", "--run.folder=run", "--run.steps=60"]
    settings += ["--data.sequence_length=64", "--data.global_batch=8", "--data.micro_batch=4"]
    settings += ["--optim.warmup_steps=5", "--run.validate_every=0", "--checkpoint.every=0"]
    settings += ["--parallel.tensor=1"]
    for command in (
        ["prepare", "text", "--train-tokenizer", "512", "--out", "data"],
        ["train", "--config", "demo", *settings],
        ["consolidate", "run", "--out", "hub"],
    ):
        subprocess.run([*program, *command], cwd=work, check=True, stdout=subprocess.DEVNULL)
    return hub


def environment(client: Client, folder: Path) -> Path | None:
    """The Python of a client's own environment; None where a package has no wheel."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists() and done.read_text() == "\n".join(client.requirements):
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    beside = folder / sysconfig.get_path("purelib", vars={"base": "."})
    shared = [path for path in sys.path if path.endswith("-packages")]
    (beside / "torch.pth").write_text("\n".join(shared) + "\n")
    pin = folder / "torch.txt"
    pin.write_text(f"torch=={_torch()}\n")
    command = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
    install = [*command, "--constraint", pin, *client.requirements]
    found = subprocess.run(install, capture_output=True, text=True, check=False)
    if found.returncode:
        print(found.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    done.write_text("\n".join(client.requirements))
    return python


def _torch() -> str:
    from importlib.metadata import version

    return version("torch")


def answers(python: Path, client: Client, hub: Path, work: Path, ids: list[list[int]]) -> str:
    """The line of a client in the table, after its name."""
    work.mkdir(parents=True, exist_ok=True)
    command = [python, "-c", FRAME.format(code=client.code), hub.resolve(), work.resolve()]
    given = [json.dumps(ids), str(NEW), str(Path(__file__).parent)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    return lines[0][8:] if lines else f"failed: {done.stderr.strip().splitlines()[-1][:100]}"


def main() -> int:
    """Print the table; 1 if a client that is installed differs or fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="exported folder (default: a tiny one)")
    parser.add_argument("--work", type=Path, default=Path("build/interop"), help="%(default)s")
    parser.add_argument("--only", default="", help="clients with this in their name")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    hub = options.model or tiny_model(options.work)
    ids, wanted = ours(hub)
    total = sum(map(len, wanted))
    print(f"{'client':20} {'versions':48} equal tokens of {total}")
    wrong = 0
    for name, client in CLIENTS.items():
        if options.only not in name:
            continue
        folder = options.work / name.replace(" ", "-")
        python = environment(client, folder)
        found = answers(python, client, hub, folder / "files", ids) if python else "not installed"
        shown = found
        if found.startswith("["):
            theirs = json.loads(found)
            equal = sum(
                a == b
                for x, y in zip(wanted, theirs, strict=True)
                for a, b in zip(x, y, strict=True)
            )
            shown = str(equal)
            wrong += equal != total
        elif python:
            wrong += 1
        print(f"{name:20} {' '.join(client.requirements):48} {shown}", flush=True)
    return 1 if wrong else 0


def ours(hub: Path) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of the prompts, and those with which llamax continues them greedily."""
    import torch

    from llamax.inference.engine import open_model
    from llamax.inference.sampling import Sampling, generate_tokens
    from llamax.parallel.collectives import Solo

    loaded = open_model(hub)
    model = loaded.build(Solo("tp"), torch.device("cpu"), "float32")
    ids = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
    steps = generate_tokens(
        model,
        ids,
        max_new_tokens=NEW,
        sampling=Sampling(temperature=0.0),
        stop_ids=(),
        vocab_size=loaded.tokenizer.vocab_size,
    )
    columns = [list(map(int, step)) for step in steps]
    return ids, [list(row) for row in zip(*columns, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
