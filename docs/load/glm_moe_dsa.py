# %% [markdown]
# # GLM-5
#
# Experts, latent attention, and an indexer that chooses which tokens are attended to.

# %%
from docs import loading
from glm.family.text_glm4_moe import GLM4_MOE

loading.files("glm_moe_dsa")

# %% [markdown]
# ## Memory
#
# Weights as published and in two other forms, the cache in bfloat16, and the smallest card that holds weights, cache
# and what a forward pass needs. `glm info RELEASE --context TOKENS` says it for one release and this machine.

# %%
loading.memory("glm_moe_dsa")

# %% [markdown]
# ## Prompt
#
# The chat template in the folder says how to prompt; this is the form for folders without. What the model thinks, and
# which tools it calls, is told apart while it answers.

# %%
loading.prompt(GLM4_MOE)

# %% [markdown]
# ```
# torchrun --nproc-per-node 16 -m glm chat zai-org/GLM-5
# ```

# %% [markdown]
# ## Verify

# %%
loading.verified("hf_glm_moe_dsa-base")
