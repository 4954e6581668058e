# %% [markdown]
# # Pretrain a Llama from scratch
#
# Text to tokens, a run, its loss curve. For four trn1.32xlarge on EKS see `launch/PRETRAIN.md`;
# this is the same run on one machine.
# %%
import llamax

TEXT = "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample"
TOKENIZER = "meta-llama/Llama-2-7b-hf"
RECIPE = "llama2-7b"
RANKS = 32  # NeuronCores
CHANGES = {}  # settings on top of the recipe's, such as {"run.steps": 100}
# %%
llamax.prepare(TEXT, "data", tokenizer=TOKENIZER, validation=0.01)
# %%
run = llamax.train(RECIPE, CHANGES, ranks=RANKS, data={"path": "data"}, run={"folder": "run"})
# %% [markdown]
# `pandas.DataFrame(run.metrics).plot(x="step", y="loss")` draws the curve.
# %%
for record in run.metrics[-3:]:
    print(record["step"], record["loss"], record["tokens_per_s"])
print(llamax.load("run").generate("The", max_new_tokens=20))
