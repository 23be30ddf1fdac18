"""Texts and labels of a data set that somebody else wrote: in our order of classes, or refused."""

import re

from zsaa.models import AssetError

_SAME_LABEL = {"neg": "negative", "pos": "positive"}  # the hub's names for ours
_HINTS = {
    "-1": " (-1 marks the hidden labels of a GLUE test set)",
    "-100": " (-100 marks what a loss leaves out: remove such rows)",
}


def check_texts(columns, where):
    """AssetError unless each value is a text, and one of each row's is not empty."""
    for row, values in enumerate(zip(*columns), start=1):
        for value in values:
            if not isinstance(value, str):
                what = "none" if value is None else f"{value!r:.40}, which is no text,"
                raise AssetError(f"row {row} of {where} has {what} where a text belongs. Mend or remove it")
        if not any(map(str.strip, values)):
            raise AssetError(f"row {row} of {where} has an empty text. Fill it in, or remove the row")


def in_our_order(values, names, ours, where):
    """`values` as numbers in the order of `ours`. names: those of the classes in the order of the data, if known. Words
    are names of `ours`, and numbers go by `names`, where there are some: another order would swap the classes."""
    order = {_label_name(name): number for number, name in enumerate(ours)}
    order |= {str(number): number for number in range(len(ours))}

    def remedy(hint=""):
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(ours))
        return f"labels are 0 to {len(ours) - 1}{hint}, or their names: {listed}"

    by_number = dict(enumerate(range(len(ours)) if names is None else (order.get(_label_name(n)) for n in names)))
    called = "" if names is None else f" (its classes are called {', '.join(map(str, names))})"
    known = [number for number in by_number.values() if number is not None]
    if len({*known}) < len(known):
        raise AssetError(f"{where} calls two classes alike{called}; {remedy()}")
    translated = {}
    for row, value in enumerate(values, start=1):
        key = type(value), value
        if key not in translated:
            text = str(value).strip()
            if re.fullmatch(r"\d+(\.0+)?", text):
                found = by_number.get(int(float(text)))
            else:
                found = order.get(_label_name(text)) if isinstance(value, str) else None
            if found is None:
                hint = " (fill it in, or remove the row)" if value is None or not text else _HINTS.get(text, "")
                raise AssetError(f"row {row} of {where} has the label {value!r}{called}; {remedy(hint)}")
            translated[key] = found
    return [translated[type(value), value] for value in values]


def _label_name(name):
    plain = re.sub(r"[\W_]+", "_", str(name).strip().lower())
    if str(name).strip()[:1] in "+-.":  # -1 is not 1
        return plain
    plain = plain.strip("_").removeprefix("label_")  # transformers' LABEL_0
    return _SAME_LABEL.get(plain, plain)
