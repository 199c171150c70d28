"""A report from nothing but the lines of `pairs.jsonl`, in plain NumPy: the second opinion on measures.py."""

import json
from pathlib import Path

import numpy as np

Z = 1.959963984540054  # 97.5 % of a standard normal lie below


def columns_of(path):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {key: np.array([line[key] for line in lines]) for key in lines[0]}


def accuracy(margins):
    """A tie is half a win."""
    return np.mean(np.heaviside(margins, 0.5))


def wilson(margins):
    """Roots of the quadratic (1 + z2/n) p2 - (2 k/n + z2/n) p + (k/n)2."""
    n, share = len(margins), accuracy(margins)
    roots = np.roots([1 + Z**2 / n, -(2 * share + Z**2 / n), share**2])
    return np.clip(np.sort(roots.real), 0, 1)


def calibration(margins, probs):
    """ECE and Brier over ten bins of confidence in [0.5, 1]."""
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins > 0, probs, 1 - probs)
    right[margins == 0] = 0.5
    bins = np.clip(np.digitize(sure, np.linspace(0.5, 1, 11)) - 1, 0, 9)
    gaps = [np.abs(sure[bins == b].mean() - right[bins == b].mean()) * np.mean(bins == b) for b in set(bins)]
    return np.sum(gaps), np.mean((sure - right) ** 2)


def area(chosen, rejected):
    """Every chosen reward against every rejected one."""
    return np.mean(np.heaviside(chosen[:, None] - rejected[None, :], 0.5))


def oracle(path, beta, probs=None):
    """Numbers of a report by the path to them in its dict; intervals only where each row has one pair."""
    pairs = columns_of(path)
    w, l = pairs["reward_chosen"], pairs["reward_rejected"]
    margins, per_token = w - l, w / pairs["tokens_chosen"] - l / pairs["tokens_rejected"]
    found = {
        "pairs": len(w),
        "groups": len(set(pairs["row"])),
        "ties": np.mean(margins == 0),
        "accuracy.value": accuracy(margins),
        "accuracy_per_token.value": accuracy(per_token),
        "margin.mean": margins.mean(),
        "margin.median": np.median(margins),
        "margin.std": margins.std(),
        "margin.q05": np.quantile(margins, 0.05),
        "margin.q95": np.quantile(margins, 0.95),
        "margin_per_token.mean": per_token.mean(),
        "margin_per_token.q25": np.quantile(per_token, 0.25),
        "auc": area(w, l),
    }
    for side in ("chosen", "rejected"):
        rewards, tokens = pairs[f"reward_{side}"], pairs[f"tokens_{side}"]
        found[f"rewards.{side}"] = rewards.mean()
        found[f"drift.{side}"] = rewards.mean() / beta
        found[f"logratio_per_token.{side}"] = rewards.sum() / beta / tokens.sum()
        found[f"kl_per_token.{side}"] = pairs[f"kl_{side}"].sum() / tokens.sum()
        found[f"tokens.{side}"] = tokens.mean()
    reference = [pairs[f"logps_{side}"] - pairs[f"reward_{side}"] / beta for side in ("chosen", "rejected")]
    found["reference_accuracy.value"] = accuracy(reference[0] - reference[1])
    found["calibration.ece"], found["calibration.brier"] = calibration(
        margins, np.ones(len(w)) if probs is None else probs
    )
    parts = [("by_subset", pairs["subset"], sorted(set(pairs["subset"])))]
    gap = pairs["tokens_chosen"] - pairs["tokens_rejected"]
    similar = np.abs(gap) <= np.maximum(pairs["tokens_chosen"], pairs["tokens_rejected"]) / 10
    lengths = np.select([similar, gap < 0], ["similar", "chosen shorter"], "chosen longer")
    order = ["chosen shorter", "similar", "chosen longer"]
    parts.append(("by_length", lengths, [name for name in order if name in lengths]))
    for title, keys, names in parts:
        for i, name in enumerate(names):
            found[f"{title}.{i}.name"] = name
            found[f"{title}.{i}.accuracy.value"] = accuracy(margins[keys == name])
            found[f"{title}.{i}.margin"] = margins[keys == name].mean()
    if found["pairs"] == found["groups"]:
        for name, values in {"accuracy": margins, "accuracy_per_token": per_token}.items():
            found[f"{name}.low"], found[f"{name}.high"] = wilson(values)
    return found


def at(report, path):
    """A number of a report by its path."""
    for part in path.split("."):
        report = report[int(part)] if part.isdigit() else report[part]
    return report
