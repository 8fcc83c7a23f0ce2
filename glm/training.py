"""Training a small blank-filling model from nothing: a recipe in, a checkpoint in ChatGLM-6B's layout out.

    train("weights/tiny-glm/recipe.toml")        # what `glm train weights/tiny-glm/recipe.toml` does

A step draws a batch, takes the cross-entropy of the tokens to be written, and lets AdamW (Loshchilov & Hutter 2019,
arXiv:1711.05101) follow its gradient; the learning rate goes up in a line and down along a cosine. Everything random
is drawn from the recipe's seed and the number of the step, so that a run that was interrupted goes on exactly as it
would have gone.

Several processes (`torchrun --nproc-per-node 2 -m glm train …`) share every batch, and each keeps a part of the weights
and moments (FSDP2, `glm.parallel`). The run is the same, up to rounding, whatever their number, and can be resumed with
another one.
"""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from glm.atomic import new_folder
from glm.checkpoint import write_object
from glm.curriculum import EARLIER, Batches, Chat, Lessons, lessons, pairs, passages
from glm.errors import CheckpointError, ConfigError, GLMError
from glm.export import save_pretrained
from glm.family.chatglm import build
from glm.family.text_chatglm import CHATGLM_BYTES
from glm.generation import generate
from glm.infilling import CJK, IGNORED, Marks, Sample, batch
from glm.model import GLM
from glm.norms import wide
from glm.parallel import agreed, dealt_like, first, fully_sharded, mesh_of_all, summed, whole
from glm.recipe import Recipe
from glm.spec import Spec
from glm.tokenizer import Tokenizer
from glm.vocabulary import ByteLevel


def train(
    recipe: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    pause: int | None = None,
    quiet: bool = False,
) -> Path:
    """Trains the model of a recipe file; returns the folder of the finished checkpoint.

    out     that folder; None is the one the recipe names. While the model is in training only `unfinished/` in it
            is written; then the checkpoint (float16, ChatGLM-6B's layout) with its tokenizer, training.json, which
            says what the run was and how well the model does, and loss.png where matplotlib is installed.
    resume  go on where an earlier run of the same recipe left off; False throws away what it left.
    pause   stop after this step, leaving a checkpoint to resume from.
    quiet   no progress on standard error.

    Raises ConfigError for a bad recipe, CheckpointError for a checkpoint that cannot be resumed from, GLMError for a
    loss that is not finite and for a disk that cannot be written.
    """
    plan = Recipe.read(recipe)
    folder = Path(out) if out is not None else plan.folder / plan.out
    if plan.threads:
        torch.set_num_threads(plan.threads)
    run = Run(plan, folder / "unfinished")
    if resume:
        run.resume()
    elif first():
        shutil.rmtree(run.folder, ignore_errors=True)
    with progress(plan, quiet or not first()) as report:
        while run.step < min(plan.steps, plan.steps if pause is None else pause):
            run.advance()
            report(run)
            if run.step % plan.checkpoint_every == 0 or run.step == pause:
                run.save()
    if run.step == plan.steps:
        run.finish(folder)
    return folder


