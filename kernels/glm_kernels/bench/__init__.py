"""Measures every kernel beside its peers and beside the limits of the device, in one process.

    python -m glm_kernels.bench all --out kernels/results/

A subject (attention, decode, norms …) lists cases, which are shapes of published models; for each case it names the
sides, ours and every peer that can be imported. `check` compares what each side computes with float64, `timing`
measures those that pass, `roofs` how fast the device reads and multiplies. `run` writes what comes out into
results/<device>.json after every case; `report` and `plots` make tables and pictures of it, with the `goals` beside.

A new kernel is one more file with a SUBJECT, named in `command.SUBJECTS`, and its goals in `goals.GOALS`.
"""
