"""A server that answers as vLLM 0.32 does, in a process of its own: `python completion_server.py MODEL_DIRECTORY`.

The fields are those of its /v1/completions, /v1/models, /collective_rpc and /reset_prefix_cache that we use. What it
computes is no engine of ours: a whole forward pass for every token. It prints its port when it listens.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from trivet.hub.checkpoint import load_any
from trivet.model import Transformer

LOCK = threading.Lock()
STATE: dict[str, Any] = {"reloads": 0, "stale_prefixes": False}


@torch.no_grad()
def complete(model: Transformer, asked: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(asked["seed"])
    ids, logprobs, reason, stop = list(asked["prompt"]), [], "length", None
    for _ in range(asked["max_tokens"]):
        hidden = model(torch.tensor([ids]))[0, -1]
        logits = model.logits(hidden).float()
        logp = (logits / (asked["temperature"] or 1.0)).log_softmax(-1)
        if asked["temperature"] == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(logp.exp(), 1, generator=generator))
        ids.append(token)
        logprobs.append(logp[token].item())  # --logprobs-mode processed_logprobs
        if token in asked["stop_token_ids"]:
            reason, stop = "stop", token
            break
    tokens = ids[len(asked["prompt"]) :]
    written = {
        "token_logprobs": logprobs, "tokens": [f"<{t}>" for t in tokens], "top_logprobs": None, "text_offset": None,
    }  # fmt: skip
    choice = {
        "index": 0, "text": "", "finish_reason": reason, "stop_reason": stop,
        "logprobs": None if asked.get("logprobs") is None else written,
        "token_ids": tokens if asked.get("return_token_ids") else None,
        "prompt_token_ids": asked["prompt"] if asked.get("return_token_ids") else None,
    }  # fmt: skip
    return {"object": "text_completion", "model": asked["model"], "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "tiny"}]} if self.path == "/v1/models" else STATE | {"model": None})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(body or "{}")
        with LOCK:
            if self.path == "/collective_rpc":
                assert asked["method"] == "reload_weights"
                STATE["model"] = load_any(Path(asked["kwargs"]["weights_path"])).eval()
                STATE["reloads"] += 1
                STATE["stale_prefixes"] = True
                self.answer({"results": [None]})
            elif self.path == "/reset_prefix_cache":
                STATE["stale_prefixes"] = False
                self.answer({"success": True})
            elif self.path == "/be_busy":
                STATE["busy"] = True
                self.answer({})
            elif STATE.pop("busy", False):
                self.answer({"error": {"message": "busy", "code": 503}}, 503)
            elif asked.get("model") != "tiny" or STATE["stale_prefixes"]:
                self.answer({"error": {"message": "no such model, or old prefixes", "code": 404}}, 404)
            else:
                self.answer(complete(STATE["model"], asked))

    def answer(self, content: dict[str, Any], code: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


class Listener(ThreadingHTTPServer):
    request_queue_size = 128  # that call at the same time


if __name__ == "__main__":
    torch.set_num_threads(1)
    STATE["model"] = load_any(Path(sys.argv[1])).eval()
    server = Listener(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
