"""The alpha slider: drag alpha and see what a model keeps, says and costs. Works in JupyterLab, VS Code and Colab.

    zsaa.slider(model, tokenizer, "A text of your own.")                    # needs the extra: pip install 'zsaa[lab]'
    zsaa.slider(model, tokenizer, text).export("view.html")                 # one page that needs no kernel

engine.py runs the model at one setting, worker.py keeps that off the notebook's path, widget.py answers the browser,
page.py writes the page without a kernel, slider.js draws both. This package is light: nothing but torch is imported
before a slider is opened.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def open_slider(model: Any, tokenizer: Any, text: Any = None, **options: Any):
    """A widget for `model` on `text` (one text, several, or {name: text}; without one, held-out film reviews).

    The model is not touched: the slider runs a second module tree over the same weights, with a dial of its own, in one
    background thread. `model` may have its dial on or not. Options, attributes and errors: zsaa.slider.widget.Slider.
    """
    try:
        from zsaa.slider.widget import Slider
    except ModuleNotFoundError as error:
        if error.name not in ("anywidget", "ipywidgets", "traitlets"):
            raise
        raise ModuleNotFoundError(
            f"the slider needs {error.name}, which is not installed: pip install 'zsaa[lab]' (Colab has it).",
            name=error.name,
        ) from None
    return Slider(model, tokenizer, text, **options)


class _Opens(ModuleType):
    """Importing a subpackage binds its name in the package above, so `zsaa.slider` is this module whatever else is
    done; being callable, it is the function as well."""

    __call__ = staticmethod(open_slider)


sys.modules[__name__].__class__ = _Opens
