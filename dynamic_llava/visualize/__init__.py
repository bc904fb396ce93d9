"""Pictures of what a model keeps."""
