"""Every architecture on a GPU: python bench/gpu_models.py OUT.json [CASE ...]

A tiny model of each, with random weights, in float32, float16 and bfloat16, its steps recorded and launched one by one,
against transformers on the CPU. In float32 greedy tokens must be equal and logits to 1e-3; in 16 bits the tokens of both ways
must be equal, and logits may be no further from float32's than twice what transformers' own 16 bits are. Prints a line for
each and ends with an error if one is wrong.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models.test_transformers import CASES
from tests.models.tiny import greedy, logits, make, prompt, start
from tests.quant import test_awq, test_fp8
from tests.quant.storing import store_twice
from tests.quant.test_gptq import LAYOUTS, pack

LENGTHS = (1, 17, 40, 150)
TOKENS = 48
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORED = {f"fp8-{name}": layout for name, layout in test_fp8.LAYOUTS.items()}
STORED["fp8-published"] = (
    test_fp8.stored_as(128, 128, name="weight_scale_inv"),
    {**test_fp8.BLOCKS, "weight_block_size": [128, 128]},
)
STORED["awq"] = (test_awq.in_groups(32), test_awq.CONFIG)
HEADS = {"hidden_size": 128, "head_dim": 32}  # the least that tensor cores take


def expected_tokens(model: Any, ids: list[int]) -> list[int]:
    with torch.no_grad():
        found = model.generate(
            torch.tensor([ids]),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return found[0, len(ids) :].tolist()


def check(case: str, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    config_class, changes = CASES[case]
    model = make(folder, config_class, dtype=dtype, **{**changes, **HEADS})
    name = str(dtype).removeprefix("torch.")
    prompts = [prompt(length) for length in LENGTHS]
    with torch.no_grad():
        rounded = model(torch.tensor([prompts[-1]])).logits[0].float()
        exact = model.float()(torch.tensor([prompts[-1]])).logits[0]
    wishes = {"dtype": name, "max_model_len": 256, "max_num_seqs": 8}
    found = logits(folder, prompts[-1], enforce_eager=True, **wishes)
    recorded = greedy(start(folder, **wishes), prompts, TOKENS)
    eager = greedy(start(folder, enforce_eager=True, **wishes), prompts, TOKENS)
    alone = [greedy(start(folder, **wishes), [ids], TOKENS)[0] for ids in prompts[:2]]
    error, allowed = float((found - exact).abs().mean()), 2 * float((rounded - exact).abs().mean()) + 1e-4
    result: dict[str, Any] = {"case": case, "dtype": name, "error": error, "allowed": allowed}
    result["logits"] = float((found - exact).abs().max()) <= 1e-3 if dtype == torch.float32 else error <= allowed
    result["recorded"] = recorded == eager
    if dtype == torch.float32:
        result["tokens"] = eager == [expected_tokens(model, ids) for ids in prompts]
        result["alone"] = alone == eager[:2]
    return result


def check_packed(case: str, layout: str, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Against its own plain numbers: logits no further from float32's than twice what plain 16 bits are. Where activations
    of many rows have 8 bits, too, 16 times as far: their numbers have four bits less than bfloat16's."""
    make(folder, case, **HEADS)
    packed, plain = pack(folder, LAYOUTS[layout]) if layout in LAYOUTS else store_twice(folder, *STORED[layout])
    name = str(dtype).removeprefix("torch.")
    prompts = [prompt(length) for length in (*LENGTHS, *range(3, 16), 230)]  # steps of 1 to 18 rows, and of hundreds
    exact = logits(plain, prompts[-1], dtype="float32", max_model_len=512)
    rounded = logits(plain, prompts[-1], dtype=name, max_model_len=512)
    wishes = {"dtype": name, "max_model_len": 512, "max_num_seqs": 24}
    found = logits(packed, prompts[-1], enforce_eager=True, **wishes)
    error, allowed = float((found - exact).abs().mean()), 2 * float((rounded - exact).abs().mean()) + 1e-4
    if layout.startswith("fp8"):
        allowed *= 8
    recorded = greedy(start(packed, **wishes), prompts, TOKENS)
    eager = greedy(start(packed, enforce_eager=True, **wishes), prompts, TOKENS)
    return {"case": f"{case} {layout}", "dtype": name, "error": error, "allowed": allowed, "logits": error <= allowed,
            "recorded": recorded == eager}  # fmt: skip


def main() -> None:
    out, cases = Path(sys.argv[1]), sys.argv[2:] or [*CASES, "packed"]
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    if "packed" in cases:
        cases.remove("packed")
        both = [("Qwen3Config", layout, torch.float16) for layout in LAYOUTS]
        both += [("Qwen2Config", layout, torch.bfloat16) for layout in ("int4", "int4-desc-act", "int8-asymmetric")]
        both += [("Qwen3Config", layout, torch.bfloat16) for layout in STORED] + [("Qwen2Config", "awq", torch.float16)]
        for case, layout, dtype in both:
            with tempfile.TemporaryDirectory() as folder:
                results.append(check_packed(case, layout, dtype, Path(folder)))
            print(json.dumps(results[-1]), flush=True)
    for case in cases:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                results.append(check(case, dtype, Path(folder)))
            print(json.dumps(results[-1]), flush=True)
    out.write_text(json.dumps(results, indent=1))
    wrong = [one for one in results if False in one.values()]
    print(f"{len(results)} checked, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
