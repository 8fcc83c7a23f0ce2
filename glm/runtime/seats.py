"""Seats: which request has which slot of the cache, and what slots remember of those that are over.

A new prompt that begins like what a slot remembers need not read that beginning again: so a chat pays for its last
question only, not for the whole conversation each time.
"""

from glm.runtime.requests import Request


class Seats:
    """One for each slot."""

    def __init__(self, count: int) -> None:
        self.holders: list[Request | None] = [None] * count
        self.texts: list[list[int]] = [[] for _ in range(count)]  # the ids whose keys and values are in the slot
        self.turns = [0] * count  # when it was last taken
        self.clock = 0

    def free(self) -> list[int]:
        """Slots without a request, the one idle for longest first."""
        return sorted((i for i, holder in enumerate(self.holders) if holder is None), key=lambda i: (self.turns[i], i))

    def take(self, request: Request, reusable: bool) -> int | None:
        """The free slot that remembers most of the prompt, if that can be used, else the one idle for longest."""
        free = self.free()
        if not free:
            return None
        slot = max(free, key=lambda i: common(request.prompt, self.texts[i]) if reusable else 0)
        request.reused = request.read = common(request.prompt, self.texts[slot]) if reusable else 0
        self.clock += 1
        self.turns[slot], self.holders[slot] = self.clock, request
        self.texts[slot] = request.prompt[: request.read]
        return slot

    def leave(self, request: Request) -> int | None:
        """Give back the slot of a request; None where it has none."""
        if request not in self.holders:
            return None
        slot = self.holders.index(request)
        self.holders[slot] = None
        return slot

    def writing(self) -> dict[int, Request]:
        """The requests that want a next token, by slot."""
        return {i: request for i, request in enumerate(self.holders) if request and request.state == "writing"}


def common(prompt: list[int], text: list[int]) -> int:
    """How many tokens of a prompt need not be read where `text` was; its last one always must, for its logits."""
    most = min(len(prompt) - 1, len(text))
    return next((i for i in range(most) if prompt[i] != text[i]), most)
