"""Rollouts by a server that speaks vLLM's protocol: only the adapter moves, and training agrees with its samples."""

import json
import socket
import threading

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import octavo
from octavo.checkpoint.accounting import open_ledger
from octavo.errors import AdapterError
from octavo.train.agreement import AgreementError
from octavo.train.metrics import read_metrics
from octavo.train.rollout.adapter_files import adapter_pairs, write_adapter
from octavo.train.rollout.sampler import RolloutError
from octavo.train.rollout.vllm import SamplingParameters, VllmServer
from tests.curves import dequantized

from .grpo_runs import prompts, run, tree
from .vllm_server import VllmLike, apply_adapter, serving

MODELS = ("glm-tiny", "qwen-tiny", "dense-tiny")


@pytest.fixture(scope="module", params=MODELS)
def plain(request, tmp_path_factory):
    """The name of a small model and its dequantized twin, which stock transformers loads."""
    folder = tmp_path_factory.mktemp("plain")
    return request.param, dequantized(octavo.demo.checkpoint(request.param), folder / request.param, torch.float32)


def adapted(name: str, **lora: object):
    torch.manual_seed(0)
    base = octavo.load_model(octavo.demo.checkpoint(name), dtype=torch.float32)
    # B random too, or nothing would be seen
    return get_peft_model(base, octavo.lora_config(base, r=8, init=False, **lora)).eval()


@pytest.mark.parametrize(
    "lora", [{}, {"alpha": 4, "expert_rank": 3}, {"rslora": True}], ids=["plain", "ranks", "rslora"]
)
def test_the_files_are_the_adapter_as_vllm_reads_it(tmp_path, plain, lora):
    name, folder = plain
    model = adapted(name, **lora)
    size = write_adapter(adapter_pairs(model), tmp_path, base_model=name, dtype=torch.float32)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 4096, (2, 12))
    with torch.no_grad():
        bare = stock(input_ids=ids).logits
        apply_adapter(stock, tmp_path)
        found, wanted = stock(input_ids=ids).logits, model(input_ids=ids).logits
    # W + BA in one float32 weight against W and BA apart: other roundings, and no more
    assert (found - wanted).abs().max() < 1e-3 * (wanted - bare).abs().max()


