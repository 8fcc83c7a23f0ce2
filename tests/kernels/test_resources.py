"""Every kernel, compiled without a GPU for every device in every form it can be launched in."""

import json
import sys
from importlib.metadata import version

import pytest
from harness import PROJECT, directly, needs_triton

pytestmark = [directly, needs_triton]
COMMITTED = json.loads((PROJECT / "kernels" / "results" / "resources.json").read_text())


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "everything"])
def test_every_variant_needs_what_the_table_says(everything: bool) -> None:
    """No register of a hot kernel spills, shared memory fits the device, and all is as committed.

    The slow test compiles everything; the quick one for sm_90, without the forms in float16.
    """
    sys.path.insert(0, str(PROJECT / "kernels" / "bench"))
    import resources
    from glm_kernels.variants import TARGETS

    archs = {str(target.arch) for target in TARGETS} if everything else {"90"}
    rows = resources.table(resources.everything(twins=everything, archs=archs))
    limits = {str(target.arch): target.shared for target in TARGETS}
    for name, row in rows.items():
        for arch, (_, _, shared) in row.items():
            assert shared <= limits[arch], (name, arch)
    if COMMITTED["versions"]["triton"] != version("triton"):  # 3.6 has two hot kernels spill, 40 bytes and 8
        pytest.skip("registers are those of another version of Triton")
    hot = {(v.name, str(t.arch)) for m in resources.MODULES for t in TARGETS for v in m.variants(t) if v.hot}
    for name, row in rows.items():
        for arch, (_, spilled, _) in row.items():
            assert spilled == 0 or (name, arch) not in hot, (name, arch)
    names = COMMITTED["variants"] if everything else rows
    committed = {name: {arch: COMMITTED["variants"][name].get(arch) for arch in archs} for name in names}
    assert {name: {arch: row.get(arch) for arch in archs} for name, row in rows.items()} == committed, (
        "run `python kernels/bench/resources.py` and look at what it changes"
    )
