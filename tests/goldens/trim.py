"""Copy golden folders, leaving out what `glm verify` never reads.

    python tests/goldens/trim.py ../shared/goldens [CASE…]

Left out: float32 logits of which float64 ones exist, inputs that stand in a second file, tensors under names that
no check knows, and the lists of tensors in meta.json.
"""

import json
import sys
from pathlib import Path
from shutil import copyfile

from safetensors.torch import load_file, save_file

DENSE = ("chatglm1-", "chatglm2-", "chatglm3-", "glm4-9b-", "hf_glm-", "hf_glm4-")
READ = ("input_ids", "position_ids", "attention_mask", "tokens", "generated", "inv_freq", "past_key_values")
INPUTS = ("input_ids", "position_ids", "attention_mask", "decode.tokens", "decode.position_ids")


def needed(name: str) -> bool:
    """Whether a check reads the tensor."""
    return name.endswith(READ) or ".logits" in name or ".hidden." in name or name.startswith("dequantised.")


def trim(source: Path, target: Path) -> None:
    """One case."""
    target.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        copyfile(source / name, target / name)
    meta = json.loads((source / "meta.json").read_text())
    kept = {key: value for key, value in meta.items() if key not in ("tensors", "state_dict")}
    (target / "meta.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")

    exact = load_file(source / "reference64.safetensors")
    logits = {name: x for name, x in exact.items() if x.is_floating_point() and needed(name)}
    single = load_file(source / "reference.safetensors")
    save_file(
        {name: x for name, x in single.items() if needed(name) and name not in logits},
        target / "reference.safetensors",
    )
    save_file(logits, target / "reference64.safetensors")
    for file in source.glob("reference_*16.safetensors"):
        save_file({name: x for name, x in load_file(file).items() if needed(name)}, target / file.name)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for case in sys.argv[2:] or sorted(path.name for path in root.iterdir() if path.name.startswith(DENSE)):
        trim(root / case, Path(__file__).parent / case)
