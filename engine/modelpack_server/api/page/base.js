"use strict";
// What all parts of the page use: nodes, requests to the server, and streams of events.

const $ = (id) => document.getElementById(id);

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function named(className, node) {
  node.className = className;
  return node;
}

function scrolling(node) {
  node.tabIndex = 0;  // the keyboard can scroll it
  return node;
}

function button(label, act) {
  const node = element("button", label);
  node.type = "button";
  node.onclick = act;
  return node;
}

function copyButton(text) {
  if (!navigator.clipboard) return [];  // browsers provide it on secure connections only
  const node = button("Copy", async () => {
    await navigator.clipboard.writeText(text());
    node.textContent = "Copied";
  });
  return [node];
}

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function problem(response) {
  let message = `The server answered ${response.status}.`;
  try {
    const body = await response.json();
    message = body.error?.message ?? body.error ?? message;
  } catch { /* no JSON */ }
  if (response.status === 401) {
    openSettings(true);
    $("key").focus();
  }
  return message;
}

async function request(path, body, options = {}) {
  const response = await fetch(path, {
    ...(body === undefined ? {} : { method: "POST", body: JSON.stringify(body) }),
    ...options,
    headers: { ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...headers() },
  });
  if (!response.ok) throw new Error(await problem(response));
  return response;
}

const json = async (path, body, options) => (await request(path, body, options)).json();

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    const found = (rest + (value ?? "")).split("\n");
    rest = done ? "" : found.pop();
    yield* found;
    if (done) return;
  }
}

async function* events(response) {
  for await (const line of lines(response)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data && data !== "[DONE]") yield JSON.parse(data);
  }
}

const reason = (error) => error instanceof TypeError ? "The server cannot be reached." : error.message;

function failure(error) {
  const node = named("error", element("p", reason(error)));
  node.setAttribute("role", "alert");
  return node;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  for (; count >= 1000 && at < units.length - 1; at++) count /= 1000;
  return `${count.toFixed(at && count < 100 ? 1 : 0)} ${units[at]}`;
}

const seconds = (value) => value === undefined || value === null ? "" : value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(1)} s`;

function cells(...values) {
  return element("tr", ...values.map((value) => {
    const cell = element("td", ...(Array.isArray(value) ? value : [value ?? ""]));
    if (typeof value === "number") cell.className = "number";
    return cell;
  }));
}
