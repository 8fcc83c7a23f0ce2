"""What importing does: nothing to transformers, little by itself, and nothing to the public names."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def run(program: str, *first: Path) -> str:
    """What a fresh interpreter prints, with the folders `first` first on its sys.path."""
    paths = "".join(f"sys.path.insert({i}, {str(path)!r}); " for i, path in enumerate(first))
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; {paths}{program}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PROJECT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("first", [[PROJECT], [PROJECT, PROJECT / "kernels"]], ids=len)
def test_transformers_imports_beside_the_repository(first: list[Path]) -> None:
    """A folder `kernels` or a module name of ours must not stand in for a package that transformers looks for."""
    program = (
        "import transformers; from transformers import GlmForCausalLM, Glm4ForCausalLM; "
        "from transformers.models.glm4 import modeling_glm4; print(Glm4ForCausalLM.__name__, transformers.__file__)"
    )
    name, file = run(program, *first).split()
    assert name == "Glm4ForCausalLM"
    assert PROJECT not in Path(file).parents or ".venv" in Path(file).parts


def test_import_glm_costs_nothing() -> None:
    heavy = "('torch', 'transformers', 'tokenizers', 'rich', 'numpy')"
    assert run(f"import glm; print([name for name in {heavy} if name in sys.modules])", PROJECT).strip() == "[]"


EVERYTHING = (
    "import pkgutil, importlib, glm; "
    "[importlib.import_module(m.name) for m in pkgutil.walk_packages(glm.__path__, 'glm.') "
    "if not m.name.endswith(('__main__', '_child'))]; "
)


def test_no_module_imports_transformers() -> None:
    assert run(EVERYTHING + "print('transformers' in sys.modules, len(sys.modules) > 100)", PROJECT) == "False True\n"


@pytest.mark.parametrize("before", ["import glm; ", EVERYTHING], ids=["lazily", "after all submodules"])
def test_public_names_are_what_they_say(before: str) -> None:
    """A submodule of the same name would take a function's place in the package."""
    names = "[name for name in glm.__all__ if type(getattr(glm, name)).__name__ == 'module']"
    assert run(f"{before} print({names}, {names}, len(glm.__all__) > 15)", PROJECT) == "[] [] True\n"


FIRST_TOKEN = (
    "import glm; tok = glm.Tokenizer.from_pretrained(glm.embedded()); "
    "engine = glm.Engine.from_pretrained(glm.embedded(), device='cpu'); "
    "ids = tok.chat([{'role': 'user', 'content': 'What is blank infilling?'}]); "
    "print(len(engine.generate([ids], max_new_tokens=2)[0])); "
)
UNNEEDED = (
    "transformers", "matplotlib", "sympy", "networkx", "torch._dynamo", "torch._inductor", "torch.distributed.tensor",
    "huggingface_hub", "httpx", "requests", "rich", "typer", "jinja2", "safetensors", "glm.cli", "glm.training",
)  # fmt: skip


def test_the_first_token_of_an_engine_needs_little() -> None:
    """From an empty process to a token. torch's compiler alone, which its custom_op imports, takes over a second."""
    said = run(FIRST_TOKEN + f"print([name for name in {UNNEEDED} if name in sys.modules])", PROJECT)
    assert said.splitlines() == ["2", "[]"]


def test_the_compiler_is_heeded_where_it_is() -> None:
    """In a process that has torch's compiler, the kernels are called as `torch.library.custom_op` calls them."""
    program = (
        "import torch, torch._dynamo; from glm_kernels import rms_norm; calls = []; disable = torch.compiler.disable; "
        "torch.compiler.disable = lambda f: calls.append(f.__name__) or disable(f); "
        "x = torch.randn(2, 8); y = [rms_norm(x, torch.ones(8), 1e-5, weight_first=True) for _ in range(2)]; "
        "print(calls, torch.equal(*y))"
    )
    assert run(program, PROJECT, PROJECT / "kernels") == "['norm'] True\n"
