"""python agent.py NAME URL: a coding agent through `fastqwen launch`: first request, one call and its result, second turn.

The agent must be on the PATH; it gets a home and a folder of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from say import say

name, url = sys.argv[1:]
with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as work:
    notes = Path(work) / "notes.txt"
    notes.write_text("notes " + say("<think>\nI see.\n</think>\n\nAll is read.") + "\n")
    tool, arguments = {
        "claude": ("Read", {"file_path": str(notes)}),
        "codex": ("exec_command", {"cmd": "cat notes.txt"}),
        "qwen-code": ("read_file", {"file_path": str(notes)}),
    }[name]
    call = json.dumps({"name": tool, "arguments": arguments})
    first = say(f"<think>\nI read.\n</think>\n\n<tool_call>\n{call}\n</tool_call>")
    asks = {
        "claude": ["-p", first, "--allowedTools", "Read"],
        "codex": ["exec", "--skip-git-repo-check", first],
        "qwen-code": ["-p", first, "--yolo"],
    }[name]
    done = subprocess.run(
        [sys.executable, "-m", "fastqwen.cli.main", "launch", name, "--model", url, "--", *asks],
        cwd=work, env={**os.environ, "HOME": home, "CODEX_HOME": home, "CLAUDE_CONFIG_DIR": home},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "All is read.", done
print(f"{name}: ok")
