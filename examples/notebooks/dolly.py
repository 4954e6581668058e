# %% [markdown]
# # All weights of Llama 2 7B, tuned on Dolly
#
# On one trn1.32xlarge: tensor 8 x data 4 with ZeRO-1 and sequence parallelism, three epochs of
# 15,011 questions and answers. Run `neuron_parallel_compile` once before, as the recipe says.
#
# Accept the model's terms on its page on the Hub, and log in: `hf auth login`.
# %%
import llamax

BASE = "meta-llama/Llama-2-7b-hf"
ROWS = "hf://datasets/databricks/databricks-dolly-15k"
RECIPE = "dolly-llama2-7b"
RANKS = 32  # NeuronCores
CHANGES = {}  # settings on top of the recipe's, such as {"run.epochs": 1}
TOKENS = 256  # of an answer
# %% [markdown]
# Rows become samples of 2048 tokens in the template of Dolly; each ends with the EOS token.
# %%
llamax.prepare(ROWS, "data", template="dolly", tokenizer=BASE, validation=0.02)
# %% [markdown]
# Train. The same cell goes on with a run that was interrupted.
# %%
run = llamax.train(
    RECIPE,
    CHANGES,
    ranks=RANKS,
    data={"path": "data"},
    checkpoint={"init_from": BASE},
    run={"folder": "run"},
)
print(run.step, run.loss, run.validation_loss)
# %% [markdown]
# Ask it, without a context and with one.
# %%
model = llamax.load("run")
print(model.generate("When was the tower built?", template="dolly", max_new_tokens=TOKENS))
print(
    model.generate(
        "When was the tower built?",
        template="dolly",
        context="The tower was built in 1887.",
        max_new_tokens=TOKENS,
    )
)
# %% [markdown]
# A Hugging Face folder, and what would go up to the Hub. Without `dry_run` it does.
# %%
llamax.consolidate("run", "run/hub")
print(llamax.push("run/hub", "someone/llama2-dolly", dry_run=True).card)
