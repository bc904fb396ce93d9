"""`--gradient-report N`: the gradient that reaches each predictor from the LM loss and from its budget, separately.

Whether a run will hold its rates shows here first: a predictor whose budget outweighs the LM loss by orders of
magnitude learns a rate and not which tokens matter; the other way round the rate drifts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.table import Table
from torch import nn

PREDICTOR_BUDGETS = {
    "image_predictor": "image_budget_loss",
    "output_predictor": "output_budget_loss",
    "instruct_predictor": "instruct_budget_loss",
}


def gradient_report(model: nn.Module, batches: Iterable[dict[str, Any]], gumbel_tau: float) -> list[dict[str, float]]:
    """Mean norms over `batches`, for each predictor.

    Args:
        model: `DynamicLlavaForConditionalGeneration` in training mode.
        batches: of the collator, on the model's device.
        gumbel_tau: temperature of the draws.

    Returns:
        For each predictor `lm_norm`, `budget_norm` (weighted by `budget_weight`), their `cosine`, and the number of
        `batches`.
    """
    decoder, weight = model.model.language_model, model.config.sparsity.budget_weight
    found = {name: [] for name in PREDICTOR_BUDGETS if hasattr(decoder, name)}
    for batch in batches:
        batch = {key: value for key, value in batch.items() if key != "ids"}
        outputs = model(**batch, gumbel_tau=gumbel_tau)
        for name, rows in found.items():
            budget = outputs.get(PREDICTOR_BUDGETS[name])
            if budget is None:
                continue
            parameters = [p for p in getattr(decoder, name).parameters() if p.requires_grad]
            lm, held = (_flat_gradient(loss, parameters) for loss in (outputs.lm_loss, weight * budget))
            rows.append((lm.norm(), held.norm(), torch.nn.functional.cosine_similarity(lm, held, dim=0)))
    report = []
    for name, rows in found.items():
        if rows:
            lm, held, cosine = (float(torch.stack(column).mean()) for column in zip(*rows, strict=True))
            norms = {"lm_norm": lm, "budget_norm": held, "cosine": cosine}
            report.append({"predictor": name, **norms, "batches": len(rows)})
    return report


def _flat_gradient(loss: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in zip(grads, parameters, strict=True)]
    )


def gradient_table(report: list[dict[str, float]]) -> Table:
    """The report as a rich table."""
    table = Table("predictor", "LM loss", "budget", "budget / LM", "cosine", title="Gradient norms at the predictors")
    for row in report:
        ratio = row["budget_norm"] / row["lm_norm"] if row["lm_norm"] else float("inf")
        cells = (row["lm_norm"], row["budget_norm"], ratio, row["cosine"])
        table.add_row(row["predictor"], *(f"{value:.3g}" for value in cells))
    return table
