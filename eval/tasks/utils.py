"""Functions named by the shapes task files; the logic is in `dynamic_llava.eval`."""

from dynamic_llava.data.shapes.scene import COLOURS, SHAPES
from dynamic_llava.eval.metrics import exact_match, mentioned_objects, multiset_f1
from dynamic_llava.eval.shapes_task import ShapesTask

__all__ = ["ShapesTask", "describe_process_results", "vqa_process_results"]


def vqa_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match, once for the total and once for the kind of question."""
    score = exact_match(results[0], doc["answer"])
    return {"accuracy": score, f"accuracy_{doc['kind']}": score}


def describe_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """F1 of the objects named (colour and shape), and whether the whole description is right."""
    predicted, reference = (mentioned_objects(text, tuple(COLOURS), SHAPES) for text in (results[0], doc["answer"]))
    return {"object_f1": multiset_f1(predicted, reference), "exact_match": exact_match(results[0], doc["answer"])}
