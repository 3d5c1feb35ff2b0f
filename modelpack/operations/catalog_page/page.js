
"use strict";
const list = document.querySelector("main ul");
const items = [...list.children];
const texts = new Map(items.map((item) => [item, item.textContent.toLowerCase()]));
const status = document.querySelector("[role=status]");
const number = (item, key, missing) => Number(item.dataset[key] ?? missing);
const orders = {
  name: () => 0,
  newest: (a, b) => (Date.parse(b.dataset.created) || 0) - (Date.parse(a.dataset.created) || 0),
  smallest: (a, b) => number(a, "size", Number.MAX_VALUE) - number(b, "size", Number.MAX_VALUE),
  largest: (a, b) => number(b, "size", -1) - number(a, "size", -1),
  context: (a, b) => number(b, "context", -1) - number(a, "context", -1),
};

function search(text) {
  const words = text.toLowerCase().split(/\s+/);
  for (const item of items) item.hidden = !words.every((word) => texts.get(item).includes(word));
  const shown = items.filter((item) => !item.hidden).length;
  status.textContent = shown === items.length ? `${shown} listed` : `${shown} of ${items.length} listed`;
}

async function copy(button, code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
    status.textContent = `Copied ${code.textContent}`;
  } catch { // no clipboard over plain HTTP
    getSelection().selectAllChildren(code);
    status.textContent = "The browser refused to copy; the command is selected";
  }
}

for (const code of document.querySelectorAll(".pull code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.title = code.textContent;
  button.addEventListener("click", () => copy(button, code));
  code.after(button);
}
const field = document.getElementById("search");
field.addEventListener("input", () => search(field.value));
document.getElementById("order").addEventListener("change", (event) =>
  list.append(...[...items].sort(orders[event.target.value])));
document.getElementById("controls").hidden = false;
