"""Many processes, one model: tensor parallelism for running it, FSDP for training it. All of it on torch.distributed.

    torchrun --nproc-per-node 2 -m glm chat SOURCE      # or complete, infill, verify, train

Tensor parallelism makes every rank hold a narrower model – fewer heads, fewer inner channels, fewer experts – whose
sublayers add up to the whole one's (`glm.shares`). So a rank's model is an ordinary `GLM` of a narrower spec, its cache
included, and between ranks there is only

    embedding       rows of the vocabulary dealt out         a rank looks up its tokens, the sum is everybody's
    each sublayer   run as it is on a narrower module         the sum is everybody's
    head            rows of the vocabulary dealt out          logits are gathered

which DTensor does: the three lines are the plan that `parallelize_module` is given. Every rank then knows the whole
stream and the whole logits, and samples the same tokens, as long as all were seeded alike (`together` sees to that).

Loading reads of every tensor only what the rank holds. This is for inference: the parameters take no gradients.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from glm.checkpoint import put
from glm.errors import ParallelError
from glm.grouped import Grouped
from glm.linear import Dense
from glm.model import GLM
from glm.shares import Cut, Run, Share, rows
from glm.spec import Block, Spec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


# ----------------------------------------------------------------------------- who holds what


def plan(spec: Spec) -> dict[str, Cut]:
    """How the matrices of a model are cut, by the name of the module; what is not named is held whole."""
    vocabulary = rows(Run("tokens", spec.vocabulary, ragged=True))
    cuts = {"embedding": vocabulary, "head": vocabulary}
    for i, block in enumerate(spec.blocks):
        for sublayer in ("mixer", "feed_forward"):
            cuts |= {f"blocks.{i}.{sublayer}.{name}": cut for name, cut in getattr(block, sublayer).plan.items()}
    if spec.prefix is not None:
        prefix = spec.prefix.plan(len(spec.blocks), spec.blocks[0].mixer.remembers)
        cuts |= {f"prefix.{name}": cut for name, cut in prefix.items()}
    return cuts


def narrower(spec: Spec, rank: int, ranks: int) -> Spec:
    """The spec of what one rank holds. Raises ParallelError where the model cannot be dealt out like this."""
    for cut in plan(replace(spec, blocks=tuple(dict.fromkeys(spec.blocks)))).values():
        cut.held(rank, ranks)

    @cache
    def share(block: Block) -> Block:
        mixer, feed_forward = block.mixer.share(rank, ranks), block.feed_forward.share(rank, ranks)
        return replace(block, mixer=mixer, feed_forward=feed_forward)

    return replace(spec, blocks=tuple(share(block) for block in spec.blocks))


def shares(spec: Spec, shapes: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Share]:
    """What a rank holds of each tensor of a model (`shapes`, by name); those it holds whole are left out.

    Raises ParallelError.
    """
    cuts, found = plan(spec), {}
    grouped = isinstance(spec.weights, Grouped) and spec.weights.group is not None
    for name, x in shapes.items():
        module, _, tensor = name.rpartition(".")
        if (cut := cuts.get(module)) is None:
            continue
        if cut.axis == 0:
            found[name] = Share(0, cut.held(rank, ranks))
        elif tensor in ("weight", "weight_packed") or (grouped and tensor in ("weight_scale", "weight_zero_point")):
            found[name] = Share(x.dim() - 1, unbroken(cut.held(rank, ranks), cut.length // x.shape[-1]))
        elif tensor == "bias":  # added once
            found[name] = Share(0, range(len(x)), void=rank > 0)
    return found


def unbroken(held: list[int], by: int) -> list[int]:
    """Columns as the bytes, words or groups they lie in, `by` in each. Raises ParallelError where one would be torn."""
    first = held[::by]
    if held != [i + j for i in first for j in range(by)] or any(i % by for i in first):
        raise ParallelError(
            f"a share would begin inside of {by} weights that are stored together: start fewer processes"
        )
    return [i // by for i in first]


def narrow(
    spec: Spec, dtype: torch.dtype, shapes: Mapping[str, Tensor], mesh: "DeviceMesh"
) -> tuple[GLM, dict[str, Share]]:
    """This rank's model, without numbers, and its share of each tensor of the whole one (`shapes`, by name)."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    if spec.head != Dense():
        raise ParallelError("a head stored as integers cannot be dealt out: quantise the model without --head")
    narrower_spec, held = narrower(spec, rank, ranks), shares(spec, shapes, rank, ranks)
    return GLM(narrower_spec, device="meta", dtype=dtype), held


def tensor_parallel(model: GLM, mesh: "DeviceMesh") -> GLM:
    """A loaded model dealt out to the ranks of a one-dimensional mesh: this rank's share, with the same call.

    Logits, greedy and (with equal seeds) sampled tokens are those of `model` on every rank. To load a model that no
    single device holds, give `mesh` to `GLM.from_pretrained` instead. Raises ParallelError where heads or channels
    cannot be dealt out to so many ranks.
    """
    state = model.state_dict(keep_vars=True)
    part, held = narrow(model.spec, model.dtype, state, mesh)
    places = part.state_dict(keep_vars=True)
    numbers: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, x in state.items():
            numbers[id(places[name])] = held[name].of(x.detach()) if name in held else x.detach().clone()
    put(part, places, numbers, model.device)
    return joined(part, mesh).train(model.training)


