"""Trains `dense-tiny`, a small dense model, on the definitions that ship with octavo, and writes it in FP8.

python dense.py --out ../../src/octavo/demo/models/dense-tiny

A few minutes on one CPU core. The text is a dictionary: ``river, n. A large natural stream of water.``, 2800 entries;
the 214 of the evaluation file are not trained on. The tokenizer is that of the other two models.
"""

import argparse
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

import octavo
from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import quantize

SHORT_FORMS = {"noun": "n.", "verb": "v.", "adjective": "adj.", "adverb": "adv."}
LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
BLOCK = 128
BATCH = 64
WARMUP = 20
WEIGHT_DECAY = 0.3
IGNORED = -100


def config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """q_proj has 160 rows, gate_proj 416: one and a quarter, three and a quarter blocks of 128."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=416,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )


def entries(path: Path) -> Iterator[str]:
    """`river, n. A large natural stream of water.` for each chat of a file of definitions."""
    for line in path.read_text(encoding="utf-8").splitlines():
        question, answer = json.loads(line)["messages"]
        word = re.search(r"'(\w+)'", question["content"])
        kind, _, meaning = answer["content"].partition(": ")
        assert word is not None, question
        yield f"{word[1]}, {SHORT_FORMS[kind]} {meaning[:1].upper()}{meaning[1:]}"


def rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    return [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in entries(path)]


def loss_of(model: Qwen3ForCausalLM, batch: list[Tensor], pad: int) -> Tensor:
    """Mean cross entropy in nats per token, padding left out."""
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in batch])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~mask, IGNORED)).loss
    return loss


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, held_out: list[Tensor], pad: int) -> float:
    model.eval()
    parts = [held_out[start : start + BATCH] for start in range(0, len(held_out), BATCH)]
    tokens = [sum(len(row) - 1 for row in part) for part in parts]
    losses = [loss_of(model, part, pad).item() for part in parts]
    model.train()
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, object]:
    data = {part: rows(octavo.demo.data(part), tokenizer) for part in ("train", "eval")}
    pad, began = tokenizer.pad_token_id, time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    curve, tokens, recent = [], 0, []
    for step in range(args.steps):
        scale = min((step + 1) / WARMUP, (args.steps - step) / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        batch = [data["train"][index] for index in torch.randperm(len(data["train"]))[:BATCH]]
        loss = loss_of(model, batch, pad)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += sum(len(row) - 1 for row in batch)
        recent = [*recent[-19:], loss.item()]
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            point = {
                "step": step + 1,
                "train": sum(recent) / len(recent),
                "held-out": evaluate(model, data["eval"], pad),
            }
            curve.append(point)
            print(point, f"{time.perf_counter() - began:.0f} s", flush=True)
    return {
        "model": "dense-tiny",
        "device": "one CPU core",
        "source": "src/octavo/demo/data/definitions-train.jsonl (WordNet 3.0)",
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": BATCH,
        "learning_rate": args.lr,
        "weight_decay": WEIGHT_DECAY,
        "steps": args.steps,
        "tokens": tokens,
        "seconds": time.perf_counter() - began,
        "curve": curve,
    }


def write(model: Qwen3ForCausalLM, out: Path) -> None:
    """As Qwen3's own FP8 checkpoints: `fp8` with blocks of 128 x 128 and float32 scales."""
    stored = {}
    for key, tensor in model.bfloat16().state_dict().items():
        if LINEAR.search(key):
            weight = quantize(tensor, ScaleLayout("block", (BLOCK, BLOCK)))
            stored[key], stored[f"{key}_scale_inv"] = weight.codes[0, 0].clone(), weight.scales[0, 0].clone()
        elif key != "lm_head.weight":
            stored[key] = tensor.contiguous()
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "model.embed_tokens", "model.norm"],
    }
    fields = model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"], "quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    beside = octavo.demo.checkpoint("qwen-tiny")
    tokenizer = AutoTokenizer.from_pretrained(beside)
    model = Qwen3ForCausalLM(config(tokenizer)).float().train()
    log = train(model, tokenizer, args)
    args.out.mkdir(parents=True, exist_ok=True)
    write(model, args.out)
    (args.out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(beside / name, args.out / name)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(args.out)
    reloaded = octavo.load_model(args.out, dtype=torch.float32)
    rounded = evaluate(reloaded, rows(octavo.demo.data("eval"), tokenizer), tokenizer.pad_token_id)
    print(f"loss on held-out definitions after rounding to FP8: {rounded:.4f}")
    prompts = tokenizer(["river,"] * 4, return_tensors="pt")
    for line in tokenizer.batch_decode(reloaded.generate(**prompts, max_new_tokens=24, do_sample=True)):
        print(line)


if __name__ == "__main__":
    main()
