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
    tools = {
        "claude": ("Read", {"file_path": str(notes)}),
        "codex": ("exec_command", {"cmd": "cat notes.txt"}),
        "qwen-code": ("read_file", {"file_path": str(notes)}),
        "opencode": ("read", {"filePath": str(notes)}),
    }
    if name in tools:
        call = json.dumps(dict(zip(("name", "arguments"), tools[name], strict=True)))
        first = say(f"<think>\nI read.\n</think>\n\n<tool_call>\n{call}\n</tool_call>")
    else:  # aider has no tools, but reads files out of the answer
        first = say("<think>\nI write.\n</think>\n\nmade.txt\n```\nAll is written.\n```\n")
    asks = {
        "claude": ["-p", first, "--allowedTools", "Read"],
        "codex": ["exec", "--skip-git-repo-check", first],
        "qwen-code": ["-p", first, "--yolo"],
        "opencode": ["run", first],
        "aider": ["--message", first, "--yes-always", "--no-git", "--edit-format", "whole", "--no-check-update",
                  "--no-analytics", "made.txt"],
    }[name]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "fastqwen.cli.main", "launch", name, "--model", url, "--", *asks],
        cwd=work, env={**os.environ, "HOME": home, "PWD": work, "CODEX_HOME": home, "CLAUDE_CONFIG_DIR": home},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done
    if name in tools:
        assert done.stdout.strip().startswith("All is read."), done
    else:
        assert (Path(work) / "made.txt").read_text() == "All is written.\n", done
print(f"{name}: ok")
