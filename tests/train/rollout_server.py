"""A small server of OpenAI's completions protocol with adapters loaded while it runs, as vLLM's: transformers and PEFT
answer, none of our code."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class SmallServer(ThreadingHTTPServer):
    """Attributes: `loaded`, adapters by name; `seen` and `heads`, bodies and headers of all requests; `told`, what it
    answered; `broken`, replies to give instead, by path."""

    def __init__(self, model: Path, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.path, self.name = model, name
        self.loaded: dict[str, Any] = {}
        self.seen: list[tuple[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.told: list[dict[str, Any]] = []
        self.broken: dict[str, tuple[int, str]] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def load(self, name: str, path: str) -> tuple[int, str]:
        if name in self.loaded:
            return 400, json.dumps({"error": f"The lora adapter '{name}' has already been loaded."})
        base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        self.loaded[name] = PeftModel.from_pretrained(base, path).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, str]:
        if self.loaded.pop(name, None) is None:
            return 404, json.dumps({"error": f"The lora adapter '{name}' cannot be found."})
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, str]:
        model, generator = self.loaded[body["model"]], torch.Generator().manual_seed(body["seed"])
        ids, said, logps = list(body["prompt"]), [], []
        while len(said) < body["max_tokens"]:
            logp = (model(input_ids=torch.tensor([ids])).logits[0, -1] / body["temperature"]).log_softmax(dim=-1)
            token = int(torch.multinomial(logp.exp(), 1, generator=generator))
            ids.append(token)
            said.append(token)
            logps.append(float(logp[token]))
            if token in body["stop_token_ids"]:
                break
        reason = "stop" if said[-1] in body["stop_token_ids"] else "length"
        self.told.append({"prompt": body["prompt"], "ids": said, "logps": logps})
        return 200, json.dumps({"choices": [{"index": 0, "token_ids": said, "finish_reason": reason}]})


class _Handler(BaseHTTPRequestHandler):
    server: SmallServer

    def do_GET(self) -> None:
        self._reply("/models", 200, json.dumps({"object": "list", "data": [{"id": self.server.name}]}))

    def do_POST(self) -> None:
        self.server.heads.append(dict(self.headers))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.path.removeprefix("/v1")
        with self.server.lock:
            self.server.seen.append((path, body))
            if path == "/load_lora_adapter":
                found = self.server.load(body["lora_name"], body["lora_path"])
            elif path == "/unload_lora_adapter":
                found = self.server.unload(body["lora_name"])
            else:
                found = self.server.complete(body)
        self._reply(path, *found)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _reply(self, path: str, code: int, text: str) -> None:
        code, text = self.server.broken.get(path, (code, text))
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def serving(model: Path, name: str = "base") -> Iterator[SmallServer]:
    server = SmallServer(model, name)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
