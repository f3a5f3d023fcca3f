"""Calls that are checked once for their shapes and keywords.

Small calls would take longer to check than to compute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ._adapters import common_adapter, is_array
from ._request import Request, checked
from .masks import TOLD, Dense

Array = Any

_PLAIN = frozenset({type(None), bool, int, float, str})
_ARRAYS = ("bias", "query_offset", "key_offset")  # that a request to be kept may have, with masks
_KEPT: dict[Any, Request] = {}  # by what they are made of, without their arrays
_MOST = 256


def make_request(query: Array, key: Array, value: Array, **given: Any) -> Request:
    """Return what `checked` does.

    It is asked once for the shapes and keywords of calls without functions, whose arrays are
    tokens, a bias, offsets and those of masks.
    """
    mask, rest = given["mask"], given
    told = ((), []) if mask is None else _told(mask)
    own = ((name, given[name]) for name in _ARRAYS)
    arrays = {name: x for name, x in own if type(x) not in _PLAIN and is_array(x)}
    if arrays or mask is not None:
        rest = given | dict.fromkeys(("mask", *arrays))
    types = tuple(map(type, rest.values()))
    if told is None or not _PLAIN.issuperset(types):
        return checked(query, key, value, **given)
    form, held = told
    tokens = {"query": query, "key": key, "value": value}
    more = [*arrays.items(), *(("mask", x) for one in held for x in one.values())]
    xp = common_adapter([*tokens.items(), *more])
    settings = [xp.setting(query), *(xp.setting(x) for _, x in more)]
    if None in settings:
        return checked(query, key, value, **given)
    inputs = xp.promoted(tokens)
    sizes = [part for x in inputs.values() for part in (x.shape, x.dtype)]
    sizes += [part for name, x in more for part in (name, x.shape, x.dtype)]
    # 1 == True, but for their types
    made_of = (xp, form, *settings, *sizes, types, *rest, *rest.values())
    kept = _KEPT.get(made_of)
    if kept is None:
        kept = _without_arrays(checked(query, key, value, **given))
        if len(_KEPT) >= _MOST:
            _KEPT.clear()
        _KEPT[made_of] = kept
    data = kept.data
    if more:
        mine = iter(held)
        masks = tuple(next(mine) if names else {} for names in data["masks"])
        data = data | arrays | {"masks": masks}
        if "bias" in arrays:
            inputs["bias"] = data.pop("bias")
    return Request(xp, kept.spec, data, inputs, kept.chunks_given, kept.known)


def _told(mask: Any) -> tuple[Any, list[dict[str, Array]]] | None:
    """Return what tells masks but for their arrays, and these by field, mask by mask.

    None where that does not tell them: functions, the caller's own, and what is no mask.
    """
    forms, arrays = [], []
    for given in mask if isinstance(mask, tuple) else (mask,):
        one = given if type(given) in TOLD or not is_array(given) else Dense(given)
        if type(one) not in TOLD:
            return None
        fields = vars(one)
        held = {name: x for name, x in fields.items() if type(x) not in _PLAIN}
        if not all(map(is_array, held.values())):
            return None
        plain = ((type(x), x) for name, x in fields.items() if name not in held)
        forms.append((type(one), *held, *plain))
        if held:
            arrays.append(held)
    return tuple(forms), arrays


def _without_arrays(request: Request) -> Request:
    """Return a request to be kept, with None in the place of its arrays."""
    data = {name: None if is_array(x) else x for name, x in request.data.items()}
    data["masks"] = tuple(dict.fromkeys(held) for held in request.data["masks"])
    return replace(request, inputs={}, data=data)
