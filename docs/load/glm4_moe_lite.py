# %% [markdown]
# # GLM-4.7-Flash
#
# Experts and latent attention: the cache holds one latent a token instead of keys and values of every head.

# %%
from docs import loading
from glm.family.text_glm4_moe import GLM4_MOE

loading.files("glm4_moe_lite")

# %% [markdown]
# ## Memory
#
# Weights as published and in two other forms, the cache in bfloat16, and the smallest card that holds weights, cache
# and what a forward pass needs. `glm info RELEASE --context TOKENS` says it for one release and this machine.

# %%
loading.memory("glm4_moe_lite")

# %% [markdown]
# ## Prompt
#
# The chat template in the folder says how to prompt; this is the form for folders without. What the model thinks, and
# which tools it calls, is told apart while it answers.

# %%
loading.prompt(GLM4_MOE)

# %% [markdown]
# ```
# glm chat zai-org/GLM-4.7-Flash
# ```

# %% [markdown]
# ## Verify

# %%
loading.verified("hf_glm4_moe_lite-sensitive")
