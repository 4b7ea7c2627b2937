"""Figures by category from the results of each prompt and item, as JSON and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import numpy as np

from recycle_ext.eval.intervals import interval, ratio
from recycle_ext.measuring.machine import plural
from recycle_ext.measuring.tables import markdown_table, percent

ALL = "all"  # the row of all prompts together


def summaries(rows: Sequence[dict], drafts: Sequence[int]) -> list[dict]:
    """Figures for each number of draft tokens, by category and for all prompts. rows: from ``measure.run_prompts``."""
    names = list(dict.fromkeys(row["category"] for row in rows))
    groups = {name: [row for row in rows if row["category"] == name] for name in names}
    groups[ALL] = list(rows)
    return [
        {"category": name, "drafts": k, "prompts": len(group)} | speed_figures(group, k) | quality_figures(group, k)
        for k in drafts
        for name, group in groups.items()
    ]


def speed_figures(rows: Sequence[dict], k: int) -> dict:
    """Acceptance, and tokens per second: all tokens of a mode's decode steps over all seconds of those steps.

    acceptance_by_position [k]: accepted draft tokens at a position over offered ones (``decoding.Run``).
    mean_accepted_length: tokens per pass over the base model in verify mode, 1 to k + 1.
    """
    standard, verify, alternate = (
        [row["runs"][name] for row in rows] for name in ("standard", f"verify-{k}", f"alternate-{k}")
    )
    counts = [np.array([[run["accepted"][j], run["offered"][j]] for run in verify]) for j in range(k)]
    rates = [
        sum(run["step_tokens"] for run in runs) / seconds
        if (seconds := sum(run["decode_seconds"] for run in runs))
        else None
        for runs in (standard, verify, alternate)
    ]
    return {
        "identical": sum(run["identical"] for run in verify),
        "acceptance_by_position": [_share(*column.sum(0).tolist()) for column in counts],
        "acceptance_by_position_interval": [interval(*column.T, statistic=ratio) for column in counts],
        "mean_accepted_length": _share(sum(run["step_tokens"] for run in verify), sum(run["steps"] for run in verify)),
        "standard_tokens_per_second": rates[0],
        "verify_tokens_per_second": rates[1],
        "alternate_tokens_per_second": rates[2],
        "verify_speedup": _share(rates[1], rates[0]),
        "alternate_speedup": _share(rates[2], rates[0]),
    }


def quality_figures(rows: Sequence[dict], k: int) -> dict:
    """The difference of alternate mode's texts from standard's, and the likelihood of both under the base model.

    common_tokens_median: tokens before a text first differs from standard's. If the texts were scored under the base model:
    draft_agreement: share of alternate's draft tokens that are the base model's argmax there; base_agreement: the same share of
    the tokens that the base model wrote, below 1 only by the kernels' rounding. log_likelihood_difference: alternate's
    minus standard's in nats per token, the mean over the prompts where neither text is empty of each text's mean;
    perplexity_ratio: exp(-log_likelihood_difference). The measure is strict: greedy text is nearly the most likely
    text of its model.
    """
    alternate = [row["runs"][f"alternate-{k}"] for row in rows]
    figures: dict = {"common_tokens_median": median(run["common_tokens"] for run in alternate)}
    if "log_likelihood_nats_per_token" not in alternate[0]:
        return figures
    for name in ("draft", "base"):
        figures[f"{name}_agreement"] = _share(
            sum(run[f"{name}_tokens_agreeing"] for run in alternate), sum(run[f"{name}_tokens"] for run in alternate)
        )
    pairs = np.array(
        [
            [row["runs"][name]["log_likelihood_nats_per_token"] for name in ("standard", f"alternate-{k}")]
            for row in rows
        ],
        dtype=np.float64,
    )
    pairs = pairs[~np.isnan(pairs).any(1)]
    if not len(pairs):
        return figures
    difference = float((pairs[:, 1] - pairs[:, 0]).mean())
    bounds = interval(pairs[:, 1] - pairs[:, 0])
    return figures | {
        "texts": len(pairs),
        "standard_log_likelihood_nats_per_token": float(pairs[:, 0].mean()),
        "alternate_log_likelihood_nats_per_token": float(pairs[:, 1].mean()),
        "log_likelihood_difference_nats_per_token": difference,
        "log_likelihood_difference_interval": bounds,
        "perplexity_ratio": math.exp(-difference),
        "perplexity_ratio_interval": bounds and (math.exp(-bounds[1]), math.exp(-bounds[0])),
    }


def cloze_figures(standard: Sequence[Sequence[bool]], alternate: Sequence[Sequence[bool]]) -> list[dict]:
    """Accuracy of both modes, and alternate's loss. standard, alternate: for each item, which tokens were right.

    Three measures: the first token, which is the base model's in both modes; the second token, a draft token in alternate
    mode, among the items whose first was right; and the whole continuation. difference_points: alternate minus standard,
    in percentage points; relative_drop: 1 - alternate / standard. The bootstrap keeps an item's two modes together.
    """
    pairs = list(zip(standard, alternate, strict=True))
    measures = {
        "first token": [(a[0], b[0]) for a, b in pairs],
        "second token after a right first": [(a[1], b[1]) for a, b in pairs if a[0]],
        "whole continuation": [(all(a), all(b)) for a, b in pairs],
    }
    found = []
    for name, right in measures.items():
        values = np.array(right, dtype=np.float64).reshape(-1, 2)
        if not len(values):
            continue
        means = values.mean(0)
        bounds = interval(values[:, 1] - values[:, 0])
        found.append(
            {
                "measure": name,
                "items": len(values),
                "standard_accuracy": float(means[0]),
                "alternate_accuracy": float(means[1]),
                "difference_points": 100 * float(means[1] - means[0]),
                "difference_points_interval": bounds and (100 * bounds[0], 100 * bounds[1]),
                "relative_drop": 1 - means[1] / means[0] if means[0] else None,
                "relative_drop_interval": interval(*values.T, statistic=lambda a, b: 1 - b / a),
            }
        )
    return found


def heading(report: dict) -> str:
    """Two lines above the tables: the model and the settings, the machine."""
    here, settings = report["machine"], report["settings"]
    where = settings["device"]
    if where == "cpu":
        where = f"{here['cpu']}, {plural(here['cores'], 'core')}, threads {settings['threads']}, {here['isa']}"
    return (
        f"{settings['model_name']} ({settings['formats']}), module {settings['module']}; "
        f"greedy, at most {settings['max_new_tokens']} new tokens\n"
        f"{where}; torch {here['torch']}; {here['date']}"
    )


def tables(report: dict) -> str:
    """All figures in Markdown, for each number of draft tokens."""
    return "\n\n".join(_tables_of(report, k) for k in report["settings"]["drafts"])


def _tables_of(report: dict, k: int) -> str:
    chosen = [summary for summary in report["summaries"] if summary["drafts"] == k]
    total = chosen[-1]
    parts = [
        f"Draft tokens per step: {k}. verify and standard wrote the same tokens, identical: {total['identical']} of "
        f"{total['prompts']}",
        _speed_table(chosen, k),
        "alternate beside standard" + _under_which_base(report),
        _quality_table(chosen),
    ]
    if report["cloze"] is not None:
        cloze = report["cloze"]
        parts += [
            f"Cloze: the next words of {cloze['items']} passages ({cloze['source']})",
            _cloze_table(cloze["by_drafts"][str(k)]),
        ]
    return "\n\n".join(parts)


def _under_which_base(report: dict) -> str:
    dtype = report["settings"]["reference_dtype"]
    return "" if dtype is None else f"; log-likelihoods under the base model in {dtype}, nats per token"


def _speed_table(chosen: Sequence[dict], k: int) -> str:
    names = ["", "prompts"]
    names += ["acceptance", "95%", *(f"of draft token {j + 1}" for j in range(1, k))]
    names += ["accepted length", "standard", "verify", "alternate", "verify/standard"]
    names += ["alternate/standard"]
    rows = [
        [s["category"], str(s["prompts"])]
        + [_percent(s["acceptance_by_position"][0])]
        + [_interval(s["acceptance_by_position_interval"][0], _percent)]
        + [_percent(share) for share in s["acceptance_by_position"][1:]]
        + [_number(s["mean_accepted_length"], ".2f")]
        + [_number(s[f"{mode}_tokens_per_second"], ".0f") for mode in ("standard", "verify", "alternate")]
        + [_number(s[f"{mode}_speedup"], ".2f") for mode in ("verify", "alternate")]
        for s in chosen
    ]
    return markdown_table(names, rows, left=1)


def _quality_table(chosen: Sequence[dict]) -> str:
    names = ["", "tokens in common"]
    rows = [[s["category"], f"{s['common_tokens_median']:.0f}"] for s in chosen]
    if "draft_agreement" in chosen[-1]:
        names += ["draft tokens agree", "base tokens agree", "standard", "alternate", "difference", "95%"]
        names += ["perplexity ratio", "95%"]
        for row, s in zip(rows, chosen, strict=True):
            row += [_percent(s["draft_agreement"]), _percent(s["base_agreement"])]
            for mode in ("standard", "alternate"):
                row.append(_number(s.get(f"{mode}_log_likelihood_nats_per_token"), ".3f"))
            for name in ("log_likelihood_difference", "perplexity_ratio"):
                sign = "+" if name.endswith("difference") else ""
                value = s.get(f"{name}_nats_per_token" if sign else name)
                row.append(_number(value, f"{sign}.3f"))
                row.append(_interval(s.get(f"{name}_interval"), lambda x, f=f"{sign}.3f": format(x, f)))
    return markdown_table(names, rows, left=1)


def _cloze_table(measures: Sequence[dict]) -> str:
    names = ["", "items", "standard", "alternate", "difference, points", "95%", "relative drop", "95%"]
    rows = [
        [
            m["measure"],
            str(m["items"]),
            _percent(m["standard_accuracy"]),
            _percent(m["alternate_accuracy"]),
            f"{m['difference_points']:+.1f}",
            _interval(m["difference_points_interval"], lambda x: f"{x:+.1f}"),
            _percent(m["relative_drop"]),
            _interval(m["relative_drop_interval"], _percent),
        ]
        for m in measures
    ]
    return markdown_table(names, rows, left=1)


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if whole and part is not None else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(share: float | None) -> str:
    return percent(share, digits=1)


def _interval(bounds: Sequence[float] | None, write) -> str:
    return "" if bounds is None else f"{write(bounds[0])} to {write(bounds[1])}"
