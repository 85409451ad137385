"""Full-size checkpoints with the names, shapes, dtypes, shards and configs of real ones, and drawn values.

    python -m benchmarks.checkpoints glm /data/glm
    python -m benchmarks.checkpoints qwen3-coder /data/qwen3 --layers 4
    python -m benchmarks.checkpoints qwen3-coder /data/qwen3-bf16 --layers 24 --plain

``glm`` is GLM-4.7-Flash-FP8-Dynamic (compressed-tensors, one bfloat16 scale per row; layers 1, 39 and 46 are bfloat16),
``qwen3-coder`` is Qwen3-Coder-30B-A3B-Instruct-FP8 (blocks of 128 × 128), ``qwen3-8b`` the dense Qwen3-8B-FP8 (the same
blocks). Weights are drawn where there is a GPU,
on it, with rows of different size, channels that stand out and single outliers, and are written shard by shard while
the next are drawn. ``build_plain`` makes the bfloat16 model of the same shapes in memory. The tokenizer is that of the
small models that ship with octavo; its 4,096 tokens are the first of the vocabulary.
"""

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

import octavo.demo
from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import quantize

GB = 1e9
SHARD_BYTES = 5_000_000_000
STD = 0.02
# Stacks being written or waiting for it: of 0.2 GB each, 0.4 GB in a bfloat16 layer.
WAITING = 6
WRITERS = 4
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape that are drawn at once: one linear layer, or one projection of every expert.

    ``layout`` None: bfloat16. ``names``: without ``.weight``.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    layout: ScaleLayout | None
    kind: str = "matrix"
    dtype: torch.dtype = torch.bfloat16
    suffix: str = ".weight"


@dataclass(frozen=True)
class Kind:
    """A checkpoint to be made. ``sizes``: its config without the quantization.

    ``plain_layers``: those left in bfloat16 although they are named by nothing but the ignore list.
    """

    name: str
    repository: str
    sizes: Mapping[str, Any]
    layout: ScaleLayout
    scale: str
    scale_dtype: torch.dtype
    plain_layers: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False
    """Whether nothing is quantized: the bfloat16 model that the real one was made from."""

    @property
    def num_layers(self) -> int:
        return int(self.sizes["num_hidden_layers"])

    @property
    def is_dense(self) -> bool:
        """Whether no layer has experts."""
        return "moe_intermediate_size" not in self.sizes

    def resized(self, **sizes: Any) -> "Kind":
        """With other sizes; layers that no longer exist leave the list of plain ones, the first stays."""
        new = replace(self, sizes={**self.sizes, **sizes})
        return replace(new, plain_layers=tuple(layer for layer in self.plain_layers if layer < new.num_layers))


