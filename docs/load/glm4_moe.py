# %% [markdown]
# # GLM-4.5, 4.6 and 4.7
#
# Expert models in safetensors that load as they are. Of all parameters a token meets only those of the experts chosen
# for it; all must be in memory nevertheless.

# %%
from docs import loading
from glm.family.text_glm4_moe import GLM4_MOE

loading.files("glm4_moe")

# %% [markdown]
# ## Memory
#
# Weights as published and in two other forms, the cache in bfloat16, and the smallest card that holds weights, cache
# and what a forward pass needs. `glm info RELEASE --context TOKENS` says it for one release and this machine.

# %%
loading.memory("glm4_moe")

# %% [markdown]
# ## Prompt
#
# The chat template in the folder says how to prompt; this is the form for folders without. What the model thinks, and
# which tools it calls, is told apart while it answers.

# %%
loading.prompt(GLM4_MOE)

# %% [markdown]
# ```
# torchrun --nproc-per-node 8 -m glm chat zai-org/GLM-4.5
# ```
#
# The last block of the files predicts one token further. `glm.NextToken.from_pretrained(folder, model)` loads it as a
# drafter: the same tokens in fewer passes.

# %% [markdown]
# ## Verify

# %%
loading.verified("hf_glm4_moe-air")
