# %% [markdown]
# # GLM-4-9B as transformers has it, and GLM-Edge
#
# Safetensors that load as they are. The mathematics is that of the first GLM-4-9B files; q, k and v lie apart here.

# %%
from docs import loading
from glm.family.text_glm4 import GLM4_HF

loading.files("glm4")

# %% [markdown]
# ## Memory
#
# Weights as published and in two other forms, the cache in bfloat16, and the smallest card that holds weights, cache
# and what a forward pass needs. `glm info RELEASE --context TOKENS` says it for one release and this machine.

# %%
loading.memory("glm4")

# %% [markdown]
# ## Convert
#
# There is nothing to convert. To the names of the first GLM-4-9B files and back: `glm convert SRC DST --names chatglm`.

# %% [markdown]
# ## Prompt
#
# The chat template in the folder says how to prompt, and is rendered in a sandbox; this is the form for folders
# without:

# %%
loading.prompt(GLM4_HF)

# %% [markdown]
# ```
# glm chat zai-org/glm-4-9b-chat-hf
# ```

# %% [markdown]
# ## Verify

# %%
loading.verified("hf_glm-base")
