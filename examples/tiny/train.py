"""Pretrains one of the two models, on a GPU or on the CPU.

python train.py glm-tiny --data build --out build/glm-tiny --compile

Parameters and activations are bf16; AdamW works on float32 copies of the parameters. The text is small and is read
several times, so the weight decay is fifteen times the usual one: with 0.1, unseen text gets worse after a few passes.

Shapes: `B` sequences, `S` tokens of each, `T = B·S`, `E` experts, `L` layers with experts.
"""

import argparse
import json
import math
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from architectures import config
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

WARMUP = 0.02
BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
# Weight of the balancing loss, for a model whose router has no correction bias.
AUXILIARY_WEIGHT = 0.01
# What a step adds to or takes from the correction bias of an expert (DeepSeek-V3, section 2.1.2).
BIAS_STEP = 1e-3
VALID = ("valid-wordnet", "valid-python-docs")
VALID_SEQUENCES = 128
RECENT_STEPS = 50
PROMPTS = (
    "The dog is",
    "A violin is",
    '"happy" describes',
    "To swim is",
    "The module provides",
    "It was a",
    "river, n.",
    "def ",
)


@dataclass
class Log:
    """What is written to training.json."""

    model: str
    device: str
    parameters: int
    batch: list[int]
    learning_rate: float
    weight_decay: float
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    expert_load_max_over_mean: list[float] = field(default_factory=list)
    expert_load_min_over_mean: list[float] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)


class Stream:
    """A stream of tokens; a sequence begins where a document begins, and is filled up with the documents after it."""

    def __init__(self, tokens: Tensor, starts: Tensor, length: int, device: torch.device) -> None:
        self.tokens = tokens.to(device)
        self.starts = starts[starts <= len(tokens) - length].to(device)
        self.offsets = torch.arange(length, device=device)

    def sequences(self, index: Tensor) -> Tensor:
        """The sequences `[B, length]` that begin at the documents `index`."""
        return self.tokens[self.starts[index, None] + self.offsets].long()

    def sample(self, num_sequences: int) -> Tensor:
        """Random sequences."""
        return self.sequences(torch.randint(len(self.starts), (num_sequences,), device=self.starts.device))

    def spread(self, num_sequences: int) -> Tensor:
        """The same evenly spread sequences at every call."""
        return self.sequences(torch.linspace(0, len(self.starts) - 1, num_sequences, device=self.starts.device).long())


