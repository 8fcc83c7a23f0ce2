"""Decode and prefill speed on the CPU: this package against transformers' `glm`, in turn in one process.

    python kernels/bench/cpu_speed.py [--dtype bfloat16] [--contexts 128 512 1024] [--threads 2]

Both sides run the same random weights of a GLM-4-shaped model of about half a billion parameters, the same dtype and
threads. transformers runs with each of its caches and the better one counts. A round times prefill of the context
and then greedy decoding on both sides; the figures are medians over rounds. Writes results/cpu_speed_<dtype>.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from glm_kernels.bench.machine import provenance, write
from rich.console import Console
from rich.progress import track
from transformers import DynamicCache, GlmConfig, GlmForCausalLM, StaticCache

from glm.family import glm4
from glm.model import GLM

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3424,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 151552,
    "max_position_embeddings": 8192,
    "attention_bias": True,
    "rms_norm_eps": 1.5625e-07,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}

Times = tuple[float, float]  # seconds of prefill, seconds a decoded token
Side = Callable[[torch.Tensor, int], Times]


def both_models(dtype: torch.dtype) -> tuple[GLM, Any]:
    """The same random weights in both implementations."""
    torch.manual_seed(0)
    config = GlmConfig(**SHAPE)
    theirs: Any = GlmForCausalLM(config)
    theirs = theirs.to(dtype).train(False)
    fields = config.to_dict()
    ours = GLM(glm4.spec(fields, ""), device="cpu", dtype=dtype).train(False)
    mine, other = ours.state_dict(), theirs.state_dict()
    with torch.no_grad():
        for stored in glm4.GENERATION.table(ours.spec, fields, mine):
            mine[stored.parameter][stored.index].copy_(other[stored.name])
    return ours, theirs


def timed(prefill: Callable[[], torch.Tensor], step: Callable[[torch.Tensor], torch.Tensor], count: int) -> Times:
    """Time one prefill and `count` greedy steps, each a function that returns logits [1, 1, V]."""
    start = time.perf_counter()
    logits = prefill()
    middle = time.perf_counter()
    for _ in range(count):
        logits = step(logits[:, -1].argmax(-1, keepdim=True))
    return middle - start, (time.perf_counter() - middle) / count


def our_side(model: GLM) -> Side:
    """This package with its cache."""

    def run(ids: torch.Tensor, count: int) -> Times:
        cache = model.new_cache(1, ids.shape[1] + count)
        return timed(lambda: model(ids, cache=cache, last=True), lambda token: model(token, cache=cache), count)

    return run


def their_side(model: Any, static: bool) -> Side:
    """transformers with its growing or its static cache."""

    def run(ids: torch.Tensor, count: int) -> Times:
        room = ids.shape[1] + count
        cache = StaticCache(config=model.config, max_cache_len=room) if static else DynamicCache(config=model.config)

        def call(tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits

        return timed(lambda: call(ids), call, count)

    return run


def measure(dtype: torch.dtype, contexts: list[int], count: int, rounds: int) -> list[dict[str, Any]]:
    """One row a context: median seconds of each side and the ratios."""
    ours, theirs = both_models(dtype)
    sides = {
        "glm": our_side(ours),
        "transformers dynamic": their_side(theirs, static=False),
        "transformers static": their_side(theirs, static=True),
    }
    rows = []
    for context in contexts:
        ids = torch.randint(0, SHAPE["vocab_size"], (1, context), generator=torch.Generator().manual_seed(context))
        times: dict[str, list[Times]] = {name: [] for name in sides}
        with torch.inference_mode():
            for side in sides.values():
                side(ids, 2)  # warm up
            for _ in track(range(rounds), f"context {context}", console=Console(stderr=True)):
                for name, side in sides.items():
                    times[name].append(side(ids, count))
        prefill = {name: statistics.median(t[0] for t in times[name]) for name in sides}
        decode = {name: statistics.median(t[1] for t in times[name]) for name in sides}
        theirs_prefill = min(value for name, value in prefill.items() if name != "glm")
        theirs_decode = min(value for name, value in decode.items() if name != "glm")
        rows.append(
            {
                "context": context,
                "prefill tokens/s": {name: context / value for name, value in prefill.items()},
                "decode tokens/s": {name: 1 / value for name, value in decode.items()},
                "prefill ratio": theirs_prefill / prefill["glm"],
                "decode ratio": theirs_decode / decode["glm"],
            }
        )
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--tokens", type=int, default=24, help="decoded a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(getattr(torch, options.dtype), options.contexts, options.tokens, options.rounds)
    result = provenance("transformers") | {
        "shape": SHAPE,
        "dtype": options.dtype,
        "threads": options.threads,
        "decoded tokens": options.tokens,
        "rounds": options.rounds,
        "rows": rows,
    }
    print(write(f"cpu_speed_{options.dtype}", result))
    for row in rows:
        print(f"context {row['context']:5}  prefill {row['prefill ratio']:.2f}x  decode {row['decode ratio']:.2f}x")


if __name__ == "__main__":
    main()
