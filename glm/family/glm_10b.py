"""GLM (2021), from base to 10B, English and Chinese: the model that fills blanks.

Du et al. 2022, arXiv:2103.10360. A pre-norm transformer with LayerNorm and GELU whose head is its embedding. Places
are learned: a table for where in the text a token stands, and one for where inside its blank. Its blanks are of three
kinds: `[MASK]` for a few words, `[sMASK]` for a sentence, `[gMASK]` for a text of any length; all are filled in turn
from left to right.

GELU is the exact one with the error function in the code that the published files belong to (transformers' way to
read them), and the tanh form in the training code (`hidden_act` "gelu_new" here). `attention_scale` of a config
only moves a factor from one side of the softmax to the other, for float16's sake. The code hides keys by scores of
-65504: a token that sees anything gives them no weight at all, in any precision, so that they may as well be left
out; only padding, which sees nothing, would come out as the average of everything, and nobody reads that. An
`attention_mask` that is a number for each row is `Layout.rule(positions, prefix=numbers)`, one that is a matrix
`Layout(positions, matrix)`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from glm.attention import Attention
from glm.errors import ConfigError
from glm.family.generation import Config, Generation, Name, Release, divided
from glm.feed_forward import FeedForward
from glm.fields import Fields
from glm.layout import InTurn
from glm.linear import Dense
from glm.norms import LayerNorm
from glm.parts import Cut
from glm.positions import Learned, Unturned
from glm.residual import Pre
from glm.spec import Block, Spec


@dataclass(frozen=True)
class Special:
    """The ids of the special tokens, which a published config.json leaves to its tokenizer's code."""

    mask_token_id: int
    smask_token_id: int
    gmask_token_id: int
    sop_token_id: int
    eop_token_id: int
    pad_token_id: int


SPECIAL = {  # by the number of rows of the embedding, a multiple of 128
    50304: Special(50260, 50264, 50263, 50257, 50258, 50256),  # GPT-2's vocabulary
    30592: Special(103, 30525, 30524, 30522, 30523, 0),  # BERT's, uncased
    50048: Special(50003, 50008, 50009, 50006, 50007, 50000),  # the Chinese one
}


def special(vocabulary: int) -> Special:
    """The special ids of a vocabulary; those of one that was never published are the last ones."""
    last = (vocabulary - n for n in range(1, 7))
    return SPECIAL.get(vocabulary) or Special(*last)


ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh"}  # what a config.json calls them


def build(
    *,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int,
    context: int,
    two_axes: bool = True,
    activation: str = "gelu",
    ids: Special | None = None,
) -> Spec:
    """The spec of a GLM; the defaults are what every published release has."""
    ids = ids or special(vocabulary)
    masks = (ids.mask_token_id, ids.smask_token_id, ids.gmask_token_id)
    if max(asdict(ids).values()) >= vocabulary or min(asdict(ids).values()) < 0:
        raise ConfigError(f"config.json: vocab_size: {vocabulary} is too small for the special tokens {asdict(ids)}")
    head_width = divided(width, heads, "hidden_size / num_attention_heads")
    block = Block(
        wiring=Pre(),
        norm=LayerNorm(1e-5),
        mixer=Attention(heads=heads, groups=heads, head_width=head_width, qkv_bias=True, out_bias=True),
        feed_forward=FeedForward(inner=4 * width, branches=(activation,), bias=True),
    )
    return Spec(
        vocabulary=vocabulary,
        width=width,
        context=context,
        reading=InTurn(sop=ids.sop_token_id, masks=masks, axes=2 if two_axes else 1, fixed=masks),
        rotary=Unturned(),
        blocks=(block,) * layers,
        final_norm=LayerNorm(1e-5),
        tied=True,
        prefix=None,
        weights=Dense(),
        pad=ids.pad_token_id,
        stop=(ids.eop_token_id,),
        learned=Learned(context + 1, 2) if two_axes else Learned(context, 1),
    )


def spec(config: Config, name: str) -> Spec:
    """A GLM config.json as a spec. Raises ConfigError."""
    f = Fields(config, "config.json")
    for flag, value in (("relative_encoding", False), ("output_predict", True)):
        if f.flag(flag, default=value) != value:
            raise ConfigError(f"config.json: {flag} = {not value} was never published and is not supported")
    if "spell_length" in f:
        raise ConfigError("config.json: spell_length was never published and is not supported")
    vocabulary = f.integer("vocab_size", 7, 1 << 22)
    usual = asdict(special(vocabulary))
    return build(
        layers=f.integer("num_layers", 1, 1000),
        width=f.integer("hidden_size", 1, 1 << 17),
        heads=f.integer("num_attention_heads", 1, 1024),
        vocabulary=vocabulary,
        context=f.integer("max_sequence_length", 1, 1 << 30),
        two_axes=f.flag("block_position_encoding", default=True),
        activation=ACTIVATIONS[f.choice("hidden_act", tuple(ACTIVATIONS), default="gelu")],
        ids=Special(**{key: f.integer(key, 0, 1 << 22, default=id) for key, id in usual.items()}),
    )


