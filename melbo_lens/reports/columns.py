"""What do the tables and the map of a page hold?  Columns of numbers and texts, each text once, packed for its script.

What is packed is compressed and in letters that can't be markup, whatever a model wrote.
"""

import base64
import gzip
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from melbo_lens.evaluation.departures import kinds_of
from melbo_lens.evaluation.rates import Behavior, shows
from melbo_lens.reports.findings import Findings
from melbo_lens.reports.measuring import plane
from melbo_lens.search.cards import anchor, namer
from melbo_lens.search.groups import signed
from melbo_lens.search.written import Written

KEYS = ["trial", "vector", "sign"]
MOST_ROWS = 250_000
MOST_READ = 2000  # characters of a direction's texts that place it on the map
MOST_WORDS = 512  # whose counts place it
FACTS = "method source_layer target_layer radius relative_radius effect".split()


def packed(value: Any) -> str:
    """Returns a value of JSON's types as compressed JSON in base 64."""
    data = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return base64.b64encode(gzip.compress(data.encode(), 6, mtime=0)).decode()


def columns(findings: Findings, written: Written) -> dict[str, Any]:
    """Returns the columns of the completions and of the directions, with the texts that they point to."""
    rows = written.rows.head(MOST_ROWS)
    codes, texts = pd.factorize(rows.text)
    directions = _directions(findings, written)
    number = {key: i for i, key in enumerate(directions[KEYS].itertuples(index=False, name=None))}
    known = rows.vector.notna()
    keys = zip(rows.trial, rows.vector.fillna(-1), rows.sign, strict=True)
    of_direction = [number.get((int(t), int(v), int(s)), -1) for t, v, s in keys]
    return {
        "texts": list(texts),
        "shown": _shown(texts, findings.behaviors),
        "behaviors": list(findings.behaviors),
        "prompts": rows.drop_duplicates("prompt").sort_values("prompt").prompt_text.tolist(),
        "n_all": len(written.rows),
        "rows": {
            "kind": rows.kind.map(["unsteered", "steered", "random"].index).tolist(),
            "direction": np.where(known, of_direction, -1).tolist(),
            "scale": [_short(scale) for scale in rows.scale],
            "sample": rows["sample"].tolist(),
            "prompt": rows.prompt.tolist(),
            "text": codes.tolist(),
            "change": rows.change.map(["same", "wording", "content", "noise"].index).tolist(),
            "natural": [_short(value, 3) for value in rows.natural],
            "group": rows.group.fillna(-1).astype(int).tolist(),
        },
        "directions": {
            **{
                name: [None if value != value else value for value in directions[name].tolist()]
                for name in ("name", "anchor", "trial", "vector", "sign", "group", "kind", "method")
            },
            "text": _codes(texts, directions.text),
            "x": [_short(value) for value in directions.x],
            "y": [_short(value) for value in directions.y],
            "measures": {
                name: [_short(value) for value in directions[name]]
                for name in directions.columns[directions.columns.get_loc("y") + 1 :]
                if directions[name].notna().any()
            },
        },
    }


