"""Drafting: somebody guesses the next tokens, and the model reads all of them at once.

Reading n guessed tokens takes one pass, little more than reading one. The model's own choice at each of them says how
many were right; those are kept, its choice behind them is one more, and the rest is forgotten (speculative decoding:
Leviathan et al. 2023, arXiv:2211.17192). What comes out is what the model alone would have said, token by token, since
every token is the model's own choice; guesses only decide how many passes that takes. (Up to rounding: a pass over
several tokens may round differently from a pass over one.)

    tokens = glm.generate(model, [prompt], max_new_tokens=200, draft=glm.PromptLookup(guesses=8))
    tokens = glm.generate(model, [prompt], max_new_tokens=200, draft=glm.SmallerModel(small, guesses=4))
    drafter = glm.NextToken.from_pretrained(folder, model)
    tokens = glm.generate(model, [prompt], max_new_tokens=200, draft=drafter)
    print(drafter.tally)

A drafter is anything with a `tally` and a `start`. Of a batch, as many guesses are kept as are right in every row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Protocol

import torch
from torch import Tensor, nn

from glm.cache import Cache
from glm.errors import ConfigError, GenerationError
from glm.layout import Causal, Layout
from glm.linear import Dense, empty_embedding
from glm.model import GLM, BlockModule
from glm.spec import Spec

Guess = Callable[[Tensor, Tensor, Layout], Tensor]
"""Called with the newest tokens that are certain [B, c], the stream [B, c, D] from which each was chosen (that of the
token before it, after the final norm), and the layout of those tokens before. The first time, that is all of the prompt
but its first token, and the model's first. Returns guesses [B, n], n ≥ 0, of the tokens that come next."""


@dataclass
class Tally:
    """How many passes were made after the prompt, how many guesses they read, and how many of those were right."""

    passes: int = 0
    guessed: int = 0
    right: int = 0

    def __str__(self) -> str:
        """In words."""
        return f"{self.right} of {self.guessed} guesses were right in {self.passes} passes"


class Drafter(Protocol):
    """Guesses what comes next; what it remembers of a text is in the function that `start` returns."""

    tally: Tally
    guesses: int

    def start(self, model: GLM, ids: Tensor, real: Tensor, length: int) -> Guess:
        """Prompts [B, T], `real` False on padding, which may grow to `length` -> what guesses their continuation."""
        ...


class PromptLookup:
    """Guesses that what followed the last few tokens earlier in the text follows them again (Saxena 2023).

    It looks for the longest of the last `longest` … 1 tokens, its latest place, and guesses the `guesses` ids behind.
    Good where answers repeat what they were asked about: summaries, corrections, code. Costs nothing.
    """

    def __init__(self, guesses: int = 8, longest: int = 3) -> None:
        if guesses < 1 or longest < 1:
            raise GenerationError(f"guesses and longest are at least 1, not {guesses} and {longest}")
        self.guesses, self.longest = guesses, longest
        self.tally = Tally()

    def start(self, model: GLM, ids: Tensor, real: Tensor, length: int) -> Guess:
        """See `Drafter`."""
        texts = [row[keep].tolist()[:1] for row, keep in zip(ids, real, strict=True)]
        padding = (~real).sum(-1).tolist()  # before the first tokens that come

        def guess(tokens: Tensor, stream: Tensor, layout: Layout) -> Tensor:
            for row, new in enumerate(tokens.tolist()):
                texts[row] += new[padding[row] :]
                padding[row] = 0
            return torch.tensor([self.found(text) for text in texts], device=tokens.device)

        return guess

    def found(self, text: list[int]) -> list[int]:
        """What followed the last tokens of `text` before, filled up with its last token."""
        for length in range(min(self.longest, len(text) - 1), 0, -1):
            last = text[-length:]
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == last:
                    ids = text[start + length : start + length + self.guesses]
                    return ids + text[-1:] * (self.guesses - len(ids))
        return text[-1:] * self.guesses


