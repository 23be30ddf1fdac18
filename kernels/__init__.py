"""Triton kernels for NVIDIA GPUs, and what they compute in plain PyTorch.

attention.py   attention with its log-sum-exp, and the attention that each key receives
rows.py        choosing the rows that go on, moving them, rotary embedding
layer.py       residual add and norm, SwiGLU: in half precision without gradient
decode.py      one new token over a cache whose layers hold different numbers of rows
pack.py        many tensors copied by one launch: what a replayed CUDA graph hands out
naive.py       attention, norms and SwiGLU in plain PyTorch; needs no Triton

zsaa.fast.dispatch chooses between the kernels and PyTorch's own. Triton comes with CUDA builds of PyTorch (or with
`pip install zsaa[gpu]`); nothing here imports it until a kernel is used.
"""
