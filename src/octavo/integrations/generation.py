"""``octavo.generate``: transformers' ``generate`` with each new token as one CUDA graph.

Decoding launches thousands of small kernels per token, and Python launches them slower than a GPU runs them. Here keys
and values lie in a cache of fixed length, a token's forward is captured once per call and replayed for every further
token; logits processors, sampling and stopping criteria run outside of it, as they are. The cache and the graph are
given back when the call ends, so nothing can go stale: a later call sees the adapter as it is then.

Legend: ``B`` sequences, ``P`` prompt positions, ``S`` positions of the cache, ``V`` vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.stopping_criteria import EosTokenCriteria

from octavo.errors import EngineError
from octavo.integrations.decode_attention import decoding
from octavo.integrations.experts import experts_layout
from octavo.integrations.repeated import Repeated
from octavo.nn.experts import Float8Experts, OctavoExperts
from octavo.ops.engines import ProductEngine

Graphs = Literal["auto"] | bool

# Between two questions whether every sequence has ended, which wait for the device.
TOKENS_BETWEEN_CHECKS = 16
# Lengths of the cache are multiples, for aligned rows of the mask.
_ALIGNMENT = 64


def generate(model: Any, *, graphs: Graphs = "auto", **arguments: Any) -> Tensor:
    """``model.generate(**arguments)`` for a model with or without adapters: [B, length], greedy or sampled.

    ``graphs``: ``auto`` replays a CUDA graph per token where :func:`why_no_graphs` knows nothing against it, ``True``
    insists, ``False`` leaves all to transformers. Attention over the cache then runs in other kernels, which round
    otherwise.

    Raises:
        EngineError: graphs were asked for and cannot be had, or a step cannot be captured.
    """
    if not uses_graphs(model, graphs):
        return model.generate(**arguments)  # type: ignore[no-any-return]
    return model.generate(custom_generate=decode, **arguments)  # type: ignore[no-any-return]


def uses_graphs(model: nn.Module, graphs: Graphs) -> bool:
    """Whether :func:`generate` replays graphs. Raises :class:`EngineError` where they were asked for in vain."""
    if graphs is False:
        return False
    reason = why_no_graphs(model)
    if reason is not None and graphs is True:
        raise EngineError(f"Decoding as a CUDA graph was asked for, but {reason}. Set graphs to auto or false.")
    return reason is None


def why_no_graphs(model: nn.Module) -> str | None:
    """Why a decoding step of ``model`` cannot be a CUDA graph; ``None`` when it can."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "its weights are sharded over devices"
    if any(isinstance(module, Float8Experts) and module.ring is not None for module in model.modules()):
        return "its experts are in host memory, and a graph cannot wait for their copies"
    devices = {parameter.device for parameter in model.parameters()}
    if {device.type for device in devices} != {"cuda"}:
        return f"it lies on {', '.join(sorted(map(str, devices)))}, and graphs need CUDA"
    if len(devices) > 1:
        return f"it is spread over {len(devices)} devices"
    return why_not_static(model) or _why_experts_wait(model, devices.pop())


def _why_experts_wait(model: nn.Module, device: torch.device) -> str | None:
    """Why some experts of ``model`` ask the device for a value while they compute; ``None`` when none do."""
    for name, module in model.named_modules():
        if not isinstance(module, OctavoExperts):
            continue
        layer = module.layer(device, torch.bfloat16)
        for _, engine in module.settings.choose(layer).steps:
            unquantized = layer.layout == "none" and engine.name == "dequant"
            # the torch code of an engine; kernels are subclasses
            if type(engine) is ProductEngine and not unquantized:
                return f"the experts {name} run on the torch code of engine {engine.name}, which asks for sizes"
    return None


def why_not_static(model: nn.Module) -> str | None:
    """Why `decode` does not fit ``model``, on whatever device; ``None`` when it does."""
    inner = _transformer(model)
    if inner is None:
        return f"{type(model).__name__} holds no model of transformers that generates"
    if inner.config.is_encoder_decoder:
        return f"{type(inner).__name__} has an encoder"
    config = inner.config.get_text_config(decoder=True)
    if config is not inner.config:
        return f"{type(inner).__name__} is more than a language model"
    others = {type(layer).__name__ for layer in StaticCache(config=config, max_cache_len=1).layers} - {
        StaticLayer.__name__
    }
    if others:
        return f"its cache has layers of other kinds than full attention ({', '.join(sorted(others))})"
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation}, and only sdpa was tried"
    for name, module in model.named_modules():
        if not isinstance(module, OctavoExperts) and experts_layout(module) is not None:
            return f"the experts {name} run on transformers' own forward, which asks the device for sizes"
    return None


