# %% [markdown]
# # GLM-130B
#
# The training run's files, eight parts of each matrix; the int8 and int4 ones were made of them by the release's own
# script. The originals were handed out on request.

# %%
from docs import loading
from glm.family.text_glm_130b import GLM_130B

loading.files("glm_130b")

# %% [markdown]
# ## Memory
#
# Weights as published and in two other forms, the cache in bfloat16, and the smallest card that holds weights, cache
# and what a forward pass needs. `glm info RELEASE --context TOKENS` says it for one release and this machine.

# %%
loading.memory("glm_130b")

# %% [markdown]
# ## Convert
#
# Parts of one matrix lie in several files, `mp_rank_0k_model_states.pt`. One command merges them, tensor by tensor: it
# never holds more than a few of the largest.
#
# ```
# glm convert glm-130b-sat glm-130b
# ```

# %% [markdown]
# ## Prompt
#
# A text that ends in a blank is not closed; any other is, by `</s>`.

# %%
loading.fill(GLM_130B, "GLM-130B reads [MASK] and English.")

# %% [markdown]
# ```
# torchrun --nproc-per-node 8 -m glm infill --source glm-130b "GLM-130B reads [MASK] and English."
# ```

# %% [markdown]
# ## Verify

# %%
loading.verified("glm130b-base")
