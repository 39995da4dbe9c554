"""README's tables of the two real models, from bench/results/antiberty.json and mnist.json: scripts/demo's figures."""

from __future__ import annotations

from typing import Any

Table = tuple[list[str], list[list[str]]]


def quality(result: dict[str, Any], measure: str, digits: int, unit: str = "") -> Table:
    """Every variant of every study: what it gets right and its file."""
    rows = []
    for study in result["results"]:
        for q in study["quality"]:
            value = f"{q[measure] * (100 if unit else 1):.{digits}f}{unit}"
            rows.append([study["study"]["title"], q["variant"], value, f"{q['bytes'] / 1e6:.{2 if unit else 1}f} MB"])
    return ["pruned", "model", measure, "file"], rows


def latency(result: dict[str, Any], load: str) -> Table:
    """Dense milliseconds, and for each way of converting the ratio; ~: within the noise."""
    timed = dict.fromkeys(way for s in result["results"] for m in s["latency"] for way in m["times"] if way != "dense")
    ways = sorted(timed, key="measured".__eq__)
    rows = []
    for study in result["results"]:
        for m in study["latency"]:
            name = f"{m[load]}, {m['dtype']}" if "dtype" in m else str(m[load])
            dense = m["times"]["dense"]
            cells = [_against(dense, m["times"].get(way)) for way in ways]
            rows.append([study["study"]["title"], name, f"{dense['ms']:.3g}", *cells])
    return ["pruned", load, "dense ms", *ways], rows


def _against(dense: dict[str, Any], ours: dict[str, Any] | None) -> str:
    if ours is None:
        return ""
    apart = ours["p80"] < dense["p20"] or ours["p20"] > dense["p80"]
    return f"{'' if apart else '~'}{dense['ms'] / ours['ms']:.2f}×"