def joined(part: GLM, mesh: "DeviceMesh") -> GLM:
    """A rank's own model, its numbers in place, joined with those of the other ranks."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    part.requires_grad_(False)
    V, D = part.spec.vocabulary, part.spec.width
    for module in (part.embedding, part.head):
        local: Tensor = module.get_parameter("weight").detach()
        table = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((V, D)), stride=(D, 1))
        module.weight = nn.Parameter(table, requires_grad=False)
    sublayer = sum_style()
    parallelize_module(
        part,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=Replicate()),
            "blocks.*.mixer": sublayer,
            "blocks.*.feed_forward": sublayer,
            "head": ColwiseParallel(output_layouts=Replicate()),
        },
    )
    if part.spec.tied:  # parallelize_module gives each module a parameter of its own
        part.head.weight = part.embedding.weight
    return part


def sum_style() -> Any:
    """The parallel style of a narrower sublayer: what it makes is a part of a sum, which everybody gets."""
    from torch.distributed.tensor.parallel import ParallelStyle

    class Summed(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: "DeviceMesh") -> nn.Module:
            def add(module: nn.Module, given: Any, made: Tensor) -> Tensor:
                return summed(made, device_mesh)

            module.register_forward_hook(add)
            return module

    return Summed()


# ----------------------------------------------------------------------------- training


def fully_sharded(model: GLM, mesh: "DeviceMesh") -> None:
    """Deals every parameter out to the ranks; each block is put together when its turn comes (FSDP2).

    (Zhao et al. 2023, arXiv:2304.11277.) Parameters become DTensors; gradients are averaged over the ranks.
    """
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the head is used again after the forward pass


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be dealt out: every rank has to ask for it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def dealt_like(pattern: Tensor, x: Tensor) -> Tensor:
    """This rank's part of `x`, which every rank has whole, if `pattern` of the same shape is dealt out."""
    if not hasattr(pattern, "full_tensor") or x.shape != pattern.shape:
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    return distribute_tensor(x, pattern.device_mesh, pattern.placements, src_data_rank=None)


def summed(x: Tensor, mesh: "DeviceMesh | None") -> Tensor:
    """The sum of the ranks' `x`; of one process, `x`."""
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(x, mesh, [Partial()], run_check=False).full_tensor()


# ----------------------------------------------------------------------------- processes


def processes() -> int:
    """How many processes torchrun started for this program; 1 where it was started by itself."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def mesh_of_all(device: torch.device | str) -> "DeviceMesh | None":
    """The mesh of all processes, one device each; None where there is one process. Raises ParallelError."""
    if processes() == 1:
        return None
    here, kind = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.device(device).type
    if kind == "cuda" and here > torch.cuda.device_count():
        raise ParallelError(
            f"{here} processes cannot have a GPU each where there are {torch.cuda.device_count()}: "
            "start fewer, or give --device cpu"
        )
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (processes(),), mesh_dim_names=("ranks",))


def agreed(value: T) -> T:
    """What the first process says, on all of them: for decisions that must not differ."""
    if processes() == 1:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def first() -> bool:
    """Whether this is the first process, which writes what only one should."""
    return int(os.environ.get("RANK", "0")) == 0


def together(program: Callable[[], int]) -> int:
    """Runs a program, which returns its exit status, as one of the processes that torchrun started; 0 ends the process.

    They run it in step: with the same seed, each on its own GPU where there are enough. The first has keyboard and
    screen; what it reads the others are told. They are silent, except for an error that they alone run into.
    """
    if processes() == 1:
        return program()
    from torch import distributed

    gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    streams = sys.stdin, sys.stdout, sys.stderr
    said = io.StringIO()
    sys.stdin = Relayed(sys.stdin if first() else None)
    if not first():
        sys.stdout, sys.stderr = io.StringIO(), said
    try:
        torch.manual_seed(agreed(torch.seed()))
        status = program()
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
    if status == 0:  # otherwise others may still be waiting for us, and are ended by torchrun
        distributed.barrier()
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # on the usual way out, threads of torch's process groups abort now and then (seen in torch 2.13)
    elif not first():
        time.sleep(5)  # if the first has failed too, it has said why, and we do not live to see the end of this
        print(f"process {os.environ['RANK']}: {said.getvalue()}", end="", file=sys.stderr)
    return status


class Relayed(io.TextIOBase):
    """Standard input of all processes: what the first reads, all read."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        """The next line."""
        return agreed(self.source.readline() if self.source else "")

    def read(self, size: int | None = -1, /) -> str:
        """All the rest."""
        return agreed(self.source.read() if self.source else "")
