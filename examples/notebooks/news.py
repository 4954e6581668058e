# %% [markdown]
# # Summarise news with QLoRA, then serve it
#
# Llama 3 8B in 4 bits, cut over the GPUs of a machine; the rows are those of
# daekeun-ml/naver-news-summarization-ko. For a trial take ten rows: `limit=10`.
# %%
import llamax

BASE = "meta-llama/Meta-Llama-3-8B"
ROWS = "hf://datasets/daekeun-ml/naver-news-summarization-ko"
TEST = "test.jsonl"  # rows that the model has not seen
RECIPE = "news-llama3-8b-qlora"
RANKS = 8  # GPUs
CHANGES = {}  # settings on top of the recipe's, such as {"run.epochs": 1}
TOKENS = 200  # of a summary
# %%
SYSTEM = "Summarise the article in one sentence."
FIELDS = {"instruction": "document", "answer": "summary"}
llamax.prepare(
    ROWS, "data", template="human-assistant", system=SYSTEM, fields=FIELDS, tokenizer=BASE
)
# %%
run = llamax.train(
    RECIPE,
    CHANGES,
    ranks=RANKS,
    data={"path": "data"},
    checkpoint={"init_from": BASE},
    run={"folder": "run"},
)
print(run.loss, run.validation_loss)
# %%
scores = llamax.evaluate(
    "run",
    test_file=TEST,
    template="human-assistant",
    system=SYSTEM,
    fields=FIELDS,
    limit=10,
    max_new_tokens=TOKENS,
)
print(scores)
# %% [markdown]
# Merged, `llamax serve merged` answers as TGI and OpenAI's interface do.
# %%
print(llamax.merge("run", "merged"))
