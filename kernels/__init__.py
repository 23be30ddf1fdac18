"""Triton kernels for NVIDIA GPUs, and what they compute in plain PyTorch.

attention.py   attention with its log-sum-exp, and the attention that each key receives
naive.py       the same in plain PyTorch; needs no Triton

zsaa.attention chooses between the kernels and PyTorch's own. Triton comes with CUDA builds of PyTorch (or with
`pip install zsaa[gpu]`); nothing here imports it until a kernel is used.
"""
