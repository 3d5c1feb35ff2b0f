// Markdown to nodes. Model output becomes text nodes: it is never parsed as HTML.

const INLINE = new RegExp([
  /(?<tick>`+)(?<code>[^`]+)\k<tick>(?!`)/,
  /\*\*(?<bold>[^*]+(?:\*[^*]+\*[^*]*)*)\*\*/,
  /\*(?<em>[^*\s][^*]*)\*/,
  /(?<!\w)_(?<em2>[^_\s][^_]*)_(?!\w)/,
  /~~(?<gone>[^~]+)~~/,
  /\[(?<label>[^\]\n]+)\]\((?<href>[^\s)]+)\)/,
  /(?<url>https?:\/\/[^\s<>"')\]]*[^\s<>"')\].,;:!?])/,
  /\\(?<escaped>[\\`*_{}\[\]()#+\-.!~|>])/,
].map((part) => part.source).join("|"), "g");

function link(label, address) {
  if (!/^(https?:|mailto:)/i.test(address)) return [label];
  const node = element("a", label);
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return [node];
}

function inline(text) {
  if (text.length > 20000) return [text];
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const found = match.groups;
    nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (found.code !== undefined) nodes.push(element("code", found.code));
    else if (found.bold !== undefined) nodes.push(element("strong", ...inline(found.bold)));
    else if (found.em !== undefined) nodes.push(element("em", ...inline(found.em)));
    else if (found.em2 !== undefined) nodes.push(element("em", ...inline(found.em2)));
    else if (found.gone !== undefined) nodes.push(element("s", ...inline(found.gone)));
    else if (found.label !== undefined) nodes.push(...link(found.label, found.href));
    else if (found.url !== undefined) nodes.push(...link(found.url, found.url));
    else nodes.push(found.escaped);
  }
  nodes.push(text.slice(end));
  return nodes;
}

const FENCE = /^\s*(`{3,}(?=[^`]*$)|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const CELLS = /^\s*\|.*\|\s*$/;

function blocks(text) {
  // Blocks of source: [kind, lines]. Only the last block may still change.
  const found = [];
  let kind = null, fence = null;
  const put = (name, line) => {
    if (kind !== name) { found.push([name, []]); kind = name; }
    found[found.length - 1][1].push(line);
  };
  for (const line of text.split("\n")) {
    if (fence !== null) {
      put("code", line);
      if (line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "")) fence = kind = null;
      continue;
    }
    const opening = FENCE.exec(line);
    if (opening) { kind = null; fence = opening[1]; put("code", line); }
    else if (HEADING.test(line)) { kind = null; put("heading", line); kind = null; }
    else if (RULE.test(line)) { kind = null; put("rule", line); kind = null; }
    else if (QUOTE.test(line)) put("quote", line);
    else if (ITEM.test(line)) put("list", line);
    else if (CELLS.test(line)) put("table", line);
    else if (!line.trim()) { if (kind === "list") put("list", ""); else kind = null; }
    else if (kind === "list" && /^\s/.test(line)) put("list", line);
    else put(kind === "list" ? (found[found.length - 1][1].at(-1) ? "list" : "text") : "text", line);
  }
  return found;
}

function list(lines) {
  const first = ITEM.exec(lines[0]);
  const node = element(/\d/.test(first[2]) ? "ol" : "ul");
  if (node.tagName === "OL") node.start = parseInt(first[2], 10);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= first[1].length) items.push([item[3]]);
    else items.at(-1).push(line);
  }
  for (const [own, ...rest] of items) {
    const at = rest.findIndex((line) => ITEM.test(line));
    const more = (at < 0 ? rest : rest.slice(0, at)).map((line) => line.trim()).filter(Boolean);
    const entry = element("li", ...inline([own, ...more].join("\n")));
    if (at >= 0) entry.append(list(rest.slice(at)));
    node.append(entry);
  }
  return node;
}

function table(lines) {
  const rows = lines.map((line) => line.trim().slice(1, -1).split("|").map((cell) => cell.trim()));
  if (rows.length < 2 || !rows[1].every((cell) => /^:?-+:?$/.test(cell))) {
    return element("p", ...inline(lines.join("\n")));
  }
  const row = (cells, name) => element("tr", ...cells.map((cell) => element(name, ...inline(cell))));
  const body = rows.slice(2).map((cells) => row(cells, "td"));
  return scrolling(named("scroll", element("div", element("table", element("thead", row(rows[0], "th")), element("tbody", ...body)))));
}

function block(kind, lines) {
  if (kind === "code") {
    const fence = FENCE.exec(lines[0])[1];
    const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
    const margin = new RegExp(`^\\s{0,${lines[0].search(/\S/)}}`);
    const source = lines.slice(1, closed ? -1 : undefined).map((line) => line.replace(margin, ""));
    const text = source.join("\n");
    return named("block", element("div", scrolling(element("pre", element("code", text))), ...copyButton(() => text)));
  }
  if (kind === "heading") {
    const [, marks, title] = HEADING.exec(lines[0]);
    return element(`h${Math.min(4, marks.length + 1)}`, ...inline(title));
  }
  if (kind === "rule") return element("hr");
  if (kind === "list") return list(lines);
  if (kind === "table") return table(lines);
  if (kind === "quote") {
    return element("blockquote", ...inline(lines.map((line) => QUOTE.exec(line)[1]).join("\n")));
  }
  return element("p", ...inline(lines.join("\n")));
}

function render(into, text) {
  // Unchanged blocks keep their nodes, so that only the last block of a long reply is rendered again.
  const sources = (into.sources ??= []);
  const found = blocks(text);
  found.forEach(([kind, lines], at) => {
    const source = kind + lines.join("\n");
    if (sources[at] === source) return;
    const node = block(kind, lines);
    if (into.children[at]) into.children[at].replaceWith(node); else into.append(node);
    sources[at] = source;
  });
  while (into.children.length > found.length) into.lastChild.remove();
  sources.length = found.length;
}
