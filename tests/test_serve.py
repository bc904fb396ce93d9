"""`dynamic-llava serve`, asked by the openai client: what is answered, what is kept, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.app import serve
from dynamic_llava.checkpoints import load_processor
from dynamic_llava.checkpoints.loaded import load_model
from dynamic_llava.statistics import SparsityStatistics

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

ROOT = Path(__file__).parent.parent
BASE = "assets/tiny-llava"
QUESTION = "Describe the picture in detail."


def data_url(colour: str, size: tuple[int, int] = (96, 64)) -> str:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def turn(text: str = QUESTION, colour: str | None = "red") -> dict:
    picture = [] if colour is None else [{"type": "image_url", "image_url": {"url": data_url(colour)}}]
    return {"role": "user", "content": [*picture, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    torch.manual_seed(0)
    DynamicLlavaForConditionalGeneration.from_pretrained(BASE).save_pretrained(folder)
    load_processor(BASE).save_pretrained(folder)
    return str(folder)


class Client:
    """The openai client of a server in a thread, and what each answer kept."""

    def __init__(self, checkpoint: str, defaults: dict) -> None:
        from dynamic_llava.app.server import build_app

        self.model, self.kept, loaded = checkpoint, queue.Queue(), load_model(checkpoint)
        generate = loaded.model.generate

        def noting(**kwargs):
            output = generate(**kwargs, return_sparsity=True)
            self.kept.put((output.sparsity, output.sequences.shape[1] - kwargs["input_ids"].shape[1]))
            return output.sequences

        loaded.model.generate = noting
        self.loaded, self.generate = loaded, generate
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(uvicorn.Config(build_app(loaded, defaults), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(self, *turns: dict, stream: bool = False, **body) -> str:
        """The answer to `turns`; `body` holds what OpenAI's API does not know."""
        found = self.client.chat.completions.create(
            model=self.model, messages=turns or [turn()], max_tokens=12, stream=stream, extra_body=body
        )
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in found if chunk.choices)
        return found.choices[0].message.content

    def asked(self, *turns: dict, **body) -> tuple[SparsityStatistics, int]:
        """What an answer kept, and how many tokens it has; a streamed one may reach the client a moment earlier."""
        while not self.kept.empty():
            self.kept.get()
        self.ask(*turns, **body)
        return self.kept.get(timeout=30)

    def expected(self, *turns: dict, **call) -> str:
        """What the model says to `turns` without a server."""
        processor = self.loaded.processor
        inputs = processor.apply_chat_template(
            [
                {
                    "role": item["role"],
                    "content": [
                        {"type": "image", "url": part["image_url"]["url"]} if "image_url" in part else part
                        for part in item["content"]
                    ],
                }
                for item in turns
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = self.generate(**inputs, max_new_tokens=12, **call)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=30)
        self.socket.close()


@pytest.fixture(scope="module")
def client(checkpoint):
    client = Client(checkpoint, {})
    yield client
    client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_those_of_the_model(client, stream):
    assert client.ask(stream=stream) == client.expected(turn())
    assert client.ask(turn("What is a circle?", None), stream=stream) == client.expected(
        turn("What is a circle?", None)
    )
    talk = [turn(), {"role": "assistant", "content": [{"type": "text", "text": "two"}]}, turn("And here?", "blue")]
    assert client.ask(*talk, stream=stream) == client.expected(*talk)
    call = {"image_keep_rate": 0.1, "output_sparsity": False}
    assert client.ask(stream=stream, **call) == client.expected(turn(), **call)


@pytest.mark.parametrize(
    ("body", "image", "all_output"),
    [
        ({}, 12, False),
        ({"image_keep_rate": 0.5}, 32, False),
        ({"image_keep_rate": 1, "output_sparsity": False}, 64, True),
        ({"image_keep_rate": None}, 12, False),
        ({"output_keep_rate": 1.0}, 12, True),
        ({"image_selector": "random"}, 12, False),
        ({"generation_config": {"image_keep_rate": 0.5}}, 32, False),
        ({"generation_config": json.dumps({"image_keep_rate": 0.5, "output_sparsity": False})}, 32, True),
        ({"generation_config": {"image_keep_rate": 0.5}, "image_keep_rate": 0.25}, 16, False),
    ],
)
def test_a_request_says_what_it_keeps(client, body, image, all_output):
    for stream in (False, True):
        found, generated = client.asked(stream=stream, **body)
        assert found.image_tokens_kept.tolist() == [image]
        # The last token of an answer is not fed again.
        assert found.output_tokens.tolist() == [generated - 1]
        assert (found.output_tokens_kept.tolist() == [generated - 1]) or not all_output


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"image_keep_rate": 7}, r"must lie in \(0, 1\], got 7"),
        ({"image_keep_rate": "0.1"}, "got '0.1'"),
        ({"output_keep_rate": 0}, "got 0"),
        ({"output_sparsity": "no"}, "output_sparsity is True, False or None, got 'no'"),
        ({"output_sparsity": False, "output_keep_rate": 0.5}, "drops no output tokens"),
        ({"image_selector": "os:path"}, "would import code"),
        ({"image_selector": "randm"}, "randm"),
        ({"generation_config": {"image_keep_rate": -1}}, "got -1"),
        ({"generation_config": {"output_selector": "os:path"}}, "would import code"),
        ({"generation_config": "{"}, "Expecting property name"),
        ({"generation_config": 3}, "wrong type"),
        ({"image_keep_rat": 0.1}, "Unexpected fields"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_server_goes_on(client, body, message, stream):
    with pytest.raises(openai.APIStatusError, match=message) as raised:
        client.ask(stream=stream, **body)
    assert 400 <= raised.value.status_code < 500
    assert client.ask() == client.expected(turn())


def test_other_requests_of_the_api(client):
    answer = client.client.responses.create(model=client.model, input="A circle?", max_output_tokens=5, stream=False)
    assert answer.output_text
    with pytest.raises(openai.BadRequestError, match="got 9"):
        client.client.responses.create(model=client.model, input="A", stream=False, extra_body={"image_keep_rate": 9})
    with pytest.raises(openai.BadRequestError, match="Server is pinned"):
        client.client.chat.completions.create(model="another", messages=[turn()])


def test_rates_of_the_command_are_those_of_requests_without(checkpoint):
    client = Client(checkpoint, {"image_keep_rate": 0.75, "output_keep_rate": 1.0})
    try:
        bodies = ({}, {"image_keep_rate": 0.5}, {"generation_config": {"max_new_tokens": 3}})
        assert [client.asked(**body)[0].image_tokens_kept.item() for body in bodies] == [48, 32, 48]
        with pytest.raises(openai.BadRequestError, match="drops no output tokens"):
            client.ask(output_sparsity=False, output_keep_rate=0.5)
    finally:
        client.close()


def test_the_dense_base_is_served_and_drops_nothing():
    from dynamic_llava.app.server import build_app

    with pytest.raises(ValueError, match="dense LLaVA and drops no tokens; leave out image_keep_rate"):
        build_app(load_model(BASE), {"image_keep_rate": 0.5})


def test_the_command(checkpoint, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamic_llava.app.serve", checkpoint, "--port", "0", "--image-keep-rate", "0.5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    try:
        line = process.stdout.readline()
        url = line.split(" at ")[1].split(" ")[0]
        assert url.startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=url, api_key="none")
        answer = client.chat.completions.create(model=checkpoint, messages=[turn()], max_tokens=4)
        assert answer.usage.completion_tokens
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == "interrupted by SIGTERM"


ALONE = """
import json, socket, sys
sys.modules["dynamic_llava"] = None
from openai import OpenAI
from transformers.cli.serve import Serve
name, turn = sys.argv[1], json.loads(sys.argv[2])
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
server = Serve(force_model=name, trust_remote_code=True, host="127.0.0.1", port=port, device="cpu", non_blocking=True)
client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=10)
call = {"generation_config": json.dumps({"image_keep_rate": 0.1, "output_sparsity": False, "max_new_tokens": 12})}
answer = client.chat.completions.create(model=name, messages=[turn], extra_body=call)
server.kill_server()
print(json.dumps(answer.choices[0].message.content))
"""


def test_the_server_of_transformers_without_this_package(client, checkpoint, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Square: this checkpoint does not say how others become so, and stock processors cut where we pad.
    asked = turn()
    asked["content"][0]["image_url"]["url"] = data_url("red", (64, 64))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, checkpoint, json.dumps(asked)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = client.expected(asked, image_keep_rate=0.1, output_sparsity=False)
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model is missing"),
        (["nowhere", "--port", "0"], "No checkpoint at 'nowhere'"),
        ([BASE, "--image-keep-rate", "2"], "--image-keep-rate must be a number in (0, 1], got 2"),
        ([BASE, "--port", "70000"], "--port must be a whole number in [0, 65535], got 70000"),
        ([BASE, "--host", "203.0.113.7"], "Cannot listen at 203.0.113.7, port 8000"),
        ([BASE, "--port", "0", "--dtype", "int7"], "dtype must be"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys):
    assert serve.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line


@pytest.mark.parametrize("package", serve.PACKAGES)
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert serve.main([BASE]) == 2
    assert capsys.readouterr().err == (
        f"error: Serving needs the package {package}, which is missing; pip install 'dynamic-llava[serve]'.\n"
    )
