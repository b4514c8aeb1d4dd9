"""What does the provenance say of each row?  Which row of a fit it was, and what the fit measured of it."""

from collections.abc import Mapping
from typing import Any, TypeGuard, cast

from melbo_lens.arguments import plain_json


def checked_provenance(provenance: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Returns a copy in JSON's types, without row numbers if there isn't one for each of the n rows, as of a mean.

    Raises:
        ValueError: it is no mapping, or doesn't list what was done to the rows.
    """
    if not isinstance(cast(Any, provenance), Mapping):  # a file may hold anything
        raise ValueError(f"provenance must be a mapping of settings; got {type(provenance).__name__}.")
    said: dict[str, Any] = plain_json(provenance, "provenance")
    if not isinstance(said.get("derived", []), list):
        raise ValueError(f"provenance['derived']={said['derived']!r} must list what was done to the rows.")
    if "rows" in said and not (_are_numbers(said["rows"]) and len(said["rows"]) == n):
        del said["rows"]
    return said


def at_the_fit(provenance: Mapping[str, Any], n: int, sign: int = 1) -> tuple[list[float], list[bool]]:
    """The effect that each of n rows, or minus each, had when it was fitted, and whether it had run into a sink.

    Rows that were derived by more than their sign, or were not fitted, know neither: their effects are NaN.
    """
    found = _known(provenance, sign)
    if found is None or len(found) != n:
        return [float("nan")] * n, [False] * n
    return [effect for effect, _ in found], [sunk for _, sunk in found]


def says_within_block(said: Any) -> bool:
    """Whether a provenance, or that of what was joined or controlled, tells of a block that changes what is added."""
    if not isinstance(said, Mapping):
        return False
    known = cast(Mapping[str, Any], said)
    parts = cast(list[Any], known["parts"]) if isinstance(known.get("parts"), list) else []
    return known.get("within_block") is True or any(map(says_within_block, [known.get("matched_to"), *parts]))


def _known(said: Any, sign: int) -> list[tuple[float, bool]] | None:
    """The effect of each row, or of minus each, that this provenance is of, and whether it sank; None if not known."""
    if not isinstance(said, Mapping):
        return None
    known = cast(Mapping[str, Any], said)
    derived = known.get("derived", [])
    if not isinstance(derived, list) or any(how != "negated" for how in cast(list[Any], derived)):
        return None
    sign *= (-1) ** len(cast(list[Any], derived))
    side = known if sign > 0 else known.get("minus")
    if "parts" in known:  # joined rows, in the order of their parts, which may be joined themselves
        listed = cast(list[Any], known["parts"]) if isinstance(known["parts"], list) else [None]
        parts = [_known(part, sign) for part in listed]
        every = [row for part in parts for row in part or []] if None not in parts else None
    elif _is_of_fit(side):
        every = [(effect, i in side.get("sinks", [])) for i, effect in enumerate(side["effects"])]
    else:
        every = None
    rows = known.get("rows")
    if every is None or rows is None:
        return every
    if not _are_numbers(rows) or not all(0 <= i < len(every) for i in rows):
        return None
    return [every[i] for i in rows]


def _is_of_fit(side: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether this is what a fit measured of rows; a user may keep other things under these names."""
    if not isinstance(side, Mapping):
        return False
    known = cast(Mapping[str, Any], side)
    effects = known.get("effects")
    fitted = isinstance(effects, list) and all(isinstance(one, int | float) for one in cast(list[Any], effects))
    return fitted and _are_numbers(known.get("sinks", []))


def _are_numbers(entry: Any) -> bool:
    return isinstance(entry, list) and all(isinstance(one, int) for one in cast(list[Any], entry))