def _directions(findings: Findings, written: Written) -> pd.DataFrame:
    """One row for each vector and sign, with what it writes, what it does, its point, and its measures."""
    steered = written.steered
    kinds = kinds_of(steered).rename("kind").reset_index().astype({"vector": int})
    bare = written.directions.merge(kinds[KEYS], on=["trial", "vector"], how="left")
    table = bare.assign(sign=bare.sign.fillna(1).astype(int)).merge(kinds, on=KEYS, how="left")
    in_groups = steered[steered.group.notna()].groupby([*KEYS, "group"]).size().rename("n").reset_index()
    in_groups = in_groups.sort_values("n", ascending=False, kind="stable").drop_duplicates(KEYS)[[*KEYS, "group"]]
    table = table.merge(in_groups.astype({"vector": int}), on=KEYS, how="left")
    table["group"] = table.group.fillna(-1).astype(int)
    table["kind"] = table.kind.fillna("")
    mine = steered[[*KEYS, "text", "change", "group"]].astype({"vector": int})
    mine = mine.merge(table[[*KEYS, "group"]].rename(columns={"group": "main"}), on=KEYS)
    mine["far"] = (mine.group.fillna(-2) != mine.main).astype(int) + (mine.change == "same")
    first = mine.sort_values("far", kind="stable").drop_duplicates(KEYS)
    table = table.merge(first[[*KEYS, "text"]], on=KEYS, how="left")
    name = namer(written.directions)
    keys = list(table[KEYS].itertuples(index=False, name=None))
    table["name"], table["anchor"] = [name(*key) for key in keys], [anchor(*key) for key in keys]
    table = table.merge(_places(findings, written, table), on=KEYS, how="left")
    changed = mine.assign(changed=(mine.change != "same").astype(float)).groupby(KEYS).changed.mean()
    table = table.merge(changed.rename("changed").reset_index(), on=KEYS, how="left")
    table = signed(table)
    facts = [table.pop(fact) for fact in FACTS if fact != "method"]
    table = pd.concat([table, *facts], axis=1)
    if findings.written is None and findings.ranked is not None:
        wanted = [column for column in ("kl", "entropy_change") if column in findings.ranked]
        measured = findings.ranked[["vector", "sign", *wanted]].drop_duplicates(["vector", "sign"])
        table = table.merge(measured, on=["vector", "sign"], how="left")
    history = findings.vectors.history
    if findings.written is None and len(history):
        # the objective was measured for the vector as it was learned, not for its negative
        final = history[-1].tolist()
        table["objective"] = [
            final[k] if sign > 0 and k < len(final) else math.nan
            for k, sign in zip(table.vector, table.sign, strict=True)
        ]
    return table


def _places(findings: Findings, written: Written, table: pd.DataFrame) -> pd.DataFrame:
    """The point of each direction on the map: by what it changes in the model, or else by the words that it writes."""
    effects = findings.effects
    if written.places is not None:
        return written.places
    if findings.written is None and effects is not None and len(effects):
        keys = [(0, vector, sign) for vector, sign in zip(effects.vectors, effects.signs, strict=True)]
        places = [(*key, *place) for key, place in zip(keys, plane(effects.values), strict=True)]
        return pd.DataFrame(places, columns=[*KEYS, "x", "y"])
    joined = written.steered.astype({"vector": int}).groupby(KEYS).text.agg(lambda texts: " ".join(texts)[:MOST_READ])
    if len(joined) < 3 or not any(text.split() for text in joined):
        return pd.DataFrame([(*key, 0.0, 0.0) for key in joined.index], columns=[*KEYS, "x", "y"])
    counts = TfidfVectorizer(token_pattern=r"\S+", max_features=MOST_WORDS, dtype=np.float32).fit_transform(joined)
    places = [
        (*key, *place) for key, place in zip(joined.index, plane(torch.from_numpy(counts.toarray())), strict=True)
    ]
    return pd.DataFrame(places, columns=[*KEYS, "x", "y"])


def map_says(findings: Findings, written: Written) -> str:
    """Says what nearness on the map means."""
    if written.places is not None:
        return "change the last block's output at the end of the first prompt in similar directions"
    if findings.written is None and findings.effects is not None:
        return "change the target in similar directions"
    return "write similar words; what they change inside the model was not measured"


def _shown(texts: Any, behaviors: Mapping[str, Behavior]) -> dict[int, list[int]]:
    """By the number of a text, the numbers of the behaviours that it shows."""
    series = pd.Series(list(texts), dtype=object)
    found: dict[int, list[int]] = {}
    for b, behavior in enumerate(behaviors.values()):
        for i in np.flatnonzero(shows(series, behavior)) if len(series) else []:
            found.setdefault(int(i), []).append(b)
    return found


def _codes(texts: Any, some: pd.Series) -> list[int]:
    number = {text: i for i, text in enumerate(texts)}
    return [number.get(text, -1) for text in some]


def _short(value: Any, digits: int = 4) -> float | None:
    """Returns a number with few digits; None if it is NaN or infinite."""
    value = math.nan if value is None or pd.isna(value) else float(value)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
