# %% [markdown]
# # A Korean chat model with QLoRA on one GPU
#
# Llama 2 7B in 4 bits with adapters of rank 64, on a card of 24 GB. The rows are conversations as
# text, `<usr> ... <bot> ...`. A card without bfloat16: the recipe `korean-chat-qlora-24gb`.
# %%
import llamax
from llamax import GenerationSettings

BASE = "meta-llama/Llama-2-7b-hf"
ROWS = "hf://datasets/heegyu/open-korean-instructions"
RECIPE = "korean-chat-qlora"
CHANGES = {}  # settings on top of the recipe's, such as {"run.epochs": 1}
TOKENS = 100  # of an answer
# %%
llamax.prepare(
    ROWS,
    "data",
    template="usr-bot",
    fields={"messages": "text"},
    tokenizer=BASE,
    split="train[:10%]",
    validation=0.1,
)
# %%
run = llamax.train(
    RECIPE,
    CHANGES,
    data={"path": "data"},
    checkpoint={"init_from": BASE},
    run={"folder": "run"},
)
print(run.loss, run.validation_loss)
# %% [markdown]
# The adapters merged into the base; the base, the merged model and the adapters side by side.
# %%
llamax.merge("run", "merged", dtype="float16")
asked = GenerationSettings(max_new_tokens=TOKENS, temperature=0.5, template="usr-bot")
models = (BASE, "merged", "run")
for found in llamax.compare(models, ["오늘 날씨 어때?"], asked):
    for model, answer in zip(models, found.answers, strict=True):
        print(f"{model}: {answer.text}")
# %% [markdown]
# What would go up to the Hub.
# %%
print(llamax.push("merged", "someone/korean-chat", run="run", dry_run=True).card)
