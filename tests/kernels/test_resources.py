"""Every kernel, compiled without a GPU for every device in every form it can be launched in."""

import json
import sys
from importlib.metadata import version

import pytest
from harness import PROJECT, directly, needs_triton

pytestmark = [directly, needs_triton]
COMMITTED = json.loads((PROJECT / "kernels" / "results" / "resources.json").read_text())


def test_every_variant_needs_what_the_table_says() -> None:
    """No register of a hot kernel spills, shared memory fits the device, and all is as committed."""
    sys.path.insert(0, str(PROJECT / "kernels" / "bench"))
    import resources
    from glm_kernels.variants import TARGETS

    rows = resources.table(resources.everything())
    limits = {str(target.arch): target.shared for target in TARGETS}
    hot = {
        (variant.name, str(t.arch))
        for m in resources.MODULES
        for t in TARGETS
        for variant in m.variants(t)
        if variant.hot
    }
    for name, row in rows.items():
        for arch, (_, spilled, shared) in row.items():
            assert shared <= limits[arch], (name, arch)
            assert spilled == 0 or (name, arch) not in hot, (name, arch)
    if COMMITTED["versions"]["triton"] != version("triton"):
        pytest.skip("the table was made by another version of Triton")
    assert rows == COMMITTED["variants"], "run `python kernels/bench/resources.py` and look at what it changes"
