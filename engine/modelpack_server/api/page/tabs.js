// The tabs, the settings, and the start of the page.

const TABS = ["chat", "models", "requests", "metrics", "code"];
const KEPT = ["system", "temperature", "top_p", "max_tokens", "seed", "theme"];
const REFRESH = { models: showModels, requests: () => $("live").checked && loadRequests(), metrics: sample, code: showExamples };
let timer = 0;

function openTab(name) {
  for (const tab of TABS) {
    const chosen = tab === name;
    $(tab).hidden = !chosen;
    $(`tab-${tab}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
  }
  clearInterval(timer);
  if (name === "requests") loadRequests(); else REFRESH[name]?.();
  if (name !== "chat" && name !== "code") {
    timer = setInterval(() => document.hidden || REFRESH[name](), 2000);
  }
}

function openNamed() {
  const name = location.hash.slice(2);
  openTab(TABS.includes(name) ? name : "chat");
}

function openSettings(shown) {
  $("settings").hidden = !shown;
  $("more").setAttribute("aria-expanded", String(shown));
}

function theme() {
  if ($("theme").value) document.documentElement.dataset.theme = $("theme").value;
  else delete document.documentElement.dataset.theme;
}

for (const id of KEPT) {
  $(id).value = localStorage.getItem(`modelpack-${id}`) ?? "";
  $(id).addEventListener("change", () => localStorage.setItem(`modelpack-${id}`, $(id).value));
}
theme();
$("theme").addEventListener("change", theme);
$("key").value = sessionStorage.getItem("modelpack-key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("modelpack-key", $("key").value);
  document.querySelectorAll(".error").forEach((node) => node.remove());
  loadModels();
  openNamed();
});
$("model").addEventListener("change", () => localStorage.setItem("modelpack-model", $("model").value));
$("more").addEventListener("click", () => openSettings($("settings").hidden));
$("clear").addEventListener("click", () => { cutBefore(0); $("question").focus(); });
$("question").addEventListener("input", state);
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) submit();
});
$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("attach").addEventListener("change", attachChosen);
$("question").addEventListener("paste", (event) => attachGiven(event, event.clipboardData));
$("chat").addEventListener("dragover", (event) => { if (event.dataTransfer.types.includes("Files")) event.preventDefault(); });
$("chat").addEventListener("drop", (event) => attachGiven(event, event.dataTransfer));
$("pull").addEventListener("submit", (event) => { event.preventDefault(); pullModel($("pulled").value.trim()); });
$("filter").addEventListener("input", showRequests);
$("failed").addEventListener("change", showRequests);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
for (const tab of TABS) $(`tab-${tab}`).addEventListener("click", () => { location.hash = `/${tab}`; });
$("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const at = TABS.findIndex((tab) => $(`tab-${tab}`) === document.activeElement);
  const next = TABS[(at + step + TABS.length) % TABS.length];
  $(`tab-${next}`).focus();
  location.hash = `/${next}`;
});
addEventListener("hashchange", openNamed);
try { turns = JSON.parse(localStorage.getItem("modelpack-chat")) ?? []; } catch { /* not ours */ }
redraw();
openNamed();
loadModels();
