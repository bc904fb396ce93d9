"""Functions named by the task files of this folder; the logic is in `dynamic_llava.eval`."""

from dynamic_llava.data.shapes.scene import COLOURS, SHAPES
from dynamic_llava.eval.conversations import ConversationTask, next_question
from dynamic_llava.eval.meteor import meteor
from dynamic_llava.eval.metrics import exact_match, mentioned_objects, multiset_f1

__all__ = [
    "ConversationTask",
    "describe_process_results",
    "meteor_process_results",
    "next_question",
    "vqa_process_results",
]


def vqa_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match, once for the total and once for the kind of question."""
    score = exact_match(results[0], doc["answer"])
    return {"accuracy": score, f"accuracy_{doc['kind']}": score}


def describe_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """F1 of the objects named (colour and shape), and whether the whole description is right."""
    predicted, reference = (mentioned_objects(text, tuple(COLOURS), SHAPES) for text in (results[0], doc["answer"]))
    return {"object_f1": multiset_f1(predicted, reference), "exact_match": exact_match(results[0], doc["answer"])}


def meteor_process_results(doc: dict, results: list) -> dict[str, float]:
    """METEOR of the answer, of several rounds the mean over them."""
    answers = results[0] if isinstance(results[0], list) else results
    scores = [meteor(said, told) for said, told in zip(answers, doc["answers"], strict=True)]
    return {"meteor": sum(scores) / len(scores)}