class MasterAdamW:
    """AdamW on float32 copies of a model's bf16 parameters."""

    def __init__(self, model: PreTrainedModel, learning_rate: float, weight_decay: float) -> None:
        self.peak = learning_rate
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [parameter.detach().float() for parameter in self.parameters]
        embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        decayed = [p.dim() >= 2 and id(p) not in embeddings for p in self.parameters]
        pairs = list(zip(self.masters, decayed, strict=True))
        groups = [
            {"params": [master for master, decay in pairs if decay], "weight_decay": weight_decay},
            {"params": [master for master, decay in pairs if not decay], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)

    def step(self, scale: float) -> None:
        """One step at `scale` times the peak learning rate, from the gradients in the model, which are cleared."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * scale
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


class Routing:
    """Keeps what the routers of a model said in its last forward pass, in the order of the layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        self.has_bias = hasattr(self.routers[0], "e_score_correction_bias")
        self.outputs: list[tuple[Tensor, Tensor]] = []
        for router in self.routers:
            router.register_forward_hook(self._keep)

    def _keep(self, _router: nn.Module, _inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _, experts_TK = output
        self.outputs.append((logits_TE, experts_TK))

    def take(self) -> tuple[Tensor, Tensor]:
        """How many tokens each expert got `[L, E]`, and the balancing loss of the forward pass just made.

        The balancing loss of a layer is that of the Switch Transformer, E · Σ_e (tokens of e / T) · (mean probability
        of e); its least value is the number of experts per token. It is averaged over the layers after that, so that
        each of them is balanced and not just their sum.
        """
        counts, losses = [], []
        for logits_TE, experts_TK in self.outputs:
            num_tokens, num_experts = logits_TE.shape
            hits = torch.ones(experts_TK.numel(), device=logits_TE.device)
            count_E = torch.zeros(num_experts, device=logits_TE.device).scatter_add(0, experts_TK.flatten(), hits)
            probability_E = logits_TE.float().softmax(-1).mean(0)
            counts.append(count_E)
            losses.append(num_experts * (count_E / num_tokens * probability_E).sum())
        self.outputs.clear()
        return torch.stack(counts), torch.stack(losses).mean()

    @torch.no_grad()
    def nudge(self, counts_LE: Tensor, step: float) -> None:
        """Raises the bias of each expert that got fewer tokens than the mean and lowers that of the others."""
        for router, count_E in zip(self.routers, counts_LE, strict=True):
            router.e_score_correction_bias += step * torch.sign(count_E.mean() - count_E)


def language_loss(model: PreTrainedModel, routing: Routing, tokens_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean cross entropy in nats, the tokens of each expert `[L, E]`, and the balancing loss."""
    hidden_BSH = model.model(input_ids=tokens_BS[:, :-1], use_cache=False).last_hidden_state
    logits_BSV = model.lm_head(hidden_BSH)
    loss = F.cross_entropy(logits_BSV.float().flatten(0, 1), tokens_BS[:, 1:].flatten())
    return loss, *routing.take()


@torch.no_grad()
def evaluate(model: PreTrainedModel, routing: Routing, stream: Stream, batch: int) -> float:
    """Loss on evenly spread sequences of a stream."""
    model.eval()
    losses = [language_loss(model, routing, tokens_BS)[0] for tokens_BS in stream.spread(VALID_SEQUENCES).split(batch)]
    model.train()
    return torch.stack(losses).mean().item()


@torch.no_grad()
def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A sampled continuation of each prompt."""
    model.eval()
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=60)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def schedule(progress: float) -> float:
    """Share of the peak learning rate after `progress` of the steps: a short rise, then a line down to zero."""
    return max(0.0, min(progress / WARMUP, (1 - progress) / (1 - WARMUP)))


class Run:
    """One training run: what is trained, on what, and what is known about it so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(args.data / "tokenizer")
        self.model = AutoModelForCausalLM.from_config(
            config(args.model, self.tokenizer),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        ).to(device)
        self.model.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
        )
        self.routing = Routing(self.model)
        tensors = load_file(args.data / "tokens.safetensors")
        self.train_stream, *valid = (
            Stream(tensors[f"{name}.tokens"], tensors[f"{name}.starts"], args.length + 1, device)
            for name in ("train", *VALID)
        )
        self.valid_streams = dict(zip(VALID, valid, strict=True))
        device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        self.log = Log(
            model=args.model,
            device=device_name,
            parameters=self.model.num_parameters(),
            batch=[args.sequences, args.length],
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
        )

    def train(self) -> None:
        """Trains for the given number of steps, with a report now and then and at the end."""
        args, model, routing, log = self.args, self.model, self.routing, self.log
        optimizer = MasterAdamW(model, args.learning_rate, args.weight_decay)
        loss_function = torch.compile(language_loss, dynamic=False) if args.compile else language_loss
        recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=RECENT_STEPS)
        start = time.perf_counter()
        for log.steps in range(1, args.steps + 1):
            scale = schedule(log.steps / args.steps)
            loss, counts_LE, balance = loss_function(model, routing, self.train_stream.sample(args.sequences))
            (loss if routing.has_bias else loss + AUXILIARY_WEIGHT * balance).backward()
            optimizer.step(scale)
            if routing.has_bias:
                routing.nudge(counts_LE, BIAS_STEP * scale)
            recent.append((loss.detach(), counts_LE))
            if log.steps % args.report_every == 0 or log.steps == args.steps:
                losses, counts = zip(*recent, strict=True)
                log.seconds = time.perf_counter() - start
                self.report(torch.stack(losses).mean().item(), torch.stack(counts).sum(0))

    def report(self, train_loss: float, counts_LE: Tensor) -> None:
        """Evaluates, prints a line and saves. Stops the run if a loss is no longer a number."""
        args, log = self.args, self.log
        losses = {"train": train_loss}
        for name, stream in self.valid_streams.items():
            losses[name] = evaluate(self.model, self.routing, stream, args.sequences)
        if not all(map(math.isfinite, losses.values())):
            raise RuntimeError(f"the loss of {log.model} is not finite after {log.steps} steps: {losses}")
        relative_LE = counts_LE / counts_LE.mean(1, keepdim=True)
        log.tokens = log.steps * args.sequences * args.length
        log.expert_load_max_over_mean = [round(value, 3) for value in relative_LE.amax(1).tolist()]
        log.expert_load_min_over_mean = [round(value, 3) for value in relative_LE.amin(1).tolist()]
        log.curve.append({"step": log.steps, **losses})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        print(
            f"{log.model}  step {log.steps:5}  {log.seconds:4.0f} s  {log.tokens / 1e6:6.1f} M tokens  {shown}  "
            f"expert load {min(log.expert_load_min_over_mean):.2f} to {max(log.expert_load_max_over_mean):.2f}",
            flush=True,
        )
        self.save()

    def save(self) -> None:
        """Writes the model, the tokenizer and the log."""
        self.model.save_pretrained(self.args.out)
        self.tokenizer.save_pretrained(self.args.out)
        (self.args.out / "training.json").write_text(json.dumps(asdict(self.log), indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["glm-tiny", "qwen-tiny"])
    parser.add_argument("--data", type=Path, default=Path("build"), help="what tokenizer.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--sequences", type=int, default=64, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=1.5)
    parser.add_argument("--report-every", type=int, default=500, help="steps; the model is saved then, too")
    parser.add_argument("--compile", action="store_true", help="compile the forward and the backward pass")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    run = Run(args)
    run.train()
    run.log.samples = continuations(run.model, run.tokenizer)
    run.save()
    print(*run.log.samples, sep="\n")


if __name__ == "__main__":
    main()
