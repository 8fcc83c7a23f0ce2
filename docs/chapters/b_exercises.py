# %% [markdown]
# # Exercises
#
# Each is a function to write. Its signature and docstring stand in `docs/exercises/`, in a file for each chapter; you
# put the body in place of `raise NotImplementedError`. Then
#
# ```
# python -m docs.check 3.2     # this one
# python -m docs.check 3       # those of a chapter
# python -m docs.check         # all of them, and how far you are
# ```
#
# says *right*, or names the first value that differs, with its shape and the first index. What is right is computed
# by `glm` itself: there is no list of answers to look at, but there is all of `glm/`.
#
# To keep your copy of the book as it is, write in a file of your own and give it with `--file`.

# %%
import inspect
import re

from docs import check
from docs.writing import table


def task(exercise: check.Exercise) -> str:
    """The first sentence of what is asked."""
    text = inspect.getdoc(check.function_of(exercise, check.stub(exercise)))
    assert text is not None
    said = re.sub(r"^Exercise [\d.]+ ", "", " ".join(text.split("\n\n")[0].split()))
    return re.split(r"(?<=[.?!]) (?=[A-Z])", said)[0]


exercises = check.exercises()
assert len({exercise.number for exercise in exercises}) == len(exercises)
table(
    ["exercise", "function", "task"],
    [[exercise.number, f"`{exercise.function}`", task(exercise)] for exercise in exercises],
)

# %% [markdown]
# ## How a case is compared
#
# Tensors must have the right shape, and may be of any dtype. Their numbers may be off by a tolerance times the rms of
# what is expected, so that another order of summation is still right; integers and truth values must be equal.

# %%
import torch

wanted = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
for given in (wanted + 1e-15, wanted.T, wanted[0], wanted.tolist()):
    print(check.difference(given, wanted, tolerance=1e-12) or check.RIGHT)
assert check.difference(wanted + 1e-15, wanted, tolerance=1e-12) is None
assert check.difference(wanted + 1e-9, wanted, tolerance=1e-12) is not None
