# %% [markdown]
# # ChatGLM-6B
#
# The first chat model of the family, also as official int4 and int8 files. Version 1.0 had image tokens in front of
# its vocabulary; both versions load.

# %%
from docs import loading
from glm.family.text_chatglm import CHATGLM

loading.files("chatglm")

# %% [markdown]
# ## Memory
#
# Weights as published and in two other forms, the cache in bfloat16, and the smallest card that holds weights, cache
# and what a forward pass needs. `glm info RELEASE --context TOKENS` says it for one release and this machine.

# %%
loading.memory("chatglm")

# %% [markdown]
# ## Convert
#
# The files are `.bin`: programs for a stack machine, which this package opens in a process of its own and nowhere else.
# Convert them once; afterwards the folder loads like any other.
#
# ```
# glm convert zai-org/chatglm-6b chatglm-6b
# ```

# %%
loading.converted("chatglm1-base")

# %%
loading.converted("chatglm1-int4")

# %% [markdown]
# ## Prompt
#
# Rounds are numbered from 0 and written out in Chinese; a first question stands bare. Behind it, the blank to be filled
# and the token that starts what is written.

# %%
loading.prompt(CHATGLM, loading.TALK[:1])

# %%
loading.prompt(CHATGLM)

# %% [markdown]
# ```
# glm chat chatglm-6b
# ```

# %% [markdown]
# ## Verify

# %%
loading.verified("chatglm1-base")

# %%
loading.verified("chatglm1-int4")
