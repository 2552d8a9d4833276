"""A whole server in a thread on the scripted engine, and adapters for it that pass every check."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from policy.base_model import BaseModel
from policy.chat import ChatFormat, ParsedTurn
from policy.engine import Engine, complete
from policy.generation import Generation, OnGeneration, generation_owner
from policy.registry import Registry
from policy.scripted import ScriptedEngine, scripted_logprobs
from policy.types import Adapter, AdapterRef, Probe, Sampling
from server.app import create_app
from server.parts import Parts
from server.services import Services
from server.settings import Settings, load_settings

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BASE_DIGEST = "sha256:scripted"
SLOTS = 3
OPERATOR = "s3cret"
"""The operator's key, of servers that are given one."""
AGENT = """
name: desk
policy: desk
system: You work at the desk.
tools:
  - python: tests.server.house_tools:look_up
limits: {turns: 3, tokens: 400, seconds: 20}
sampling: {max_tokens: 300}
reward:
  metrics: {success: {weight: 1.0}}
training: {min_episodes: 4}
"""


@cache
def byte_chat() -> ChatFormat:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return ChatFormat(tokenizer)


def scripted_engine(seconds_per_token: float = 0.0) -> ScriptedEngine:
    """Calls the tool that the user names (`CALL name {...}`), repeats what it answered, and says
    which adapter it is to anything else."""
    chat = byte_chat()
    end = chat.end_of_turn_id
    assert end is not None

    def reply(prompt_ids: Sequence[int], adapter: AdapterRef) -> list[int]:
        *_, (role, said) = re.findall(
            r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", chat.text(prompt_ids), re.DOTALL
        )
        if role == "user" and said.startswith("CALL "):
            _, name, arguments = said.split(" ", 2)
            call = json.dumps({"name": name, "arguments": json.loads(arguments)})
            text = f"<tool_call>{call}</tool_call>"
        else:
            text = f"{adapter} heard {said}"
        return [*chat._ids(text), end]

    return ScriptedEngine(
        reply, chat.text, eos_id=end, max_model_len=4096, seconds_per_token=seconds_per_token
    )


def scripted_routes(
    app: FastAPI, engine: Engine, base_name: str, on_generation: OnGeneration
) -> None:
    """As much of vLLM's chat route as episodes of plain traffic depend on."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, Any]:
        body = await request.json()
        adapter = AdapterRef("base", 0)
        if body["model"] != base_name:
            adapter = AdapterRef.parse(body["model"])
        prompt_ids = byte_chat().first_prompt(body["messages"], [])
        owner, began = generation_owner.get(), time.time()
        sampling = Sampling(temperature=body.get("temperature", 1.0), max_tokens=500)
        done = await complete(engine, prompt_ids, sampling, adapter=adapter)
        on_generation(
            Generation(
                "chatcmpl-1",
                0,
                tuple(prompt_ids),
                done.token_ids,
                done.logprobs,
                done.text,
                done.stop_reason,
                adapter,
                sampling,
                began,
                time.time() - began,
                owner,
            )
        )
        message: dict[str, Any] = {"role": "assistant", "content": done.text}
        if body.get("tools"):
            parsed = byte_chat().parse(done.text)
            message |= {"content": parsed.content, "tool_calls": _calls(parsed)}
        choice = {"index": 0, "message": message, "finish_reason": done.stop_reason}
        return {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 0,
            "model": body["model"], "choices": [choice],
        }  # fmt: skip


def _calls(parsed: ParsedTurn) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for number, call in enumerate(parsed.calls)
    ]


@dataclass
class House:
    """A running server."""

    url: str
    app: FastAPI
    http: httpx.Client

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    def chat(self, model: str, messages: Sequence[Any], **body: Any) -> httpx.Response:
        headers = body.pop("headers", {})
        asked = {"model": model, "messages": list(messages), **body}
        return self.http.post("/v1/chat/completions", json=asked, headers=headers)

    def episode(self, episode_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/episodes/{episode_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def publish(self, policy: str = "desk", *, live: bool = False, **fault: Any) -> Adapter:
        """Do as the trainer does: a folder and a candidate; and as its gate, if it goes live."""
        adapter = publish(self.services.registry, policy, **fault)
        ref = adapter.ref
        releases = self.services.releases
        releases.record(policy, ref.version, "candidate", actor="test", reason="published")
        if live:
            self.until(lambda: releases.state(policy).states.get(ref.version) == "loaded")
            releases.promote(ref, actor="test", reason="gate passed")
            self.until(lambda: self.services.controller.live(policy) == ref)
        return adapter

    def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        wait_until(condition, seconds)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def client_of(house: House, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=house.url, headers=headers, timeout=20)


def make_key(house: House, **body: Any) -> dict[str, Any]:
    with client_of(house, OPERATOR) as operator:
        answer = operator.post("/v1/keys", json={"name": "test", **body})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


@contextmanager
def running(settings: Settings, parts: Parts, start_seconds: float = 20) -> Iterator[House]:
    """Serve in a thread on a free port; errors of the start are raised here."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        settings.http.port = port
        app = create_app(settings, parts)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive(), start_seconds)
            assert server.started, "the server did not start; its log says why"
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=20) as http:
                yield House(url, app, http)
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def settings_in(folder: Path, **flags: Any) -> Settings:
    """Settings with everything under `folder` and no trainer."""
    (folder / "agents").mkdir(exist_ok=True)
    return load_settings(
        {
            "agents": folder / "agents",
            "model.adapters": folder / "adapters",
            "storage.database": f"sqlite:///{folder}/hone.db",
            "engine.max_loras": SLOTS,
            "trainer.enabled": False,
            **{key.replace("__", "."): value for key, value in flags.items()},
        }
    )


def write_agent(folder: Path, text: str = AGENT, name: str = "desk") -> None:
    (folder / "agents").mkdir(exist_ok=True)
    (folder / "agents" / f"{name}.yaml").write_text(text)


def scripted_parts(folder: Path, **changes: Any) -> Parts:
    (folder / "tiny").mkdir(exist_ok=True)
    base = {"model.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float32)}
    save_file(base, folder / "tiny" / "model.safetensors")
    parts: dict[str, Any] = {
        "engine": lambda base, settings: scripted_engine(),
        "openai_routes": scripted_routes,
        "base_model": lambda setting: BaseModel(folder / "tiny", BASE_DIGEST),
        "chat": lambda path: byte_chat(),
        **changes,
    }
    return Parts(**parts)


def publish(
    registry: Registry, policy: str = "desk", *, gap: float = 0.0, damage: bool = False
) -> Adapter:
    """Publish a LoRA; `gap` makes its probe lie by that much, `damage` flips a byte afterwards."""
    number = max([adapter.ref.version for adapter in registry.versions(policy)], default=0) + 1
    ref = AdapterRef(policy, number)
    draft = registry._root.parent / "draft"
    draft.mkdir(parents=True, exist_ok=True)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{layer}.lora_A.weight": np.full((4, 8), number, np.float32),
        f"{layer}.lora_B.weight": np.ones((8, 4), np.float32),
    }
    save_file(weights, draft / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
        "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (draft / "adapter_config.json").write_text(json.dumps(config))
    ids = tuple(range(20, 40))
    told = tuple(logprob + gap for logprob in scripted_logprobs(ids, ref))
    base = tuple(scripted_logprobs(ids, AdapterRef(policy, 0)))
    adapter = registry.publish(draft, policy=policy, probe=Probe(ids, told, base))
    assert adapter.ref == ref
    if damage:
        file = adapter.path / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.chmod(0o644)
        file.write_bytes(content)
    return adapter
