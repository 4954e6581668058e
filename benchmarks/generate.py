"""Speed of decoding: tokens/s of llamax, in 8 bits too, and of transformers' ``generate``.

    python benchmarks/generate.py --threads 2

The 57 M Llama (hidden 512, 8 layers, 8 heads, 4 key/value heads, feed-forward 1408, vocabulary
32000), random weights, the same in all; they take turns and the medians are compared.  Both in
float32 must make the same tokens.  The bound is the rate at which a sum reads memory, over the
bytes of all weights but the embedding's.  The first token of each prompt, and so the prefill, is
timed apart.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import transformers

from llamax import ops
from llamax.config.model import ModelConfig
from llamax.inference.sampling import Sampling, generate_tokens, join_steps
from llamax.model import int8
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
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    options = parser.parse_args()
    model = SMALL if options.smallest else LARGE
    torch.set_num_threads(options.threads)
    mine = Llama(model).init(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.to_hub("float32")))
    copy_weights(mine, theirs)
    small = copy.deepcopy(mine)
    int8.quantize(small)
    read = int8.num_bytes(mine) - mine.model.embed_tokens.weight.nbytes
    sampling = Sampling(options.temperature, top_p=options.top_p)
    greedy = sampling.temperature == 0
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    how = {} if greedy else how

    for batch in options.batches:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 32000, (batch, options.prompt_tokens), generator=generator)
        prompts, new = ids.tolist(), options.new_tokens

        def llamax(model: Llama, new: int, prompts: Tokens = prompts) -> Tokens:
            steps = generate_tokens(model, prompts, max_new_tokens=new, sampling=sampling)
            return join_steps(steps)

        def fused(new: int) -> Tokens:
            with mock.patch.dict(ops.TABLE, attention_cached=ops.TABLE["attention_cached"][1:]):
                return llamax(mine, new)

        def hub(new: int, ids: torch.Tensor = ids) -> Tokens:
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

        same = llamax(mine, new) == hub(new)
        assert same or not greedy, "the two made different tokens"
        runs: dict[str, Callable[[int], object]] = {
            "llamax": partial(llamax, mine),
            "transformers": hub,
            "llamax int8": partial(llamax, small),
            "llamax, torch's fused attention": fused,
        }
        clock = CLOCKS[options.clock]
        first: dict[str, list[float]] = {name: [] for name in runs}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        reading = []
        for _ in range(options.rounds):
            for name, run in runs.items():
                first[name].append(timed(partial(run, 1), clock))
                whole = timed(partial(run, new), clock)
                seconds[name].append(max(whole - first[name][-1], 1e-9))
            reading.append(timed(PROBE.sum, clock))
        made = batch * (new - 1)
        rate = {name: made / statistics.median(took) for name, took in seconds.items()}
        bound = batch * PROBE.nbytes / statistics.median(reading) / read
        begun = {name: statistics.median(took) for name, took in first.items()}
        for name in runs:
            pairs = zip(seconds["transformers"], seconds[name], strict=True)
            ratio = statistics.median(other / own for other, own in pairs)
            print(
                f"batch {batch}: {name} {rate[name]:.1f} tokens/s, {ratio:.2f} times "
                f"transformers {transformers.__version__}, {rate[name] / bound:.2f} of the bound "
                f"in float32; the first token {begun['transformers'] / begun[name]:.2f} times "
                f"(medians of {options.rounds} turns)"
            )


def timed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


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
