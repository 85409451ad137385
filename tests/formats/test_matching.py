"""Matching of module names, held against the libraries whose configs these are."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from importlib.metadata import version

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from octavo.errors import CheckpointError
from octavo.formats.matching import GlobList, NameList, SkipList
from octavo.formats.scheme import parse_scheme

MODULES = [
    "lm_head",
    "model.embed_tokens",
    "model.norm",
    *(f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 2, 10, 11, 21) for p in "qkvo"),
    *(f"model.layers.{i}.mlp.gate" for i in (1, 10)),
    *(f"model.layers.{i}.mlp.gate_proj" for i in (0, 1)),
    *(f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in (1, 10) for e in (0, 1, 10, 11) for p in ("gate", "up")),
    *(f"model.layers.{i}.mlp.shared_experts.{p}_proj" for i in (1, 10) for p in ("gate", "up", "down")),
    "model.visual.blocks.1.attn.qkv",
    "model.visual.merger.mlp.0",
]
# Whole names, ends, beginnings, per-expert names, what only looks like one, and patterns.
SKIPS = [
    "lm_head",
    "model.layers.1",
    "model.layers.1.mlp",
    "layers.1.mlp.experts.1.gate_proj",
    "model.layers.10.mlp.experts.10.up_proj",
    "mlp.gate",
    "gate",
    "norm",
    "q_proj",
    "model.layers.2.self_attn.q_pro",
    "experts.1",
    "visual",
    "model.visual",
    "model.layers.*.mlp.gate",
    "model.layers.1[01].self_attn",
    r"model\.layers\.\d+\.mlp\.shared_experts\..*",
    ".*experts",
    "model.layers.(1|2).self_attn.(q|k)_proj",
    "^model.layers.0",
    "head$",
    "gate|up_proj",
]
TARGETS = [
    "lm_head",
    "model.layers.1.mlp.experts.0.gate_proj",
    "re:.*lm_head",
    "re:.*mlp.gate$",
    "re:.*self_attn.*",
    r"re:model\.layers\.1\..*",
    "re:layers",
    "re:.*experts\\.1\\.",
    "model.layers.1",
]
# Older releases matched without the boundary at the end: "layers.1" covered layer 10. Ours is the rule as it is now.
BOUNDARY = pytest.mark.skipif(Version(version("transformers")) < Version("5.23"), reason="matched without boundary")


def words(alphabet: str) -> st.SearchStrategy[str]:
    return st.lists(st.text(alphabet, min_size=1, max_size=3), min_size=1, max_size=5).map(".".join)


@BOUNDARY
@pytest.mark.parametrize("entry", SKIPS)
def test_skip_list_is_transformers_own_rule(entry):
    from transformers.quantizers.quantizers_utils import should_convert_module

    skip = SkipList([entry], "modules_to_not_convert")
    for module in MODULES:
        assert (skip.entry_for(module) is None) == should_convert_module(module, [entry]), (entry, module)


@BOUNDARY
@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(SKIPS), max_size=6), st.sampled_from(MODULES))
def test_a_list_covers_what_one_of_its_entries_covers(entries, module):
    from transformers.quantizers.quantizers_utils import should_convert_module

    found = SkipList(entries, "here").entry_for(module)
    assert (found is None) == should_convert_module(module, entries)
    if found is not None:
        assert found in entries
        assert not should_convert_module(module, [found])


@BOUNDARY
def test_the_dots_of_an_entry_are_dots():
    """transformers takes them for any character; whoever wrote the entry did not mean layer 10."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    skip = SkipList(["model.layers.1."], "here")
    assert skip.entry_for("model.layers.1.mlp.gate_proj")
    assert not skip.entry_for("model.layers.10.mlp.gate_proj")
    assert not should_convert_module("model.layers.10.mlp.gate_proj", ["model.layers.1."])


@BOUNDARY
@settings(max_examples=300, deadline=None)
@given(st.lists(words("ab1_"), max_size=4), words("ab1_"))
def test_skip_list_on_any_literal_names(entries, module):
    import re

    from transformers.quantizers.quantizers_utils import should_convert_module

    # transformers takes the dots of an entry for any character; names where that matters exist in tests alone.
    escaped = [re.escape(entry) for entry in entries]
    want = should_convert_module(module, escaped) and not any(module.endswith(entry) for entry in entries)
    assert (SkipList(entries, "here").entry_for(module) is None) == want


