// What the scripted model is to say: it stands in the prompt, see tests/scripted.
export const say = (text) => "SAY:" + Buffer.from(JSON.stringify({ text, split: 3 })).toString("base64") + ":";
const call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>';
export const FIRST = say("<think>\nI look.\n</think>\n\n" + call);
export const LAST = say("<think>\nNow I know.\n</think>\n\nIt is sunny.");
