"""From measured rows to the rule of ``auto``."""

import json

from benchmarks.choice import RULES, merged, rules
from octavo.ops.choice import rules as current


def row(tokens: int, engine: str, ms: float, numerics: str = "exact", model: str = "glm") -> dict:
    layout = "channel" if model == "glm" else "block"
    return {
        "model": model, "layout": layout, "tokens": tokens, "numerics": numerics, "engine": engine, "ms": ms,
    }  # fmt: skip


# GLM: 128, 512 and 2048 rows per expert at 2k, 8k and 32k tokens
ROWS = [
    row(2048, "fused", 1.0), row(2048, "dequant", 1.4), row(8192, "fused", 3.0), row(8192, "dequant", 3.3),
    row(32768, "fused", 12.0), row(32768, "dequant", 9.0), row(2048, "bank-triton", 0.1, "bf16"),
    row(2048, "scaled", 0.7, "fp8"), row(8192, "dequant", 2.0, model="qwen3"), row(8192, "fused", 2.1, model="qwen3"),
]  # fmt: skip


def test_the_engine_changes_between_the_sizes_that_were_measured() -> None:
    found = {(rule["numerics"][0], rule["layout"][0]): rule["steps"] for rule in rules(ROWS, "sm90", "here")}
    assert found == {
        ("exact", "channel"): [[1024, "fused"], [None, "dequant"]],
        ("exact", "block"): [[None, "dequant"]],
        ("fp8", "channel"): [[None, "scaled"]],
    }


def old(numerics: str, kind: str = "experts", architecture: str = "sm90") -> dict:
    return {"architecture": [architecture], "kind": [kind], "numerics": [numerics], "layout": ["any"]}


def test_new_rules_come_first_and_replace_what_they_cover() -> None:
    new = rules(ROWS, "sm90", "here")
    kept = [old("fp8"), old("exact", kind="linear"), old("exact", architecture="any")]
    # exact was measured for every layout, fp8 for one only
    assert merged({"rules": [old("exact"), *kept]}, new, "sm90")["rules"] == [*new, *kept]
    shipped = json.loads(RULES.read_text())
    assert merged(shipped, new, "sm90")["rules"][: len(new)] == new
    assert shipped["rules"] == current()
