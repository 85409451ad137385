"""What a run was planned to take, for the line that shows what it takes."""

from dataclasses import replace

import torch

from octavo.errors import OctavoError
from octavo.plan.skeleton import Adapters
from octavo.plan.terms import Plan, Planner, Request, replays
from octavo.train.config import SftConfig


def planned(config: SftConfig) -> Plan:
    """The plan of ``config``, with rows of ``data.max_length``.

    Raises:
        OctavoError: the run trains what a plan does not count, or the model cannot be planned.
    """
    lora = config.lora
    if lora.modules_to_save or lora.trainable_tokens or lora.router:
        raise OctavoError("what trains in full, and routers, are not in a plan yet")
    graphs = torch.cuda.is_available() and replays_layers(config)
    return Planner(config.model.path).plan(replace(_request(config), graphs=graphs))


def replays_layers(config: SftConfig) -> bool:
    """Whether one GPU replays decoder layers as CUDA graphs."""
    return replays(_request(config))


def _request(config: SftConfig) -> Request:
    lora, train = config.lora, config.train
    adapters = Adapters(lora.r, lora.expert_rank, tuple(lora.targets), getattr(torch, lora.dtype))
    return Request(
        config.model.path,
        adapters,
        batch=1 if config.data.packing else train.batch_size,
        seq=config.data.max_length * (train.batch_size if config.data.packing else 1),
        grad_accumulation=train.grad_accumulation,
        optimizer=train.optimizer,
        activations=config.model.activations,
        experts=config.model.experts,
        checkpointing=train.gradient_checkpointing != "none",
        offload_hidden_states=train.offload_hidden_states,
        offload_optimizer=train.offload_optimizer,
        graphs=False if lora.dropout else train.graphs,
        router_aux_loss=train.router_aux_loss,
    )
