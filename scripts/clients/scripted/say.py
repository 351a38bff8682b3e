"""What the scripted model is to say: it stands in the prompt, see tests/scripted."""

import base64
import json

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def say(text):
    return "SAY:" + base64.b64encode(json.dumps({"text": text, "split": 3}).encode()).decode() + ":"


FIRST = say("<think>\nI look.\n</think>\n\n" + CALL)
LAST = say("<think>\nNow I know.\n</think>\n\nIt is sunny.")  # a tool's result, so that the next turn says it
