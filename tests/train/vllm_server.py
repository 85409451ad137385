"""A local server that answers as vLLM documents, on stock transformers: it reads an adapter's files by vLLM's rules,
adds ``scaling · B · A`` to the plain weights, and samples token by token.

vLLM itself needs a GPU. What is taken from its documentation and sources: the paths and bodies of the requests, the
answers and status codes, the rules by which an adapter's names and scaling are read, and the form of log-probabilities.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

_NAME = re.compile(r"^base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight$")
_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<projection>gate|up|down)_proj$")


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class VllmLike:
    """The state of the server. ``applies``: whether adapters reach the model; a server that ignores them is a fault
    that must be noticed. ``swaps``: whether it takes gate for up.
    """

    def __init__(self, plain: Path, *, applies: bool = True, swaps: bool = False) -> None:
        self.plain = plain
        self.applies, self.swaps = applies, swaps
        self.adapters: dict[str, PreTrainedModel] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.enable_lora = True

    def load(self, body: dict[str, Any]) -> str:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").is_file():
            raise Refusal(404, f"Loading lora {name} failed: No adapter found for {path}")
        model = AutoModelForCausalLM.from_pretrained(self.plain, dtype=torch.float32).eval()
        if self.applies:
            apply_adapter(model, path, swaps=self.swaps)
        self.adapters[name] = model
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> str:
        name = body["lora_name"]
        if name not in self.adapters:
            raise Refusal(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return f"Success: LoRA adapter '{name}' removed successfully."

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["model"] not in self.adapters:
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        assert body["logprobs"] == 0
        assert body["return_tokens_as_token_ids"]
        choices = [
            self._choice(index, self.adapters[body["model"]], prompt, body)
            for index, prompt in enumerate(body["prompt"])
        ]
        # In whatever order they were finished.
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    def _choice(self, index: int, model: PreTrainedModel, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        ids, logprobs = list(prompt), []
        reason = "length"
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float() / body["temperature"]
            token = int(torch.multinomial(logits.softmax(-1), 1))
            logprobs.append(float(logits.log_softmax(-1)[token]))
            ids.append(token)
            if token in body["stop_token_ids"]:
                reason = "stop"
                break
        new = ids[len(prompt) :]
        found = {
            "text_offset": [0] * len(new),
            "token_logprobs": logprobs,
            "tokens": [f"token_id:{token}" for token in new],
            "top_logprobs": [{f"token_id:{token}": value} for token, value in zip(new, logprobs, strict=True)],
        }
        return {"index": index, "text": "", "logprobs": found, "finish_reason": reason, "stop_reason": None}


def apply_adapter(model: PreTrainedModel, path: Path, *, swaps: bool = False) -> None:
    """Add an adapter to a plain model by vLLM's reading of its files; every expert must have all of its projections."""
    config = json.loads((path / "adapter_config.json").read_text())
    assert not config.get("rank_pattern"), "vLLM does not read it"
    scaling = config["lora_alpha"] / config["r"]
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        found = _NAME.match(name)
        if found is None:
            raise Refusal(500, f"unsupported LoRA weight: {name}")
        factors.setdefault(found["layer"], {})[found["side"]] = tensor.float()
    per_layer: dict[str, set[tuple[int, str]]] = {}
    for layer, pair in factors.items():
        assert len(pair["A"]) <= config["r"]
        delta = scaling * pair["B"] @ pair["A"]
        expert = _EXPERT.match(layer)
        if expert is None:
            model.get_parameter(f"{layer}.weight").data += delta
            continue
        number, projection = int(expert["number"]), expert["projection"]
        per_layer.setdefault(expert["experts"], set()).add((number, projection))
        if swaps:
            projection = {"gate": "up", "up": "gate"}.get(projection, projection)
        stack = model.get_parameter(f"{expert['experts']}.{'down' if projection == 'down' else 'gate_up'}_proj").data
        rows = stack.shape[1] if projection == "down" else stack.shape[1] // 2
        start = rows if projection == "up" else 0
        stack[number, start : start + rows] += delta
    for experts, there in per_layer.items():
        count = len(model.get_parameter(f"{experts}.down_proj"))
        if there != {(n, p) for n in range(count) for p in ("gate", "up", "down")}:
            raise Refusal(500, f"{experts} lacks adapters of some experts")


@contextmanager
def serving(state: VllmLike) -> Iterator[str]:
    """The address of a server over ``state``, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cards = [{"id": "base", "object": "model"}, *({"id": name, "object": "model"} for name in state.adapters)]
            self._answer(200, {"object": "list", "data": cards})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, body))
            verbs = {"/v1/completions": state.complete}
            if state.enable_lora:
                verbs |= {"/v1/load_lora_adapter": state.load, "/v1/unload_lora_adapter": state.unload}
            if self.path not in verbs:
                self._answer(404, {"detail": "Not Found"})
                return
            try:
                self._answer(200, verbs[self.path](body))
            except Refusal as refusal:
                error = {"message": str(refusal), "type": "BadRequestError", "param": None, "code": refusal.status}
                self._answer(refusal.status, {"error": error})

        def _answer(self, status: int, content: Any) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
