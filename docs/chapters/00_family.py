# %% [markdown]
# # The family

# %%
import glm

releases = glm.releases()
print(len(releases))
assert releases
