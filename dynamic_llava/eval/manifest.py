"""What `lmms_eval.models` entry points announce: the model name and where its class is.

Imported by every `import lmms_eval.models`, so nothing but the announcement belongs here.
"""

from lmms_eval.models.registry_v2 import ModelManifest

manifest = ModelManifest(
    model_id="dynamic_llava",
    simple_class_path="dynamic_llava.eval.lmms_model.DynamicLlava",
)
