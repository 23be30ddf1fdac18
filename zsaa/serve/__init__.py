"""A server whose alpha follows its queue: `python -m zsaa.serve --model smollm2-135m` (docs/serving.md).

controller.py decides, costs.py tells it what requests cost, simulate.py plays it without a model; engine.py runs
models in batches, on a GPU in a process of their own (apart.py), lane.py is the queue before one, app.py speaks HTTP,
cluster.py puts all that on Ray Serve; load.py measures.
"""
