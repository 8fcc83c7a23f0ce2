# %% [markdown]
# # GLM-4-0414 and GLM-Z1
#
# Safetensors that load as they are. Each sublayer has a second norm behind it; Z1 thinks before it answers.

# %%
from docs import loading
from glm.family.text_glm4_0414 import GLM4_0414, GLM_Z1

loading.files("glm4_0414")

# %% [markdown]
# ## Memory
#
# Weights as published and in two other forms, the cache in bfloat16, and the smallest card that holds weights, cache
# and what a forward pass needs. `glm info RELEASE --context TOKENS` says it for one release and this machine.

# %%
loading.memory("glm4_0414")

# %% [markdown]
# ## Prompt
#
# The chat template in the folder says how to prompt; this is the form for folders without. GLM-Z1 is made to begin by
# thinking:

# %%
loading.prompt(GLM4_0414)

# %%
loading.prompt(GLM_Z1)

# %% [markdown]
# ```
# glm chat zai-org/GLM-4-9B-0414
# torchrun --nproc-per-node 2 -m glm chat zai-org/GLM-4-32B-0414
# ```

# %% [markdown]
# ## Verify

# %%
loading.verified("hf_glm4-base")
