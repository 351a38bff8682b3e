"""guidellm as a load generator: 16 requests, 4 at a time, none of which may fail.

It wants a tokenizer to count with, from a folder: one of single bytes will do.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

REQUESTS = 16


def byte_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    byte_tokenizer(folder)
    prompts, report = folder / "prompts.jsonl", folder / "report.json"
    prompts.write_text("".join(json.dumps({"prompt": f"What is number {n} known for?"}) + "\n" for n in range(64)))
    target = sys.argv[1].removesuffix("/v1")
    command = [
        str(Path(sys.executable).with_name("guidellm")), "run", "--disable-progress",
        "--backend", f"kind=openai_http,target={target},max_tokens=16",
        "--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--tokenizer", f"kind=hf_auto,model={folder}", "--data", f"kind=json_file,path={prompts}",
        "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] == REQUESTS and totals["errored"] == 0, totals
print("guidellm: ok")