def config(spec: Spec) -> dict[str, Any]:
    """The config.json of a spec, in the official field names; special ids only where they are not the usual ones."""
    block, reading = spec.blocks[0], spec.reading
    assert isinstance(reading, InTurn)
    assert spec.pad is not None
    (eop,) = spec.stop
    mask, smask, gmask = reading.masks
    ids = Special(mask, smask, gmask, reading.sop, eop, spec.pad)
    (hidden_act,) = (name for name, ours in ACTIVATIONS.items() if (ours,) == block.feed_forward.branches)
    return {
        "architectures": ["GLMModel"],
        "model_type": "glm",
        "attention_dropout_prob": 0.1,
        "attention_scale": 1.0,
        "block_position_encoding": reading.axes == 2,
        "checkpoint_activations": False,
        "checkpoint_num_layers": 1,
        "embedding_dropout_prob": 0.1,
        "hidden_size": spec.width,
        "initializer_range": 0.02,
        "max_sequence_length": spec.context,
        "num_attention_heads": block.mixer.heads,
        "num_layers": len(spec.blocks),
        "output_dropout_prob": 0.1,
        "output_predict": True,
        "parallel_output": True,
        "pool_token": "cls",
        "relative_encoding": False,
        "spell_func": "lstm",
        "spell_length": None,
        "vocab_size": spec.vocabulary,
        **({} if hidden_act == "gelu" else {"hidden_act": hidden_act}),
        **({} if ids == special(spec.vocabulary) else asdict(ids)),
    }


NAMES = (
    Name("word_embeddings", "embedding"),
    Name("transformer.position_embeddings", "places.tables.0"),
    Name("transformer.block_position_embeddings", "places.tables.1"),
    Name("transformer.layers.{i}.input_layernorm", "blocks.{i}.wire_mixer.before"),
    Name("transformer.layers.{i}.attention.query_key_value", "blocks.{i}.mixer.qkv"),
    Name("transformer.layers.{i}.attention.dense", "blocks.{i}.mixer.out"),
    Name("transformer.layers.{i}.post_attention_layernorm", "blocks.{i}.wire_feed_forward.before"),
    Name("transformer.layers.{i}.mlp.dense_h_to_4h", "blocks.{i}.feed_forward.up"),
    Name("transformer.layers.{i}.mlp.dense_4h_to_h", "blocks.{i}.feed_forward.down"),
    Name("transformer.final_layernorm", "final_norm"),
)

# How the training code cut a model for several devices: q, k and v lie on top of each other.
CUTS = (
    Cut(r"word_embeddings\.weight", 0),
    Cut(r".*\.query_key_value\.(weight|bias)", 0, blocks=3),
    Cut(r".*\.dense_h_to_4h\.(weight|bias)", 0),
    Cut(r".*\.(attention\.dense|dense_4h_to_h)\.weight", 1),
)


def original(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config.json of an original checkpoint, which came without one, from the shapes of its whole tensors.

    Every release has heads of 64 channels. The training code's GELU is the tanh form.
    """
    vocabulary, width = shapes["word_embeddings.weight"]
    places, _ = shapes["transformer.position_embeddings.weight"]
    two_axes = "transformer.block_position_embeddings.weight" in shapes
    layers = sum(name.endswith(".input_layernorm.weight") for name in shapes)
    return config(
        build(
            layers=layers,
            width=width,
            heads=divided(width, 64, "hidden_size"),
            vocabulary=vocabulary,
            context=places - int(two_axes),
            two_axes=two_axes,
            activation="gelu_tanh",
        )
    )


def mended(config: Config, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """10B-Chinese was trained with one id, 50007, for <|endofpiece|> and [gMASK]; the latter is 50009 since."""
    if name == "word_embeddings.weight" and (config["num_layers"], config["vocab_size"]) == (48, 50048):
        tensor = tensor.clone()
        tensor[50009] = tensor[50007]
    return tensor


HALF = torch.float16
BASE = build(layers=12, width=768, heads=12, vocabulary=30592, context=512)
LARGE = build(layers=24, width=1024, heads=16, vocabulary=30592, context=512)
TWO_BILLION = build(layers=36, width=2048, heads=32, vocabulary=50304, context=1024)
TEN_BILLION = build(layers=48, width=4096, heads=64, vocabulary=50304, context=1024)
LARGE_CHINESE = build(layers=24, width=1024, heads=16, vocabulary=50048, context=1024)
TEN_BILLION_CHINESE = build(layers=48, width=4096, heads=64, vocabulary=50048, context=1024)
RELEASES = (
    Release("glm-base", "THUDM/glm-base", 2021, BASE, HALF, 1),
    Release("glm-large", "THUDM/glm-large", 2021, LARGE, HALF, 1),
    Release("glm-2b", "THUDM/glm-2b", 2021, TWO_BILLION, HALF, 1),
    Release("glm-10b", "THUDM/glm-10b", 2021, TEN_BILLION, HALF, 1),
    Release("glm-large-chinese", "THUDM/glm-large-chinese", 2021, LARGE_CHINESE, HALF, 1),
    Release("glm-10b-chinese", "THUDM/glm-10b-chinese", 2021, TEN_BILLION_CHINESE, HALF, 1),
)

GENERATION = Generation(
    name="glm_10b",
    recognises=lambda config: config.get("model_type") == "glm" and "max_sequence_length" in config,
    spec=spec,
    config=config,
    names=NAMES,
    ignorable=(),
    releases=RELEASES,
    cuts=CUTS,
    original=original,
    mended=mended,
)
