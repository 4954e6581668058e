# %% [markdown]
# # A Korean chat model with QLoRA on one GPU
#
# Llama 2 7B in 4 bits with adapters of rank 64, on a card of 24 GB. The rows are a CSV with the
# columns Q and A, such as ChatbotData.csv of songys/Chatbot_data.
# %%
import llamax
from llamax import GenerationSettings

BASE = "meta-llama/Llama-2-7b-hf"
ROWS = "ChatbotData.csv"
RECIPE = "korean-chat-qlora"
CHANGES = {}  # settings on top of the recipe's, such as {"run.epochs": 1}
TOKENS = 100  # of an answer
# %%
llamax.prepare(
    ROWS,
    "data",
    template="usr-bot",
    fields={"instruction": "Q", "answer": "A"},
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
# The base and the tuned model side by side.
# %%
asked = GenerationSettings(max_new_tokens=TOKENS, temperature=0.5, template="usr-bot")
for pair in llamax.compare((BASE, "run"), ["오늘 날씨 어때?"], asked):
    print("base: ", pair.base.text)
    print("tuned:", pair.tuned.text)
# %% [markdown]
# The adapters merged into the base, and what would go up to the Hub.
# %%
llamax.merge("run", "merged")
print(llamax.push("merged", "someone/korean-chat", run="run", dry_run=True).card)
