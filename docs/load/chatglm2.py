# %% [markdown]
# # ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4-9B
#
# One format for five releases: the same tensor names, the same block, other sizes and bases. ChatGLM2-6B and CodeGeeX2
# are `.bin` files; ChatGLM3-6B and everything since is safetensors and loads as it is.

# %%
from docs import loading
from glm.family.text_chatglm2 import CHATGLM2
from glm.family.text_chatglm3 import CHATGLM3
from glm.family.text_glm4 import GLM4

loading.files("chatglm2")

# %% [markdown]
# ## Memory
#
# Weights as published and in two other forms, the cache in bfloat16, and the smallest card that holds weights, cache
# and what a forward pass needs. `glm info RELEASE --context TOKENS` says it for one release and this machine.

# %%
loading.memory("chatglm2")

# %% [markdown]
# ## Convert
#
# The files are `.bin`: programs for a stack machine, which this package opens in a process of its own and nowhere else.
# Convert them once; afterwards the folder loads like any other.
#
# ```
# glm convert zai-org/chatglm2-6b chatglm2-6b
# ```

# %%
loading.converted("chatglm2-int4")

# %% [markdown]
# GLM-4-9B was published in this format and again in that of the transformers library. Either can be turned into the
# other, `glm convert SRC DST --names hf` and back with `--names chatglm`:

# %%
loading.converted("glm4-9b-chatglm_format", names="hf")

# %% [markdown]
# ## Prompt
#
# ChatGLM2-6B and CodeGeeX2 number rounds from 1, with `[gMASK] sop` in front of everything:

# %%
loading.prompt(CHATGLM2)

# %% [markdown]
# ChatGLM3-6B has a token for each role, and GLM-4-9B writes the line break elsewhere:

# %%
loading.prompt(CHATGLM3)

# %%
loading.prompt(GLM4)

# %% [markdown]
# ```
# glm chat zai-org/chatglm3-6b
# ```

# %% [markdown]
# ## Verify

# %%
loading.verified("chatglm3-base")

# %%
loading.verified("glm4-9b-chatglm_format")
