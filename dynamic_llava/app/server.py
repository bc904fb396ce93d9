"""The server of transformers with one Dynamic-LLaVA, whose requests may say what they keep."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState

from ..call_arguments import GENERATE_ARGUMENTS, configured_arguments, given_arguments
from ..checkpoints.loaded import LoadedModel
from ..options import SparsityOptions

BAD_REQUEST = 400


class LoadedManager(ModelManager):
    """Changes from `ModelManager`: it has one model, which this package has loaded, and whatever its layout."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        super().__init__(force_model=loaded.path)

    def _load_processor(self, *args, **kwargs):
        return self.loaded.processor

    def _load_model(self, *args, **kwargs):
        return self.loaded.model


class PerRequest(BaseHandler):
    """Changes from `BaseHandler`: a body may hold the per-call arguments of `generate`; what does not fit is answered
    with status 400 before anything is generated, also where the answer is streamed."""

    model_manager: LoadedManager

    def _validate_request(self, body: dict[str, Any]) -> None:
        if isinstance(body.get("generation_config"), dict):
            body["generation_config"] = json.dumps(body["generation_config"])
        super()._validate_request({name: value for name, value in body.items() if name not in GENERATE_ARGUMENTS})

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        try:
            config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
            for name, value in given_arguments(body, GENERATE_ARGUMENTS).items():
                setattr(config, name, value)
            call = {**configured_arguments(model_generation_config), **configured_arguments(config)}
            check_call(self.model_manager.loaded, call)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"generation_config or another setting is of a wrong type: {error}") from error
        return config


class ChatHandler(PerRequest, ChatCompletionHandler):
    """`/v1/chat/completions`."""


class TextHandler(PerRequest, CompletionHandler):
    """`/v1/completions`."""


class ResponsesHandler(PerRequest, ResponseHandler):
    """`/v1/responses`."""


def check_call(loaded: LoadedModel, call: dict[str, Any]) -> None:
    """`ValueError` where a model cannot do what the per-call arguments `call` ask."""
    if not loaded.is_dense:
        SparsityOptions.resolve(loaded.model.config.sparsity, training=False, call=call)
    elif call:
        raise ValueError(f"{loaded.path} is a dense LLaVA and drops no tokens; leave out {', '.join(call)}.")


def build_app(loaded: LoadedModel, defaults: dict[str, Any]) -> FastAPI:
    """The application that serves `loaded`.

    Args:
        loaded: the model and its processor.
        defaults: per-call arguments of requests that name none.

    Raises:
        ValueError: the model cannot do what `defaults` ask.
    """
    check_call(loaded, defaults)
    for name, value in defaults.items():
        setattr(loaded.model.generation_config, name, value)
    manager, state = LoadedManager(loaded), GenerationState()
    app = build_server(
        manager,
        ChatHandler(manager, state),
        completion_handler=TextHandler(manager, state),
        response_handler=ResponsesHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )

    # Of the prompt, a picture, or settings that do not go together: the client's, not a fault of the server.
    app.add_exception_handler(ValueError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that cannot be met, in the form that clients of OpenAI's API show."""
    status, message = getattr(error, "status_code", BAD_REQUEST), getattr(error, "detail", str(error))
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)