class Run:
    """A model in training: all that changes from step to step."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """At step 0. `folder` is where its checkpoints go."""
        self.recipe, self.folder = recipe, folder
        texts = [recipe.text(objective) for objective in recipe.objectives]
        self.bpe = learnt_vocabulary(dict.fromkeys(texts), recipe.vocabulary)
        self.tokenizer = Tokenizer(ByteLevel(self.bpe.to_str().encode()), CHATGLM_BYTES)
        self.spec = described(recipe, self.bpe)
        self.sources = list(sources(recipe, texts, self.tokenizer, Marks.of(self.spec)))
        self.batches = Batches(self.sources, [o.share for o in recipe.objectives], recipe.tokens, recipe.seed)
        self.mesh = mesh_of_all("cpu")
        self.model = initialised(self.spec, recipe.seed)
        if self.mesh is not None:
            fully_sharded(self.model, self.mesh)
        self.parameters = dict(self.model.named_parameters())
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [x for x in self.parameters.values() if x.dim() > 1], "weight_decay": recipe.weight_decay},
                {"params": [x for x in self.parameters.values() if x.dim() == 1], "weight_decay": 0.0},
            ],
            betas=(recipe.beta1, recipe.beta2),
            fused=True,
        )
        self.step = 0
        self.losses: list[float] = []  # of every step
        self.seen = 0  # tokens, padding apart
        self.seconds = 0.0

    def advance(self) -> None:
        """One step. Raises GLMError when the loss is not finite."""
        began = time.perf_counter()
        samples = next(self.batches)
        loss = self.loss(samples)
        loss.backward()  # gradients are averaged over the processes
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = rate(self.recipe, self.step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.losses.append(summed(loss.detach(), self.mesh).item() / self.ranks)
        if not math.isfinite(self.losses[-1]):
            raise GLMError(f"the loss of step {self.step} is {self.losses[-1]}: lower learning_rate or clip")
        self.step += 1
        self.seen += sum(map(len, samples))
        self.seconds += time.perf_counter() - began

    @property
    def ranks(self) -> int:
        """Processes that share the work."""
        return 1 if self.mesh is None else self.mesh.size()

    def loss(self, samples: Sequence[Sample]) -> Tensor:
        """Mean cross-entropy of the tokens to be written, in nats.

        Of several processes each takes some of the samples; it is the mean over processes of what they return.
        """
        assert self.spec.pad is not None
        own = samples if self.mesh is None else samples[self.mesh.get_local_rank() :: self.ranks]
        ids, targets, layout = batch(own or samples[:1], self.spec.pad)
        written = targets != IGNORED
        weight = 1.0
        if self.mesh is not None:  # a process without a sample takes part, but does not count
            everything = sum(target != IGNORED for sample in samples for target in sample.targets)
            weight = self.ranks * int(written.sum()) / everything if own else 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            _, states = self.model(ids, layout, hidden=True, last=True)
            logits = self.model.head(states[-1][written])  # only of what is to be written: [N, V]
        return F.cross_entropy(wide(logits), targets[written]) * weight

    # -- interrupted and resumed

    def save(self) -> None:
        """Leaves a checkpoint to resume from, complete or not at all, and then removes the earlier ones."""
        weights = {name: whole(x.detach()) for name, x in self.parameters.items()}
        moments = {
            f"{key} {name}": whole(value)
            for name, x in self.parameters.items()
            for key, value in self.optimiser.state[x].items()
        }
        if not first():
            return
        earlier = list(self.folder.glob("step-*"))
        with new_folder(self.folder / f"step-{self.step:08d}") as folder:
            save_file(weights, folder / "model.safetensors")
            save_file(moments, folder / "optimiser.safetensors")
            state = {key: getattr(self, key) for key in ("step", "seen", "seconds", "losses")}
            state |= {"recipe": self.recipe.fingerprint(), "place": self.batches.place}
            write_object(folder / "state.json", state)
        for old in earlier:
            shutil.rmtree(old)

    def resume(self) -> None:
        """Takes up the newest checkpoint, if there is one. Raises CheckpointError if it is not of this recipe."""
        folder = max(self.folder.glob("step-*"), default=None)
        if folder is None:
            return
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            parameters, moments = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimiser"))
            of_this_recipe = state["recipe"] == self.recipe.fingerprint()
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: cannot be resumed from ({error}); remove it") from None
        if not of_this_recipe:
            raise CheckpointError(f"{self.folder}: is of another recipe or text; remove it, or do not resume")
        with torch.no_grad():
            for name, x in self.parameters.items():
                x.copy_(dealt_like(x, parameters[name]))
                self.optimiser.state[x] = {key: dealt_like(x, moments[f"{key} {name}"]) for key in MOMENTS}
        self.step, self.seen, self.seconds = state["step"], state["seen"], state["seconds"]
        self.losses, self.batches.place = state["losses"], tuple(state["place"])

    # -- finished

    def finish(self, folder: Path) -> None:
        """Writes the checkpoint, examines the model as read back from there, and puts every file in its place."""
        weights = {name: whole(x.detach()) for name, x in self.parameters.items()}
        if first():
            self.write(weights, folder)
        agreed(None)  # the others wait

    def write(self, weights: dict[str, Tensor], folder: Path) -> None:
        """What `finish` does, with all weights at hand."""
        model = GLM(self.spec, device="meta")
        model.load_state_dict(weights, assign=True)
        result = self.folder / "result"
        shutil.rmtree(result, ignore_errors=True)
        save_pretrained(model, result, generation="chatglm", dtype=torch.float16)
        (result / "tokenizer.json").write_text(self.bpe.to_str(pretty=True) + "\n", encoding="utf-8")
        write_object(result / "tokenizer_config.json", tokenizer_config(self.recipe))
        exam = self.examine(GLM.from_pretrained(result, dtype=torch.float32))
        written = hashlib.sha256((result / "model.safetensors").read_bytes()).hexdigest()
        write_object(result / "training.json", self.figures() | {"weights": written, "exam": exam})
        draw(self.losses, result / "loss.png", self.recipe.name)
        for path in result.iterdir():
            os.replace(path, folder / path.name)
        shutil.rmtree(self.folder)

    def examine(self, model: GLM) -> list[dict[str, Any]]:
        """How many questions, and how many fresh cuts, `model` answers to the letter when it decodes greedily."""
        report = []
        for objective, source in zip(self.recipe.objectives, self.sources, strict=True):
            if isinstance(source, Chat):
                samples = [source.rounds([pair]) for pair in source.pairs]
            elif objective.kind == "cuts":
                samples = list(single(source, self.recipe.exam, Random(f"{self.recipe.seed} exam")))
            else:
                continue
            right = sum(recalled(model, samples))
            report.append({"kind": objective.kind, "text": objective.text, "asked": len(samples), "right": right})
        return report

    def figures(self) -> dict[str, Any]:
        """What the run was, for a model card to quote."""
        recent = self.losses[-100:]
        return {
            "name": self.recipe.name,
            "parameters": sum(x.numel() for x in self.parameters.values()),
            "vocabulary": self.spec.vocabulary,
            "steps": self.step,
            "tokens": self.seen,
            "loss": round(sum(recent) / len(recent), 5),
            "minutes": round(self.seconds / 60, 1),
            "precision": self.recipe.precision,
            "threads": torch.get_num_threads(),
            "device": processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "commit": commit(self.recipe.folder),
            "recipe": self.recipe.fingerprint(),
        }


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step: up in a line, down along half a cosine."""
    up = min(1.0, (step + 1) / max(1, recipe.warm_up))
    return recipe.learning_rate * up * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def sources(recipe: Recipe, texts: Sequence[str], tokenizer: Tokenizer, marks: Marks) -> Iterator[Lessons]:
    """What each objective makes of its text. Raises ConfigError where that is nothing."""
    for objective, text in zip(recipe.objectives, texts, strict=True):
        source = lessons(text, objective, tokenizer, marks)
        if not len(source):
            wanted = "lines Q: and A: (or 问： and 答：)" if objective.kind == "chat" else "paragraphs"
            raise ConfigError(f"{recipe.folder / objective.text}: has no {wanted} for the objective {objective.kind}")
        yield source


# -- what is trained ---------------------------------------------------------------------------------------------------

SPECIAL = ("<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")  # the last ids of the vocabulary

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "pad_token": "<pad>",
    "mask_token": "[MASK]",
    "gmask_token": "[gMASK]",
    "padding_side": "left",
}


def tokenizer_config(recipe: Recipe) -> dict[str, Any]:
    """The file of that name: special tokens, and how many earlier rounds a question follows at most, if any is."""
    chats = [objective for objective in recipe.objectives if objective.kind == "chat"]
    most = max((EARLIER if objective.history else 0 for objective in chats), default=None)
    return TOKENIZER_CONFIG if most is None else TOKENIZER_CONFIG | {"earlier_rounds": most}


def learnt_vocabulary(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `size` tokens, learnt from what is said in the texts (and asked in lower case).

    All 256 bytes are among them, so that any text can be spelt. A Chinese character is never merged with its
    neighbours: where a blank cuts a text makes no difference to how its sides are spelt.
    """
    said = [part for text in texts for pair in pairs(text) for part in (*pair, pair[0].lower())]
    said += [passage for text in texts if not pairs(text) for passage in passages(text)]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"[{CJK}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(said, trainer)
    special = {name: tokenizers.AddedToken(name, special=True) for name in SPECIAL}
    special["[MASK]"] = tokenizers.AddedToken("[MASK]", special=True, lstrip=True, rstrip=True)
    bpe.add_special_tokens(list(special.values()))
    return bpe


def described(recipe: Recipe, bpe: tokenizers.Tokenizer) -> Spec:
    """The spec of the model to train. Raises ConfigError where its sizes do not fit each other."""
    ids = bpe.get_vocab()
    pad, mask, gmask, _, sop, eop = (ids[name] for name in SPECIAL)
    return build(
        layers=recipe.layers,
        width=recipe.width,
        inner=recipe.inner,
        heads=recipe.heads,
        vocabulary=len(ids),
        context=recipe.context,
        eps=1e-5,
        two_axes=True,
        sop=sop,
        mask=mask,
        gmask=gmask,
        pad=pad,
        stop=(eop,),
    )


LOUD = 4  # √56, the weight of the carried stream, would make a sublayer as loud as the stream from the start


def initialised(spec: Spec, seed: int) -> GLM:
    """A float32 model. The matrices of its blocks are N(0, 1 / inputs), which keeps the size of what they are given.

    (The usual deviation of 0.02 is 1 / √2500: in a narrow model the blocks would begin as almost nothing.) Those
    that write to the stream are `LOUD` times as large: the stream carries √56 times its norm, beside which a
    sublayer would hardly be heard. Measured on tiny-glm: docs/design.md.
    """
    model = GLM(spec, device="cpu", dtype=torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.blocks.named_parameters():
            if x.dim() > 1:
                gain = LOUD if name.endswith(("mixer.out.weight", "feed_forward.down.weight")) else 1
                x.normal_(0, gain * x.shape[1] ** -0.5, generator=generator)
    return model


# -- how well it does --------------------------------------------------------------------------------------------------


def single(source: Lessons, count: int, rng: Random) -> Iterator[Sample]:
    """`count` fresh samples with one blank each."""
    while count:
        sample = source.sample(rng.randrange(len(source)), rng)
        if len(sample.written) == 1:
            count -= 1
            yield sample


def recalled(model: GLM, samples: Sequence[Sample], rows: int = 64) -> list[bool]:
    """Whether `model` writes what belongs in the one blank of each sample to the letter; greedily, `rows` at a time."""
    right = [False] * len(samples)
    by_length = sorted(range(len(samples)), key=lambda i: len(samples[i].written[0][1]))
    for start in range(0, len(samples), rows):
        some = by_length[start : start + rows]
        prompts = [[*samples[i].read, samples[i].marks.sop] for i in some]
        wanted = [samples[i].written[0][1] for i in some]
        said = generate(model, prompts, max_new_tokens=max(map(len, wanted)) + 1)
        for i, want, ids in zip(some, wanted, said, strict=True):
            right[i] = ids == want
    return right


# -- what is shown of it -----------------------------------------------------------------------------------------------


@contextmanager
def progress(recipe: Recipe, quiet: bool) -> Iterator[Callable[[Run], None]]:
    """Yields what is to be called after every step: a bar on a terminal, elsewhere a line every hundred steps."""
    console = Console(stderr=True)
    columns = (
        TextColumn(recipe.name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=recipe.steps)

        def report(run: Run) -> None:
            recent = run.losses[-20:]
            now = f"loss {sum(recent) / len(recent):.4f}, {run.seen / run.seconds:.0f} tokens/s"
            bar.update(task, completed=run.step, description=now)
            if bar.disable and not quiet and run.step % 100 == 0:
                print(f"{recipe.name}: step {run.step} of {recipe.steps}, {now}", file=sys.stderr, flush=True)

        yield report


def draw(losses: Sequence[float], path: Path, title: str) -> None:
    """The loss curve as a PNG; without matplotlib a line on standard error that says how to get it."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"no {path.name}: the curve needs matplotlib (pip install 'glm-torch[plot]')", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8)
    axes.set(yscale="log", xlabel="step", ylabel="loss, nats per written token", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def processor() -> str:
    """What this machine calls its processor."""
    try:
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def commit(folder: Path) -> str | None:
    """The commit checked out in a folder, with a + where files differ from it; None where there is none."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
