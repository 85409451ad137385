"""A table of curves that is made in several runs."""

import json

from benchmarks.engine_curves import others


def test_a_second_run_keeps_what_it_does_not_make_again(tmp_path):
    file, here = tmp_path / "engine-curves.json", {"device": "a GPU", "commit": "abc"}
    asked = [("glm-tiny", "exact", "fused"), ("glm-tiny", "fp8", "scaled")]
    assert others(file, asked, here) == []
    rows = [
        {"model": model, "numerics": "exact", "engine": engine, "losses": [1.0], "device": device, "commit": commit}
        for model, engine, device, commit in (
            ("glm-tiny", "fused", "a GPU", "abc"),
            ("glm-tiny", "dequant", "a GPU", "abc"),
            ("qwen-tiny", "fused", "a GPU", "abc"),
            ("qwen-tiny", "fused", "another", "abc"),
            ("qwen-tiny", "fused", "a GPU", "def"),
        )
    ]
    file.write_text(json.dumps(rows))
    assert others(file, asked, here) == rows[1:3]
