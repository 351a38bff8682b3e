"""The llm command with a model of its extra-openai-models.yaml: whole and streamed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from say import say

with tempfile.TemporaryDirectory() as folder:
    told = f"- model_id: ours\n  model_name: m\n  api_base: {sys.argv[1]}\n"
    (Path(folder) / "extra-openai-models.yaml").write_text(told)
    command = [str(Path(sys.executable).with_name("llm")), "-m", "ours", "--key", "none"]
    for more in ([], ["--no-stream"]):
        done = subprocess.run(
            [*command, *more, say("Hello there.")],
            env={**os.environ, "LLM_USER_PATH": folder}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.strip() == "Hello there.", done.stdout
print("llm: ok")