def _transformer(model: nn.Module) -> PreTrainedModel | None:
    found = (part for part in model.modules() if isinstance(part, PreTrainedModel) and part.can_generate())
    return next(found, None)


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """The decoding loop, in the form that ``generate(custom_generate=...)`` asks for.

    Like transformers' own, [B, length] until every sequence has ended; a sequence that has ended is padded. On another
    device than CUDA it computes the same without a graph.

    Raises:
        EngineError: beams, several sequences in lockstep over GPUs, or outputs beside the tokens were asked for.
    """
    _refuse(generation_config, synced_gpus)
    num_prompt, last = input_ids.shape[1], generation_config.max_length
    length_S = -(-last // _ALIGNMENT) * _ALIGNMENT
    cache = StaticCache(config=model.config, max_cache_len=length_S)
    model_kwargs |= {"past_key_values": cache, "use_cache": True}
    if getattr(model.config, "output_router_logits", False):
        # their loss is for training, and reads a mask of another form
        model_kwargs["output_router_logits"] = False
    mask_BP = model_kwargs.get("attention_mask")
    if mask_BP is None:
        mask_BP = torch.ones_like(input_ids)
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    logits_BV = model(**inputs, return_dict=True).logits[:, -1]
    del inputs
    run = _Sequences(input_ids, last, generation_config, has_ends=_has_ends(stopping_criteria))
    step = _Step(model, cache, mask_BP, length_S)
    repeated = Repeated(step, input_ids.device)
    with decoding(model):
        while True:
            scores_BV = logits_processor(run.ids, logits_BV.to(copy=True, dtype=torch.float32))
            token_B = run.add(scores_BV, stopping_criteria)
            if streamer is not None:
                streamer.put(token_B.cpu())
            since = run.length - num_prompt
            if run.length == last or (
                (streamer is not None or since % TOKENS_BETWEEN_CHECKS == 0) and not bool(run.unfinished_B.any())
            ):
                break
            step.token_B1.copy_(token_B[:, None])
            logits_BV = repeated()
    if streamer is not None:
        streamer.end()
    return run.result()


def _refuse(generation_config: Any, synced_gpus: bool) -> None:
    asked = [
        name
        for name, found in (
            ("num_beams", generation_config.num_beams not in (None, 1)),
            ("return_dict_in_generate", generation_config.return_dict_in_generate),
            ("prefill_chunk_size", generation_config.prefill_chunk_size is not None),
            ("synced_gpus", synced_gpus),
            ("use_cache=False", generation_config.use_cache is False),
        )
        if found
    ]
    if asked:
        raise EngineError(f"Decoding as a CUDA graph does not do {', '.join(asked)}. Set graphs to false for it.")


def _has_ends(stopping_criteria: Any) -> bool:
    return any(isinstance(criterion, EosTokenCriteria) for criterion in stopping_criteria)


class _Sequences:
    """The tokens so far, and which sequences have ended."""

    def __init__(self, input_ids: Tensor, last: int, generation_config: Any, *, has_ends: bool) -> None:
        batch, self.length = input_ids.shape
        pad = generation_config._pad_token_tensor
        self._pad = input_ids.new_zeros(()) if pad is None else pad.to(input_ids.device).reshape(())
        self._ids_BS = self._pad.to(input_ids.dtype).expand(batch, last).clone()
        self._ids_BS[:, : self.length] = input_ids
        self._samples, self._has_ends = bool(generation_config.do_sample), has_ends
        self._lengths_B = torch.full((batch,), self.length, device=input_ids.device)
        self.unfinished_B = torch.ones(batch, dtype=torch.bool, device=input_ids.device)

    @property
    def ids(self) -> Tensor:
        """[B, length so far]."""
        return self._ids_BS[:, : self.length]

    def add(self, scores_BV: Tensor, stopping_criteria: Any) -> Tensor:
        """Choose a token for each sequence and ask whether it was its last."""
        if self._samples:
            token_B = torch.multinomial(scores_BV.softmax(dim=-1), num_samples=1)[:, 0]
        else:
            token_B = scores_BV.argmax(dim=-1)
        if self._has_ends:
            token_B = torch.where(self.unfinished_B, token_B, self._pad)
        self._ids_BS[:, self.length] = token_B
        self.length += 1
        self._lengths_B += self.unfinished_B
        self.unfinished_B &= ~stopping_criteria(self.ids, None)
        return token_B

    def result(self) -> Tensor:
        """Without the columns that were added after every sequence had ended."""
        return self._ids_BS[:, : int(self._lengths_B.max())]


class _Step:
    """One forward of one new token per sequence, on buffers of its own: [B, V] logits."""

    def __init__(self, model: Any, cache: StaticCache, mask_BP: Tensor, length_S: int) -> None:
        batch, num_prompt = mask_BP.shape
        self._model, self._cache = model, cache
        self.token_B1 = torch.zeros((batch, 1), dtype=torch.long, device=mask_BP.device)
        # padding is on the left, and takes no position
        self._position_B1 = mask_BP.long().sum(dim=1, keepdim=True)
        self._mask_B11S = torch.zeros((batch, 1, 1, length_S), dtype=torch.bool, device=mask_BP.device)
        self._mask_B11S[:, 0, 0, :num_prompt] = mask_BP.bool()
        self._seen_B111 = torch.ones((batch, 1, 1, 1), dtype=torch.bool, device=mask_BP.device)
        self._column_1 = torch.full((1,), num_prompt, device=mask_BP.device)

    def __call__(self) -> Tensor:
        self._mask_B11S.index_copy_(3, self._column_1, self._seen_B111)
        output = self._model(
            input_ids=self.token_B1,
            position_ids=self._position_B1,
            attention_mask=self._mask_B11S,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        )
        self._column_1.add_(1)
        self._position_B1.add_(1)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV
