"""Where a checkpoint comes from: a folder on this machine, or the Hugging Face hub.

From the hub only weights, configs and vocabularies are taken, never code. `HF_HOME`, `HF_HUB_OFFLINE`,
`HF_ENDPOINT` and `HF_TOKEN` mean what they always do.
"""

import os
import re
from pathlib import Path

from glm.errors import CheckpointError

TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*LICENSE*",
)
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
BINS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
SUBFOLDERS = ("*/*",)  # other formats of the same weights, in the repositories that have them
PREPACKED = (
    "prepacked.safetensors"  # made where it is used (`glm.runtime.prepacked`), never fetched nor counted as weights
)


def fetch(
    source: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True, bin: bool = False
) -> Path:
    """The folder of `source`: itself if it is one, else the hub's files under that id, downloaded unless cached.

    `revision` is a branch, tag or commit on the hub. Without `weights` only configs and vocabularies are fetched;
    `bin` takes .bin files where the hub has no safetensors, for `glm convert` alone. Raises CheckpointError when
    `source` is neither a folder nor an id, cannot be fetched, or has no safetensors.
    """
    folder = Path(os.path.expanduser(source))
    if str(source) and folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source}: is a folder, which has no revision {revision!r}; leave it out")
        return folder
    if folder.is_file():
        raise CheckpointError(f"{source}: is a file; name the folder it lies in")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", str(source)):
        raise CheckpointError(f"{source}: there is no such folder, and a hub id looks like zai-org/chatglm3-6b")
    if not weights:
        return download(str(source), revision, TEXTS)
    folder = download(str(source), revision, TEXTS + SAFETENSORS)
    if any(path.name != PREPACKED for path in folder.glob("*.safetensors")):
        return folder
    if bin:
        return download(str(source), revision, TEXTS + BINS)
    raise CheckpointError(
        f"{source}: has no .safetensors files on the hub; if it has .bin files, run `glm convert {source} DST` "
        "once and load DST"
    )


def download(id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The hub's files of one repository that match `patterns`, in the local cache."""
    from huggingface_hub import snapshot_download  # with its HTTP library slower to import than a folder to open

    try:
        ignored = [*SUBFOLDERS, PREPACKED]
        return Path(snapshot_download(id, revision=revision, allow_patterns=[*patterns], ignore_patterns=ignored))
    except Exception as error:  # of the hub's library, of its HTTP library, of the disk: they differ by version
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{id}: there is no such folder, and the hub does not give it: {reason}") from error
