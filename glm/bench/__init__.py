"""Measures the engine: how fast it decodes and reads, what memory it takes, how soon it begins, how it serves.

    glm bench decode glm-4-9b --weights int4 --batch 1 --context 1024
    glm bench all --out kernels/results/

Everything runs on random weights at the published shapes, so that nothing is downloaded. In one process stand beside
the engine transformers and a compiled model of plain PyTorch, on the same weights and in turn; a side gets a figure
only if its logits and its tokens passed the check of `truth.py` in that run. What is counted is in `work.py`, what is
aimed at in `goals.py`.
"""
