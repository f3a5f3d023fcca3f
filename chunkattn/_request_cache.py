"""Calls that are checked once for their shapes and keywords.

Small calls would take longer to check than to compute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ._adapters import common_adapter, is_array
from ._mask import each_of
from ._problem import TOKENS
from ._request import Request, checked
from .masks import TOLD, Dense

Array = Any

_PLAIN = frozenset({type(None), bool, int, float, str})
_ARRAYS = ("bias", "query_offset", "key_offset")  # that a request to be kept may have, with masks
_KEPT: dict[Any, Request] = {}  # by what they are made of, without their arrays
_MOST = 256


class _Told(NamedTuple):
    """Keywords: what tells them but for their arrays, and these with their names.

    `held` has those of masks once more by field, mask by mask, of the masks that have any.
    """

    form: tuple[Any, ...]
    arrays: tuple[tuple[str, Array], ...] = ()
    held: tuple[dict[str, Array], ...] = ()


def make_request(tokens: tuple[Array, Array, Array], given: dict[str, Any]) -> Request:
    """Return what `checked` does of the tokens and the keywords that are `given`.

    It is asked once for the shapes and keywords of calls without functions, whose arrays are
    tokens, a bias, offsets and those of masks.
    """
    told = _told(given)
    if told is None:
        return checked(*tokens, **given)
    form, arrays, held = told
    named = (*zip(TOKENS, tokens, strict=True), *arrays)
    xp = common_adapter(named)
    setting = xp.setting([x for _, x in named])
    if setting is None:
        return checked(*tokens, **given)
    inputs = xp.promoted(dict(named[:3]))
    sizes = [part for x in inputs.values() for part in (x.shape, x.dtype)]
    sizes += [part for name, x in arrays for part in (name, x.shape, x.dtype)]
    made_of = xp, setting, form, *sizes
    kept = _KEPT.get(made_of)
    if kept is None:
        kept = _without_arrays(checked(*tokens, **given))
        if len(_KEPT) >= _MOST:
            _KEPT.clear()
        _KEPT[made_of] = kept
    data = kept.data
    if arrays:
        mine = iter(held)
        masks = tuple(next(mine) if names else {} for names in data["masks"])
        own = {name: x for name, x in arrays if name != "mask"}
        data = data | own | {"masks": masks}
        if "bias" in own:
            inputs["bias"] = data.pop("bias")
    return Request(xp, kept.spec, data, inputs, kept.chunks_given, kept.known)


def _told(given: dict[str, Any]) -> _Told | None:
    """Return what tells the keywords; None where more than that does."""
    types = tuple(map(type, given.values()))
    if _PLAIN.issuperset(types):
        return _Told((types, *given, *given.values()))  # 1 == True, but for their types
    masks = _told_masks(given["mask"])
    if masks is None:
        return None
    forms, held = masks
    own = ((name, given[name]) for name in _ARRAYS)
    arrays = {name: x for name, x in own if type(x) not in _PLAIN and is_array(x)}
    given = given | dict.fromkeys(("mask", *arrays))
    types = tuple(map(type, given.values()))
    if not _PLAIN.issuperset(types):
        return None
    named = (*arrays.items(), *(("mask", x) for one in held for x in one.values()))
    return _Told((forms, types, *given, *given.values()), named, tuple(held))


def _told_masks(mask: Any) -> tuple[tuple[Any, ...], list[dict[str, Array]]] | None:
    """Return what tells masks but for their arrays, and these by field, mask by mask.

    None where that does not tell them: functions, the caller's own, and what is no mask.
    """
    forms, arrays = [], []
    for given in each_of(mask):
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
