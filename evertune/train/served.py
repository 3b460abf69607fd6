"""Rollouts by a server that speaks OpenAI's completions protocol and loads LoRA adapters while it runs, as vLLM does.

Before each rollout the policy is written as one PEFT adapter over the base that the server holds, loaded there under a
name of its own, asked, and unloaded. Prompts are sent and answers received as token ids, so that no text is encoded
twice.
"""

# A prompts, G answers to each

import contextlib
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.errors import TrainingError
from evertune.train.sample import SampledAnswer

SHOWN = 300


@dataclass(frozen=True)
class Server:
    """Where rollouts are made. Meanings and ranges: the recipe's `server`."""

    url: str
    model: str
    key_env: str | None
    seconds: float
    requests: int


class ServedPolicy:
    """Asks a server for the policy's answers.

    Args:
        write: writes the policy as one PEFT adapter over the server's model into a folder.
        folder: where adapters lie while they are served; the server must see it under the same path.
        name: what an adapter is called there, before its number.
        is_main, wait: of several processes, whether this one loads the adapter, and a barrier between them.
    """

    def __init__(
        self,
        server: Server,
        *,
        write: Callable[[Path], None],
        folder: Path,
        name: str,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Set[int],
        is_main: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._server, self._write, self._folder, self._name = server, write, folder, name
        self._stop_ids, self._rollouts = stop_ids, 0
        self._is_main, self._wait = is_main, wait
        # What a server's or a model's own defaults could add is set: answers come from the whole distribution.
        self._asked = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "stop_token_ids": sorted(stop_ids),
            "return_token_ids": True,
        }

    def check(self) -> None:
        """Raise TrainingError unless the server is there and holds the model."""
        held = [one.get("id") for one in self._send("GET", "/models").get("data", [])]
        if self._server.model not in held:
            raise TrainingError(
                f"the rollout server at {self._server.url} holds {', '.join(map(repr, held)) or 'no model'}, expected "
                f"'{self._server.model}'.",
                remedy="Serve the recipe's base there under this name, or correct 'server.model'.",
            )

    def answer(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[SampledAnswer]]:
        """Answers of the policy as it is, in the order of the prompts and their seeds.

        Raises:
            TrainingError: the server cannot be reached, refuses, or answers in another form.
        """
        self._rollouts += 1
        name = f"{self._name}-{self._rollouts}"
        place = self._folder / name
        if self._is_main:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            self._write(place)
            with contextlib.suppress(TrainingError):  # what a run that was killed has left there
                self._send("POST", "/unload_lora_adapter", {"lora_name": name})
            self._send("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": str(place)})
        self._wait()
        try:
            asked = [(prompt, seed) for prompt, group in zip(prompts, seeds, strict=True) for seed in group]
            with ThreadPoolExecutor(max_workers=self._server.requests) as pool:
                said = iter(list(pool.map(lambda one: self._one(name, *one), asked)))
        finally:
            self._wait()
            if self._is_main:
                self._send("POST", "/unload_lora_adapter", {"lora_name": name})
                shutil.rmtree(place)
        return [[next(said) for _ in group] for group in seeds]

    def _one(self, name: str, prompt: Sequence[int], seed: int) -> SampledAnswer:
        body = {"model": name, "prompt": list(prompt), "seed": seed, **self._asked}
        reply = self._send("POST", "/completions", body)
        try:
            (choice,) = reply["choices"]
            ids, reason = choice["token_ids"], choice["finish_reason"]
        except (KeyError, TypeError, ValueError):
            raise self._error(
                f"answered {json.dumps(reply)[:SHOWN]}, expected one choice with 'token_ids' and 'finish_reason'",
                remedy="Use a server that returns token ids (vLLM 0.10.2 or later).",
            ) from None
        stopped = reason == "stop"
        if not ids or not all(isinstance(one, int) for one in ids) or reason not in ("stop", "length"):
            raise self._error(f"answered with the ids {str(ids)[:SHOWN]} and the reason {reason!r}")
        if stopped and ids[-1] not in self._stop_ids:
            # Some leave the stop token out; it is an action of the policy like any other.
            ids = [*ids, choice.get("stop_reason") or min(self._stop_ids)]
        return SampledAnswer(tuple(ids), stopped)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._server.key_env is not None:
            if not os.environ.get(self._server.key_env):
                raise self._error(
                    f"needs a key, and the environment variable {self._server.key_env} is empty",
                    remedy=f"Set {self._server.key_env}, or leave 'server.key_env' out.",
                )
            headers["Authorization"] = f"Bearer {os.environ[self._server.key_env]}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{self._server.url}{path}", data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._server.seconds) as reply:
                text = reply.read().decode("utf-8", errors="replace")
        except urllib.error.HTTPError as error:
            told = error.read().decode("utf-8", errors="replace")[:SHOWN]
            raise self._error(f"refused {path}: {error.code} {told}") from None
        except OSError as error:
            raise self._error(f"cannot be reached: {getattr(error, 'reason', error)}") from None
        try:
            return json.loads(text)
        except ValueError:
            # Loading and unloading answer with a sentence.
            return {"said": text}

    def _error(self, what: str, *, remedy: str = "") -> TrainingError:
        return TrainingError(
            f"the rollout server at {self._server.url} {what}.",
            remedy=remedy
            or "Start it (for vLLM: --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True), then run the "
            "same command again: the stage goes on from its last resume point.",
        )