@pytest.mark.parametrize("name", ["glm-tiny", "qwen-tiny"])
def test_a_file_read_with_gate_and_up_swapped_is_another_model(tmp_path, name):
    folder = dequantized(octavo.demo.checkpoint(name), tmp_path / "plain", torch.float32)
    model = adapted(name)
    write_adapter(adapter_pairs(model), tmp_path / "adapter", base_model=name, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 4096, (2, 12))
    with torch.no_grad():
        apply_adapter(stock, tmp_path / "adapter", swaps=True)
        assert (stock(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() > 0.05


def test_the_files_hold_the_adapter_and_nothing_else(tmp_path):
    model = adapted("qwen-tiny")
    size = write_adapter(adapter_pairs(model), tmp_path, base_model="x", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # gate and up share A in the model, and each has its own here
    shared = sum(p.numel() for name, p in trained.items() if "experts.base_layer.lora_A" in name)
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in trained.values()) + shared
    header = size - 2 * sum(tensor.numel() for tensor in tensors.values())
    assert 0 < header < 250 * len(tensors)
    assert size < 0.2 * sum(entry.nbytes for entry in _entries("qwen-tiny"))


def _entries(name):
    ledger = open_ledger(octavo.demo.checkpoint(name))
    return [*ledger.plain.values(), *(weight.weight for weight in ledger.quantized.values())]


def test_what_is_trained_in_full_cannot_go_to_a_server():
    model = adapted("glm-tiny", modules_to_save=["norm"])
    with pytest.raises(AdapterError, match=r"norm.* is trained in full.*lora\.modules_to_save"):
        list(adapter_pairs(model))


def server_run(state: VllmLike, tmp_path, name: str, **train: object):
    data = prompts(tmp_path / "prompts.jsonl")
    with serving(state) as address:
        changed = tree(octavo.demo.checkpoint(name), data, tmp_path / "run", lr=5e-2, **train)
        changed["rollout"] = {"max_new_tokens": 4, "server": address, "stop_mean": 5e-3}
        changed["train"] |= {"completions": 2}
        return run(**changed)


def test_a_run_samples_from_the_server_and_moves_only_the_adapter(tmp_path, plain):
    name, folder = plain
    state = VllmLike(folder)
    assert server_run(state, tmp_path, name).step == 3
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # float32 on both sides: the merged weight rounds otherwise than W and BA apart
    assert all(record["agreement_worst"] < 2e-3 for record in records)
    assert records[-1]["agreement_mean"] > 0
    paths = [path.removeprefix("/v1/") for path, _ in state.requests]
    sync = ["load_lora_adapter", "completions"]
    later = ["unload_lora_adapter", "load_lora_adapter", "completions"]
    assert paths == [*sync, *later, *later, "unload_lora_adapter"]
    assert state.adapters == {}, "nothing is left on the server"
    assert not list((tmp_path / "run" / "rollout").iterdir())
    names = [body["lora_name"] for path, body in state.requests if path.endswith("/load_lora_adapter")]
    assert names == ["octavo-run-0", "octavo-run-1", "octavo-run-2"]
    adapter = 4 * sum(t.numel() for t in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values())
    weights = sum(entry.nbytes for entry in _entries(name))
    for record in records:
        assert adapter < record["sync_bytes"] < 2 * adapter
        assert record["sync_bytes"] < 0.3 * weights
        assert record["sync_seconds"] > 0
    for path, body in state.requests:
        if path == "/v1/completions":
            assert body["temperature"] == 1.0
            assert (body["top_p"], body["top_k"], body["min_p"]) == (1.0, -1, 0.0)


@pytest.mark.parametrize("fault", [{"applies": False}, {"swaps": True}], ids=["ignored", "gate-as-up"])
def test_a_server_that_does_not_apply_the_adapter_stops_the_run(tmp_path, fault):
    folder = dequantized(octavo.demo.checkpoint("qwen-tiny"), tmp_path / "plain", torch.float32)
    with pytest.raises(AgreementError, match=r"see that it applies the adapter"):
        server_run(VllmLike(folder, **fault), tmp_path, "qwen-tiny", steps=6)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # B is zero at first: nothing to apply, and nothing to notice.
    assert records
    assert records[0]["agreement_worst"] < 2e-3


def client(address: str, tmp_path, **changes: object) -> VllmServer:
    arguments = {
        "run": "r",
        "folder": tmp_path / "adapters",
        "base_model": "base",
        "dtype": torch.float32,
        "parameters": SamplingParameters(3, 0.7, (1, 2)),
        "timeout": 5.0,
        **changes,
    }
    return VllmServer(address, **arguments)


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(RolloutError, match=r"`rollout\.server`: http://127\.0\.0\.1:9/v1/models does not answer"):
        client("http://127.0.0.1:9", tmp_path)


def test_a_server_without_dynamic_adapters_says_how_to_start_it(tmp_path):
    state = VllmLike(tmp_path)
    state.enable_lora = False
    with serving(state) as address, pytest.raises(RolloutError, match=r"status 404.*--enable-lora and VLLM_ALLOW"):
        client(address, tmp_path).synchronize(adapted("qwen-tiny", targets=("attention",)), 0)


def test_adapters_of_a_run_that_was_cut_off_are_unloaded(tmp_path):
    state = VllmLike(tmp_path)
    state.adapters |= {"octavo-r-7": None, "octavo-other-7": None}
    with serving(state) as address:
        client(address, tmp_path)
    assert list(state.adapters) == ["octavo-other-7"]


def test_refusals_of_the_server_are_passed_on(tmp_path):
    state = VllmLike(tmp_path)
    with serving(state) as address:
        server = client(address, tmp_path)
        with pytest.raises(RolloutError, match="synchronize before sampling"):
            server.sample([[1]])
        server._name = "octavo-r-0"
        with pytest.raises(RolloutError, match=r"status 404: The model `octavo-r-0` does not exist"):
            server.sample([[1]])
        server.close()


# As vLLM documents its answers; the second completion is first, and ends with a stop token.
RECORDED = {
    "id": "cmpl-5a3c",
    "object": "text_completion",
    "created": 1715644056,
    "model": "octavo-r-0",
    "choices": [
        {
            "index": 1,
            "text": "",
            "logprobs": {
                "text_offset": [0],
                "token_logprobs": [-0.25],
                "tokens": ["token_id:2"],
                "top_logprobs": [{"token_id:2": -0.25}],
            },
            "finish_reason": "stop",
            "stop_reason": 2,
            "prompt_logprobs": None,
        },
        {
            "index": 0,
            "text": " a b",
            "logprobs": {
                "text_offset": [0, 2, 4],
                "token_logprobs": [-1.5, None, -0.125],
                "tokens": ["token_id:264", "token_id:293", "token_id:11"],
                "top_logprobs": [{"token_id:264": -1.5}, None, {"token_id:11": -0.125}],
            },
            "finish_reason": "length",
            "stop_reason": None,
            "prompt_logprobs": None,
        },
    ],
    "usage": {"prompt_tokens": 4, "total_tokens": 8, "completion_tokens": 4},
}


class Recorded(VllmLike):
    def __init__(self, answer) -> None:
        super().__init__(None)
        self.answer = answer

    def complete(self, body):
        return self.answer


def sampled(tmp_path, answer):
    state = Recorded(answer)
    with serving(state) as address:
        server = client(address, tmp_path)
        server._name = "octavo-r-0"
        return server.sample([[5, 6], [7, 8]]), state.requests[-1][1]


def test_a_recorded_answer(tmp_path):
    (first, second), body = sampled(tmp_path, RECORDED)
    assert (first.ids, second.ids) == ([264, 293, 11], [2])
    assert (first.logprobs[0], first.logprobs[2], second.logprobs) == (-1.5, -0.125, [-0.25])
    assert first.logprobs[1] != first.logprobs[1], "null is no number"
    assert body["prompt"] == [[5, 6], [7, 8]]
    assert (body["max_tokens"], body["temperature"], body["stop_token_ids"]) == (3, 0.7, [1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: answer["choices"].pop(), r"1 completions for 2 prompts"),
        (lambda answer: answer["choices"][0].update(index=0), r"for 2 prompts, of index \[0, 0\]"),
        (lambda answer: answer["choices"][0].pop("index"), r"choices\.0\.index: Field required"),
        (lambda answer: answer.update(choices=None), r"choices: Input should be a valid"),
        (lambda answer: answer["choices"][0].update(logprobs=[1]), r"choices\.0\.logprobs: Input should be"),
        (lambda answer: answer["choices"][1]["logprobs"]["token_logprobs"].pop(), r"of 3 tokens with 2 log-prob"),
        (lambda answer: answer["choices"][0]["logprobs"].update(tokens=["token_id:-1"]), r"without token ids"),
        (
            lambda answer: answer["choices"][0]["logprobs"].update(
                tokens=["token_id:5"] * 4, token_logprobs=[-1.0] * 4
            ),
            r"of 4 tokens .* asked for one of at most 3",
        ),
        (lambda answer: answer["choices"][0].pop("logprobs"), r"without token ids and log-probabilities"),
        (lambda answer: answer["choices"][0]["logprobs"].update(tokens=["the"]), r"`return_tokens_as_token_ids`"),
    ],
)
def test_an_answer_that_cannot_be_used(tmp_path, change, message):
    answer = json.loads(json.dumps(RECORDED))
    change(answer)
    with pytest.raises(RolloutError, match=message):
        sampled(tmp_path, answer)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"garbage\r\n\r\n", r"does not answer"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{", r"does not answer: IncompleteRead"),
        (b"HTTP/1.0 200 OK\r\n\r\n\xff\xfe", r"which is not what vLLM documents"),
        (b"HTTP/1.0 200 OK\r\n\r\n[]", r"which is not what vLLM documents"),
        (b"HTTP/1.0 503 Busy\r\n\r\n<html>busy</html>", r"refused with status 503: <html>busy"),
    ],
)
def test_bytes_that_are_no_answer(tmp_path, sent, message):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(sent)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RolloutError, match=message):
            client(f"http://127.0.0.1:{listening.getsockname()[1]}", tmp_path)
        thread.join()
