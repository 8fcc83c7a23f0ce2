"""Copy golden folders into tests/goldens, leaving out what adds nothing, to stay below 12 MB.

    python tests/trim_goldens.py ../shared/goldens [CASE…]

Left out are
    cases       whose spec is that of another up to sizes (EXPENDABLE; the tests verify them where they are found)
    scenarios   whose layout another case of the generation has too
    tensors     float32 logits of which there are float64 ones, inputs that stand in a second file, the reference's
                own half precision logits (meta.json has their errors), and what no check reads
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile, rmtree

from safetensors.torch import load_file, save_file
from torch import Tensor

DENSE = ("glm10b-", "glm130b-", "chatglm1-", "chatglm2-", "chatglm3-", "glm4-9b-", "hf_glm-", "hf_glm4-")
EXPERTS = ("hf_glm4_moe-", "hf_glm4_moe_lite-", "hf_glm_moe_dsa-")
EXPENDABLE = (
    "chatglm2-base",  # as chatglm3-base
    "chatglm2-int8",  # names as chatglm2-int4, bits as chatglm1-int8
    "chatglm3-32k-rope_base",  # as glm4-9b-chatglm_format
    "hf_glm4_moe-qknorm",  # as hf_glm4_moe-sensitive
    "hf_glm4_moe_lite-mla",  # as hf_glm4_moe_lite-sensitive
)
SPARE = {  # scenarios by the beginning of the case's name
    "chatglm1-base": ("mask_with_target", "gmask_with_target"),  # in chatglm1-sensitive
    "chatglm1-ptuning": ("batch",),
    "glm10b-sensitive": ("right_pad",),
    "chatglm2": ("batch", "gapped_positions"),
    "chatglm3": ("batch",),
    "glm4-9b": ("batch", "gapped_positions"),
}
INPUTS = ("input_ids", "position_ids", "attention_mask", "tokens", "generated", "labels", ".loss")
OTHERS = ("dequantised.", "rotary.inv_freq", "prefix.past_key_values")


def needed(name: str) -> bool:
    """Whether a check reads the tensor, logits apart."""
    return name.endswith(INPUTS) or ".hidden." in name or name.startswith(OTHERS)


def trim(source: Path, target: Path) -> None:
    """One case."""
    rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        copyfile(source / name, target / name)
    meta = json.loads((source / "meta.json").read_text())
    kept = {key: value for key, value in meta.items() if key not in ("tensors", "state_dict")}
    (target / "meta.json").write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n")

    spare = {name for case, names in SPARE.items() if source.name.startswith(case) for name in names}

    def chosen(file: str, read: Callable[[str], bool]) -> dict[str, Tensor]:
        tensors = load_file(source / file)
        return {name: x for name, x in tensors.items() if name.split(".")[0] not in spare and read(name)}

    exact = chosen("reference64.safetensors", lambda name: name.endswith(("logits", "logits_tanh_gelu", ".loss")))
    save(exact, target / "reference64.safetensors")
    single = chosen("reference.safetensors", lambda name: needed(name) and name not in exact)
    save(single, target / "reference.safetensors")
    if (source / "reference_bf16.safetensors").exists():
        half = chosen("reference_bf16.safetensors", lambda name: name.endswith((*INPUTS, "_of_bf16_weights")))
        save(half, target / "reference_bf16.safetensors")


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file that everybody may read."""
    save_file(tensors, path)
    path.chmod(0o644)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    ours = [path.name for path in root.iterdir() if path.name.startswith((*DENSE, *EXPERTS))]
    for case in sys.argv[2:] or sorted(set(ours) - set(EXPENDABLE)):
        trim(root / case, Path(__file__).parent / "goldens" / case)
