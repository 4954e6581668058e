"""Speed of decoding: tokens/s of llamax, in 8 bits too, and of transformers' ``generate``.

    python benchmarks/generate.py --threads 2

The 57 M Llama (hidden 512, 8 layers, 8 heads, 4 key/value heads, feed-forward 1408, vocabulary
32000), random weights, the same in all; they take turns and the medians are compared.  Both in
float32 must make the same tokens.  The bound is the rate at which a sum reads memory, over the
bytes of all weights but the embedding's.  The first token of each prompt, and so the prefill, is
timed apart.

``--peers`` adds other packages, in environments of their own below ``--work``, and ``--older`` the
llamax of another checkout; these run in processes of their own and say how many of their tokens are
those of llamax.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import mistral_common
import torch
import transformers
from interop import CLIENTS, environment
from peers.decoders import KINDS, Answer, decoder

from llamax.config.model import ModelConfig
from llamax.inference.sampling import Sampling, generate_tokens, join_steps
from llamax.model import int8
from llamax.model.layout import transpose_weights
from llamax.model.llama import Llama

LARGE = ModelConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=32000,
)
SMALL = dataclasses.replace(LARGE, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Tokens = list[list[int]]
PROBE = torch.ones(1 << 26)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="length of every prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens made per prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the sampled runs")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor seconds, for one thread on a machine that others use too",
    )
    peers = [kind for kind in KINDS if kind != "older llamax"]
    parser.add_argument("--peers", nargs="+", choices=peers, default=[], help="other packages")
    parser.add_argument("--older", type=Path, help="another checkout of llamax")
    parser.add_argument("--work", type=Path, default=Path("build/interop"), help="environments")
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    options = parser.parse_args()
    model = SMALL if options.smallest else LARGE
    torch.set_num_threads(options.threads)
    mine = Llama(model).init(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.to_hub("float32")))
    copy_weights(mine, theirs)
    small = copy.deepcopy(mine)
    int8.quantize(small)
    transpose_weights(mine)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        others = {}
        if options.peers or options.older:
            write_folder(theirs, hub := Path(scratch, "hub"))
        for kind in [*options.peers, *(["older llamax"] if options.older else [])]:
            python, (package, _) = Path(sys.executable), KINDS[kind]
            if package in CLIENTS:
                python = environment(CLIENTS[package], options.work / package)
                assert python is not None, f"{package} cannot be installed"
            path = options.older if package == "llamax" else None
            started = decoder(python, kind, hub, options.threads, path)
            others[kind] = stack.enter_context(started)
        for batch in options.batches:
            compare(options, batch, mine, small, theirs, others)


def compare(
    options: argparse.Namespace,
    batch: int,
    mine: Llama,
    small: Llama,
    theirs: transformers.LlamaForCausalLM,
    others: dict[str, Callable[[Tokens, int], Answer]],
) -> None:
    """Print the speed of all for prompts of one batch."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, options.prompt_tokens)
    ids = torch.randint(3, mine.config.vocab_size, shape, generator=generator)
    prompts, new, clock = ids.tolist(), options.new_tokens, CLOCKS[options.clock]
    sampling = Sampling(options.temperature, top_p=options.top_p)
    greedy = sampling.temperature == 0
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    how = {} if greedy else how

    def llamax(model: Llama, new: int) -> Tokens:
        steps = generate_tokens(model, prompts, max_new_tokens=new, sampling=sampling)
        return join_steps(steps)

    def hub(new: int) -> Tokens:
        whole = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=not greedy,
            pad_token_id=0,
            **how,
        )
        return whole[:, ids.shape[1] :].tolist()

    def own(run: Callable[[int], Tokens], new: int) -> float:
        start = clock()
        run(new)
        return clock() - start

    def other(answer: Callable[[Tokens, int], Answer], new: int) -> float:
        return answer(prompts, new)[1][options.clock]

    made = llamax(mine, new)
    assert made == hub(new) or not greedy, "the two made different tokens"
    for name, answer in others.items():
        pairs = zip(made, answer(prompts, new)[0], strict=True)
        same = sum(a == b for row in pairs for a, b in zip(*row, strict=True))
        print(f"batch {batch}: {name} makes {same} of {batch * new} tokens of llamax")
    runs: dict[str, Callable[[int], float]] = {
        "llamax": partial(own, partial(llamax, mine)),
        "transformers": partial(own, hub),
        "llamax int8": partial(own, partial(llamax, small)),
        **{name: partial(other, answer) for name, answer in others.items()},
    }
    first: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    reading = []
    for _ in range(options.rounds):
        for name, run in runs.items():
            first[name].append(run(1))
            seconds[name].append(max(run(new) - first[name][-1], 1e-9))
        start = clock()
        PROBE.sum()
        reading.append(clock() - start)
    read = int8.num_bytes(mine) - mine.model.embed_tokens.weight.nbytes
    rate = {name: batch * (new - 1) / statistics.median(took) for name, took in seconds.items()}
    bound = batch * PROBE.nbytes / statistics.median(reading) / read
    print(f"batch {batch}: a sum reads {PROBE.nbytes / statistics.median(reading) / 1e9:.1f} GB/s")
    begun = {name: statistics.median(took) for name, took in first.items()}
    for name in runs:
        pairs = zip(seconds["transformers"], seconds[name], strict=True)
        ratio = statistics.median(other / own for other, own in pairs)
        print(
            f"batch {batch}: {name} {rate[name]:.1f} tokens/s, {ratio:.2f} times "
            f"transformers {transformers.__version__}, {rate[name] / bound:.2f} of the bound "
            f"in float32; the first token {begun['transformers'] / begun[name]:.2f} times "
            f"(medians of {options.rounds} turns)",
            flush=True,
        )


def write_folder(model: transformers.LlamaForCausalLM, hub: Path) -> None:
    """Write a model with a tokenizer; its answers have no end."""
    model.generation_config.eos_token_id = None
    model.save_pretrained(hub)
    path = hub / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    pieces = next(Path(mistral_common.__file__).parent.glob("data/tokenizer.model.v1"))
    shutil.copyfile(pieces, hub / "tokenizer.model")


@torch.no_grad()
def copy_weights(mine: Llama, theirs: transformers.LlamaForCausalLM) -> None:
    weights = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        for part in mine.sharded_parameters().parts(name):
            whole = parameter
            if part.length >= 0:
                whole = parameter.narrow(part.how.dim, part.start, part.length)
            weights[part.name].copy_(whole)


if __name__ == "__main__":
    main()