@pytest.mark.parametrize("target", TARGETS)
def test_names_are_matched_as_compressed_tensors_does(target):
    from compressed_tensors.utils.match import match_name

    names = NameList([target], "targets")
    for module in MODULES:
        assert (names.entry_for(module) is not None) == match_name(module, target), (target, module)


@pytest.mark.parametrize(
    "ignore", [[], ["lm_head"], ["re:.*gate$", "lm_head"], ["model.layers.1.mlp.experts.0.gate_proj"]]
)
@pytest.mark.parametrize(
    "groups",
    [
        {"group_0": ["Linear"]},
        {"group_0": ["Linear"], "group_1": ["re:.*self_attn.*"]},
        {"group_0": ["re:.*q_proj"], "group_1": ["re:.*_proj"], "group_2": ["model.layers.0.self_attn.q_proj"]},
        {"group_0": ["re:.*_proj", "Linear"], "group_1": ["Linear", "lm_head"]},
        {"a": ["re:.*experts.*"], "b": ["re:.*down.*"]},
    ],
)
def test_groups_are_chosen_as_compressed_tensors_does(groups, ignore):
    """Its own functions, on a module tree with these names, against our verdicts."""
    import torch
    from compressed_tensors.utils.match import is_match, match_targets

    blocks = {name: [16 * (index + 1), 16] for index, name in enumerate(groups)}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ignore,
        "config_groups": {
            name: {
                "targets": targets,
                "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": blocks[name]},
            }
            for name, targets in groups.items()
        },
    }
    scheme = parse_scheme({"quantization_config": config})
    owners = {target: name for name, targets in groups.items() for target in targets}
    linear = torch.nn.Linear(1, 1)
    for module in MODULES:
        matched = match_targets(module, linear, owners) if is_match(module, linear, list(owners), ignore) else []
        want = blocks[owners[matched[0]]] if matched else None
        layout = scheme.layout_of(module)
        assert (list(layout.block) if layout else None) == want, module


@pytest.mark.parametrize(
    "entry", ["lm_head", "*mlp.gate", "model.layers.1*", "model.visual*", "*.experts.1.*", "*[01]"]
)
def test_globs_are_shell_patterns(entry):
    globs = GlobList([entry])
    for module in MODULES:
        assert (globs.entry_for(module) is not None) == fnmatchcase(module, entry), (entry, module)


@pytest.mark.parametrize(
    ("entry", "covered"),
    [
        ("model.visual", ["model.visual.blocks.1.attn.qkv", "model.visual.merger.mlp.0"]),
        ("mlp.gate", ["model.layers.1.mlp.gate", "model.layers.10.mlp.gate"]),
        ("model.layers.1.mlp.experts.1", [f"model.layers.1.mlp.experts.1.{p}_proj" for p in ("gate", "up")]),
        ("gate", ["model.layers.1.mlp.gate", "model.layers.10.mlp.gate"]),
    ],
)
def test_glob_lists_know_plain_names_up_to_a_boundary(entry, covered):
    assert [module for module in MODULES if GlobList([entry]).entry_for(module)] == covered


@pytest.mark.parametrize("kind", [SkipList, NameList])
def test_a_broken_pattern_is_named(kind):
    entry = "re:model.(layers" if kind is NameList else "model.(layers"
    with pytest.raises(CheckpointError, match=r"ignore .*\(layers"):
        kind([entry], "ignore")


def test_long_lists_are_looked_up():
    """Whole layers ignored expert by expert: 3 x 128 x 3 entries, against 37 000 modules."""
    entries = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in (1, 39, 46) for e in range(128) for p in "gud"]
    modules = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in range(96) for e in range(128) for p in "gud"]
    skip = SkipList(entries, "here")
    start = time.process_time()
    found = sum(skip.entry_for(module) is not None for module in modules)
    assert found == len(entries)
    # 0.1 s here; trying every entry as a pattern takes a minute.
    assert time.process_time() - start < 3