GLM = Kind(
    name="glm",
    repository="unsloth/GLM-4.7-Flash-FP8-Dynamic",
    sizes={
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "dtype": "bfloat16",
        "vocab_size": 154_880,
        "hidden_size": 2048,
        "intermediate_size": 10_240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 202_752,
        "initializer_range": STD,
        "rms_norm_eps": 1e-05,
        "rope_interleave": True,
        "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    layout=ScaleLayout("channel"),
    scale="weight_scale",
    scale_dtype=torch.bfloat16,
    plain_layers=(1, 39, 46),
)
QWEN3_CODER = Kind(
    name="qwen3-coder",
    repository="Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8",
    sizes={
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 5472,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 262_144,
        "initializer_range": STD,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10_000_000,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    layout=ScaleLayout("block", (128, 128)),
    scale="weight_scale_inv",
    scale_dtype=torch.float32,
)
QWEN3_8B = Kind(
    name="qwen3-8b",
    repository="Qwen/Qwen3-8B-FP8",
    sizes={
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 40_960,
        "initializer_range": STD,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    layout=ScaleLayout("block", (128, 128)),
    scale="weight_scale_inv",
    scale_dtype=torch.float32,
)
KINDS = {kind.name: kind for kind in (GLM, QWEN3_CODER, QWEN3_8B)}
# Small enough for a CPU, and no size is a multiple of a block where the real one is none.
TINY = {
    "glm": {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
        "kv_lora_rank": 112, "q_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
        "max_position_embeddings": 4096,
    },
    "qwen3-coder": {
        "vocab_size": 4096, "hidden_size": 160, "intermediate_size": 160, "moe_intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8,
        "num_experts_per_tok": 4, "max_position_embeddings": 4096,
    },
    "qwen3-8b": {
        "vocab_size": 4096, "hidden_size": 160, "intermediate_size": 352, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
    },
}  # fmt: skip


def stacks(kind: Kind) -> Iterator[Stack]:
    """Every tensor of the checkpoint, in the order of the model's state dict."""
    s = kind.sizes
    hidden, vocabulary = s["hidden_size"], s["vocab_size"]
    yield Stack(("model.embed_tokens",), (vocabulary, hidden), None)
    for layer in range(kind.num_layers):
        yield from (replace(stack, layout=None) if kind.plain else stack for stack in _layer(kind, layer))
    yield Stack(("model.norm",), (hidden,), None, "norm")
    yield Stack(("lm_head",), (vocabulary, hidden), None)


def _layer(kind: Kind, layer: int) -> Iterator[Stack]:
    s, prefix = kind.sizes, f"model.layers.{layer}"
    hidden = s["hidden_size"]
    layout = None if layer in kind.plain_layers else kind.layout
    for name, shape in _attention(s).items():
        if len(shape) == 1:
            yield Stack((f"{prefix}.self_attn.{name}",), shape, None, "norm")
        else:
            yield Stack((f"{prefix}.self_attn.{name}",), shape, layout)

    def mlp(name: str, width: int) -> Iterator[Stack]:
        yield Stack((f"{name}.gate_proj",), (width, hidden), layout)
        yield Stack((f"{name}.up_proj",), (width, hidden), layout)
        yield Stack((f"{name}.down_proj",), (hidden, width), layout)

    if kind.is_dense or layer < s.get("first_k_dense_replace", 0):
        yield from mlp(f"{prefix}.mlp", s["intermediate_size"])
    else:
        width = s["moe_intermediate_size"]
        experts = s["n_routed_experts"] if "n_routed_experts" in s else s["num_experts"]
        yield Stack((f"{prefix}.mlp.gate",), (experts, hidden), None)
        if s.get("topk_method") == "noaux_tc":
            bias = (f"{prefix}.mlp.gate",)
            yield Stack(bias, (experts,), None, "bias", torch.float32, ".e_score_correction_bias")
        for projection, shape in (
            ("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))
        ):  # fmt: skip
            names = tuple(f"{prefix}.mlp.experts.{expert}.{projection}_proj" for expert in range(experts))
            yield Stack(names, shape, layout)
        if shared := s.get("n_shared_experts"):
            yield from mlp(f"{prefix}.mlp.shared_experts", shared * width)
    yield Stack((f"{prefix}.input_layernorm",), (hidden,), None, "norm")
    yield Stack((f"{prefix}.post_attention_layernorm",), (hidden,), None, "norm")


def _attention(s: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = s["hidden_size"], s["num_attention_heads"]
    if "kv_lora_rank" in s:
        queries = heads * (s["qk_nope_head_dim"] + s["qk_rope_head_dim"])
        return {
            "q_a_proj": (s["q_lora_rank"], hidden),
            "q_a_layernorm": (s["q_lora_rank"],),
            "q_b_proj": (queries, s["q_lora_rank"]),
            "kv_a_proj_with_mqa": (s["kv_lora_rank"] + s["qk_rope_head_dim"], hidden),
            "kv_a_layernorm": (s["kv_lora_rank"],),
            "kv_b_proj": (heads * (s["qk_nope_head_dim"] + s["v_head_dim"]), s["kv_lora_rank"]),
            "o_proj": (hidden, heads * s["v_head_dim"]),
        }
    head, keys = s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    return {
        "q_proj": (heads * head, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, heads * head),
        "q_norm": (head,),
        "k_norm": (head,),
    }


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


def entries(kind: Kind, stack: Stack) -> Iterator[Entry]:
    """The tensors of a stack, weights and scales."""
    for name in stack.names:
        if stack.layout is None:
            yield Entry(f"{name}{stack.suffix}", stack.dtype, stack.shape)
        else:
            yield Entry(f"{name}.weight", torch.float8_e4m3fn, stack.shape)
            yield Entry(f"{name}.{kind.scale}", kind.scale_dtype, stack.layout.grid(*stack.shape))


def shards(found: Iterator[Entry], limit: int) -> list[list[Entry]]:
    """Tensors in order, as many in a file as stay within ``limit`` bytes."""
    files: list[list[Entry]] = [[]]
    held = 0
    for entry in found:
        if files[-1] and held + entry.nbytes > limit:
            files.append([])
            held = 0
        files[-1].append(entry)
        held += entry.nbytes
    return files


def quantization_config(kind: Kind) -> dict[str, Any]:
    """What the checkpoint's config says of its storage, and of what is left out."""
    layers = kind.num_layers
    if kind.layout.kind == "block":
        routers = () if kind.is_dense else ("mlp.gate",)
        names = ("input_layernorm", *routers, "post_attention_layernorm")
        plain = [f"model.layers.{n}.{name}" for n in range(layers) for name in names]
        return {
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", *plain],
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(kind.layout.block or ()),
        }
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    ignored = [
        name
        for stack in stacks(kind)
        if stack.layout is None and stack.kind == "matrix" and not stack.names[0].endswith("embed_tokens")
        for name in stack.names
        # the router is no linear layer in transformers, so the writer of these configs never sees it
        if not name.endswith("mlp.gate")
    ]
    return {
        "config_groups": {
            "group_0": {
                "format": "float-quantized",
                "targets": ["Linear"],
                "weights": {**scheme, "strategy": "channel", "dynamic": False, "observer": "minmax"},
                "input_activations": {**scheme, "strategy": "token", "dynamic": True, "observer": None},
                "output_activations": None,
            }
        },
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


class Writer:
    """Writes tensors to their places in safetensors files, from threads, while others are drawn."""

    def __init__(self, folder: Path, files: list[list[Entry]]) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._handles = []
        self.weight_map: dict[str, str] = {}
        for number, held in enumerate(files, 1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            # the order in which the safetensors library itself lays out a file
            for entry in sorted(held, key=lambda entry: (-entry.dtype.itemsize, entry.key)):
                offsets = [end, end + entry.nbytes]
                header[entry.key] = {
                    "dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets
                }  # fmt: skip
                self.weight_map[entry.key] = name
                end += entry.nbytes
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            handle = (folder / name).open("wb")
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.flush()
            handle.truncate(8 + len(text) + end)
            self._handles.append(handle)
            for entry in held:
                begin = header[entry.key]["data_offsets"][0]
                self._places[entry.key] = (len(self._handles) - 1, 8 + len(text) + begin)
        self._pool = ThreadPoolExecutor(WRITERS)
        self._waiting = threading.Semaphore(WAITING)
        self._futures: list[Future[None]] = []

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write CPU tensors; waits while the disk is behind."""
        self._waiting.acquire()
        self._futures.append(self._pool.submit(self._write, dict(tensors)))

    def _write(self, tensors: dict[str, Tensor]) -> None:
        try:
            for key, tensor in tensors.items():
                number, offset = self._places[key]
                data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
                while data:
                    written = os.pwrite(self._handles[number].fileno(), data, offset)
                    data, offset = data[written:], offset + written
        finally:
            self._waiting.release()

    def close(self) -> None:
        """Wait for the disk; raises what a thread raised."""
        self._pool.shutdown(wait=True)
        for future in self._futures:
            future.result()
        for handle in self._handles:
            handle.close()


def draw(stack: Stack, generator: torch.Generator) -> Tensor:
    """[names, *shape] in float32: rows of different size, channels that stand out, one value in 20,000 far off."""
    shape, device = (len(stack.names), *stack.shape), generator.device
    if stack.kind == "norm":
        return 1 + 0.1 * torch.randn(shape, generator=generator, device=device)
    if stack.kind == "bias":
        return 0.01 * torch.randn(shape, generator=generator, device=device)
    weight = torch.randn(shape, generator=generator, device=device)
    rows, columns = (*shape[:2], 1), (shape[0], 1, shape[2])
    weight *= STD * torch.exp(0.35 * torch.randn(rows, generator=generator, device=device))
    weight *= 1 + 3.0 * (torch.rand(columns, generator=generator, device=device) < 0.004)
    far = max(1, weight.numel() // 20_000)
    index = torch.randint(weight.numel(), (far,), generator=generator, device=device)
    weight.view(-1)[index] *= 8
    return weight


def stored(kind: Kind, stack: Stack, weight: Tensor) -> dict[str, Tensor]:
    """What the file holds of a stack, on the CPU."""
    if stack.layout is None:
        values = _to_host(weight.to(stack.dtype))
        return {f"{name}{stack.suffix}": values[number] for number, name in enumerate(stack.names)}
    made = quantize(weight, stack.layout, scale_dtype=kind.scale_dtype)
    codes, scales = _to_host(made.codes[:, 0].view(torch.uint8)), _to_host(made.scales[:, 0].to(kind.scale_dtype))
    tensors = {f"{name}.weight": codes[number] for number, name in enumerate(stack.names)}
    return tensors | {f"{name}.{kind.scale}": scales[number] for number, name in enumerate(stack.names)}


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    # pageable copies run at a tenth of the speed
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def write(
    name: str,
    folder: Path,
    *,
    layers: int | None = None,
    tiny: bool = False,
    plain: bool = False,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
) -> int:
    """Write a checkpoint and return the bytes of its tensors.

    ``layers``: as many from the first, all by default. ``tiny``: sizes for a CPU. ``plain``: nothing is quantized.
    """
    kind = replace(resolve(name, layers=layers, tiny=tiny), plain=plain)
    return write_kind(kind, folder, shard_bytes=shard_bytes, seed=seed)


def write_config(kind: Kind, folder: Path) -> None:
    """Write the config of ``kind``."""
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {} if kind.plain else {"quantization_config": quantization_config(kind)}
    (folder / "config.json").write_text(json.dumps({**kind.sizes, **quantization}, indent=2))


def write_kind(kind: Kind, folder: Path, *, shard_bytes: int = SHARD_BYTES, seed: int = 0) -> int:
    """Write a checkpoint of ``kind`` and return the bytes of its tensors."""
    write_config(kind, folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(octavo.demo.checkpoint("glm-tiny" if kind.name == "glm" else "qwen-tiny") / file, folder / file)
    files = shards((entry for stack in stacks(kind) for entry in entries(kind, stack)), shard_bytes)
    total = sum(entry.nbytes for held in files for entry in held)
    if shutil.disk_usage(folder).free < total:
        raise SystemExit(
            f"{folder} has {shutil.disk_usage(folder).free / GB:.1f} GB left, and {total / GB:.1f} are needed"
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    generator = torch.Generator(device=device).manual_seed(seed)
    writer = Writer(folder, files)
    try:
        for stack in stacks(kind):
            writer.put(stored(kind, stack, draw(stack, generator)))
    finally:
        writer.close()
    index = {"metadata": {"total_size": total}, "weight_map": writer.weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def resolve(name: str, *, layers: int | None = None, tiny: bool = False) -> Kind:
    """The kind called ``name``, with its first ``layers`` layers or in sizes for a CPU."""
    kind = KINDS[name]
    sizes = dict(TINY[name]) if tiny else {}
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return kind.resized(**sizes) if sizes else kind


def build_plain(name: str, *, layers: int | None = None, tiny: bool = False, seed: int = 0) -> PreTrainedModel:
    """The bfloat16 model of the same shapes and spread, made where it will run, without a disk.

    It computes as plain transformers does, experts with ``grouped_mm``; ``octavo.configure`` puts it on octavo's
    forward.
    """
    kind = resolve(name, layers=layers, tiny=tiny)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    config = AutoConfig.for_model(**kind.sizes)
    if not kind.is_dense:
        config._experts_implementation = "grouped_mm"
    with torch.device(device), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            what = "matrix" if parameter.ndim > 1 else "norm"
            shape = tuple(parameter.shape[-2:]) if parameter.ndim > 1 else tuple(parameter.shape)
            leading = parameter.shape[0] if parameter.ndim == 3 else 1
            names = (key,) * leading
            parameter.copy_(draw(Stack(names, shape, None, what), generator).view(parameter.shape))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(draw(Stack((key,), tuple(buffer.shape), None, "bias"), generator)[0])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="the first so many; all by default")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--plain", action="store_true", help="in bfloat16")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / GB)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config-only", action="store_true", help="nothing but config.json, which a plan is made of")
    args = parser.parse_args()
    if args.config_only:
        kind = resolve(args.model, layers=args.layers, tiny=args.tiny)
        write_config(replace(kind, plain=args.plain), args.folder)
        return
    start = time.perf_counter()
    size = write(
        args.model, args.folder, layers=args.layers, tiny=args.tiny, plain=args.plain,
        shard_bytes=int(args.shard_gb * GB), seed=args.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    kind = f"{KINDS[args.model].repository}{' in bfloat16' if args.plain else ''}"
    print(f"{args.folder}: {size / GB:.3f} GB of {kind} in {seconds:.1f} s")


if __name__ == "__main__":
    main()
