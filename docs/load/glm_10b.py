# %% [markdown]
# # The GLMs of 2021
#
# English and Chinese models that fill blanks of three kinds, `[MASK]`, `[sMASK]` and `[gMASK]`; they were not
# trained to converse. What they say depends on learned tables of positions, so that no text may be longer than
# the tables.

# %%
from docs import loading
from glm.family.text_glm_10b import GLM_BERT, GLM_CHINESE, GLM_GPT2

loading.files("glm_10b")

# %% [markdown]
# ## Memory
#
# Weights as published and in two other forms, the cache in bfloat16, and the smallest card that holds weights, cache
# and what a forward pass needs. `glm info RELEASE --context TOKENS` says it for one release and this machine.

# %%
loading.memory("glm_10b")

# %% [markdown]
# ## Convert
#
# The files are `.bin`: programs for a stack machine, which this package opens in a process of its own and nowhere else.
# Convert them once; afterwards the folder loads like any other.
#
# ```
# glm convert THUDM/glm-10b glm-10b
# ```
#
# The same command merges the parts of the training run's own checkpoint (`mp_rank_0k_model_states.pt`).

# %%
loading.converted("glm10b-base")

# %% [markdown]
# ## Prompt
#
# A text with a blank is closed, and a start token asks for what belongs in the blank. Three vocabularies, one form:

# %%
loading.fill(GLM_GPT2, "Blank infilling trains a model to write [MASK] that were cut out.")

# %%
loading.fill(GLM_BERT, "Blank infilling trains a model to write [MASK] that were cut out.")

# %%
loading.fill(GLM_CHINESE, "语言模型[MASK]。")

# %% [markdown]
# ```
# glm infill --source glm-10b "Blank infilling trains a model to write [MASK] that were cut out."
# ```

# %% [markdown]
# ## Verify

# %%
loading.verified("glm10b-base")