class SmallerModel:
    """Another, smaller model of the same vocabulary, whose likeliest tokens are the guesses."""

    def __init__(self, model: GLM, guesses: int = 4) -> None:
        if guesses < 1:
            raise GenerationError(f"guesses is at least 1, not {guesses}")
        self.model, self.guesses = model, guesses
        self.tally = Tally()

    def start(self, model: GLM, ids: Tensor, real: Tensor, length: int) -> Guess:
        """See `Drafter`. Raises GenerationError where the two models' ids are not the same."""
        small = self.model
        if small.spec.vocabulary != model.spec.vocabulary:
            raise GenerationError(
                f"the smaller model has {small.spec.vocabulary} ids and this one {model.spec.vocabulary}: "
                "take one of the same family"
            )
        ids, real = ids.to(small.device), real.to(small.device)
        cache = small.new_cache(len(ids), length + self.guesses)
        small(ids, small.layout(ids, real), cache, last=True)
        new = slice(ids.shape[1] - 1, None)  # of the first tokens that come, all but the last are in the cache

        def guess(tokens: Tensor, stream: Tensor, layout: Layout) -> Tensor:
            nonlocal new
            guesses = [small(tokens[:, new].to(small.device), cache=cache, last=True)[:, -1:].argmax(-1)]
            new, certain = slice(None), cache.layout
            assert certain is not None
            while len(guesses) < self.guesses:
                guesses.append(small(guesses[-1], cache=cache, last=True)[:, -1:].argmax(-1))
            cache.rewind(certain)
            return torch.cat(guesses, dim=1).to(tokens.device)

        return guess


class NextToken(nn.Module):
    """A block behind the last, trained to predict one token further (multi-token prediction, arXiv:2412.19437).

        h'_t = block(W [n_e(embedding(x_{t+1})), n_s(h_t)]),    logits of x_{t+2} = head(n(h'_t))

    h is the stream after the final norm. Its own n(h') takes the place of h for further guesses, of which it makes
    `guesses` each time; it was trained for the first. It shares the embedding and the head of its model.
    """

    def __init__(self, spec: Spec, guesses: int = 1) -> None:
        """Without numbers, on the "meta" device; `from_pretrained` is the usual way to one."""
        super().__init__()
        if spec.final_norm is None or not isinstance(spec.reading, Causal):
            raise ConfigError("a block that predicts one token further needs a causal model with a final norm")
        if guesses < 1:
            raise GenerationError(f"guesses is at least 1, not {guesses}")
        self.spec, self.guesses, self.tally = spec, guesses, Tally()
        block = spec.blocks[-1]
        with torch.device("meta"):
            self.token_norm = spec.final_norm.build(spec.width)
            self.stream_norm = spec.final_norm.build(spec.width)
            self.join = Dense().linear(2 * spec.width, spec.width, bias=False)
            self.block = BlockModule(block, spec.width, spec.weights)
            self.norm = spec.final_norm.build(spec.width)
            self.embedding: nn.Module = empty_embedding(spec.vocabulary, spec.width)
            self.head: nn.Module = Dense().linear(spec.width, spec.vocabulary, bias=False)

    @classmethod
    def from_pretrained(
        cls, source: str | PathLike[str], model: GLM, *, guesses: int = 1, revision: str | None = None
    ) -> "NextToken":
        """The block behind the last of a checkpoint, for the model loaded from it. See `glm.pretrained.load_next`."""
        from glm.pretrained import load_next  # the way down to files and families starts here

        return load_next(source, model, guesses=guesses, revision=revision)

    def forward(self, tokens: Tensor, stream: Tensor, layout: Layout, cache: Cache) -> Tensor:
        """Tokens [B, T] and the stream [B, T, D] of the tokens before them -> the stream that the head reads next.

        `layout` is that of the tokens before: one place earlier than the tokens' own, which no difference of two
        positions shows.
        """
        x: Tensor = self.join(torch.cat((self.token_norm(self.embedding(tokens)), self.stream_norm(stream)), dim=-1))
        rotation = self.spec.rotary.rotation(layout.positions, x.dtype)
        x = self.block(x, rotation, layout.mask(), cache.memories()[0])
        cache.advance(layout)
        y: Tensor = self.norm(x)
        return y

    def start(self, model: GLM, ids: Tensor, real: Tensor, length: int) -> Guess:
        """See `Drafter`."""
        remembers = [self.spec.blocks[-1].mixer.remembers]
        room = length + self.guesses
        cache = Cache(remembers, len(ids), room, dtype=model.dtype, device=model.device)

        def guess(tokens: Tensor, stream: Tensor, layout: Layout) -> Tensor:
            state = self(tokens, stream, layout, cache)[:, -1:]
            guesses = [self.head(state).argmax(-1)]
            while len(guesses) < self.guesses:  # on what it made itself, which is forgotten afterwards
                assert cache.layout is not None
                state = self(guesses[-1], state, cache.layout.following(1, (1,)), cache)
                guesses.append(self.head(state).argmax(-1))
            cache.rewind(layout)
            return torch.cat(guesses, dim=1)

        return guess
