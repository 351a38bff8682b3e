// A conversation side is a tree: each message knows its parent, and `chosen` says which child is on the shown branch.
const ROOT = "root";

export const newSide = (model, settings) => ({ model, settings: { ...settings }, nodes: {}, chosen: {} });

function childrenOf(side) {
  const map = new Map();
  for (const node of Object.values(side.nodes)) {
    const key = node.parent ?? ROOT;
    if (!map.has(key)) map.set(key, []);
    map.get(key).push(node);
  }
  for (const list of map.values()) list.sort((a, b) => a.time - b.time);
  return map;
}

/** The shown branch from the first message on: [{node, siblings}]. */
export function shownPath(side) {
  const children = childrenOf(side);
  const path = [];
  let key = ROOT;
  while (children.has(key)) {
    const siblings = children.get(key);
    const node = siblings.find((n) => n.id === side.chosen[key]) ?? siblings.at(-1);
    path.push({ node, siblings });
    key = node.id;
  }
  return path;
}

export const leafOf = (side) => shownPath(side).at(-1)?.node ?? null;

export function add(side, node) {
  side.nodes[node.id] = node;
  side.chosen[node.parent ?? ROOT] = node.id;
  return node;
}

/** Shows the branch that goes through this message. */
export function choose(side, id) {
  const node = side.nodes[id];
  if (node) side.chosen[node.parent ?? ROOT] = id;
}

/** The messages from the first one down to `id`. */
export function ancestry(side, id) {
  const list = [];
  for (let node = side.nodes[id]; node; node = side.nodes[node.parent]) list.unshift(node);
  return list;
}
