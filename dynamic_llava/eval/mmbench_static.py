"""MMBench in Chinese with lmms-eval's static matching of answers and options, as its English task has it."""

from __future__ import annotations

import json
from typing import Any


def aggregate_cn_static(results: list[dict[str, Any]], args: Any) -> float:
    """Accuracy in percent over all questions (all circular passes right), details written beside the submission."""
    from lmms_eval.tasks._task_utils.file_utils import generate_submission_file
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator

    overall, by_category, by_second_level = mmbench_evaluator.eval_result(results, eval_method="static")
    details = {"overall_acc": overall, "category_acc": by_category, "l2_category_acc": by_second_level}
    with open(generate_submission_file("mmbench_cn_dev_static_results.json", args), "w", encoding="utf-8") as file:
        json.dump(details, file)
    return overall * 100
