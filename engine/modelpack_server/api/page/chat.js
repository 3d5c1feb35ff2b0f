// The chat. `turns` are the messages that are sent; they are kept in this browser.

let turns = [];
let attached = [];    // files that go with the next question: their text, or the data: URL of a picture, a sound or a video
let running = null;   // the AbortController of the current reply

function atEnd() {
  const view = $("scroller");
  return view.scrollHeight - view.scrollTop - view.clientHeight < 80;
}
function toEnd() { $("scroller").scrollTop = $("scroller").scrollHeight; }

function shown(node) {
  $("empty").hidden = true;
  $("log").append(node);
  toEnd();
  return node;
}

function fail(error) { shown(failure(error)); }

function keep() {
  try { localStorage.setItem("modelpack-chat", JSON.stringify(turns)); } catch { /* it is too large */ }
  showExamples();
}

class Answer {
  constructor() {
    this.text = this.thoughts = "";
    this.body = named("text busy", element("div"));
    this.facts = named("facts", element("div"));
    this.node = shown(named("turn assistant", element("article", this.body, this.facts)));
    this.drawing = 0;
  }
  add(delta) {
    this.text += delta.content ?? "";
    this.thoughts += delta.reasoning_content ?? "";
    this.drawing ||= requestAnimationFrame(() => this.draw());
  }
  draw() {
    cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    const follow = atEnd();
    if (this.thoughts && !this.details) {
      this.reasoning = element("p");
      this.details = element("details", element("summary", "Reasoning"), this.reasoning);
      this.details.open = true;
      this.node.prepend(this.details);
    }
    if (this.details) {
      this.reasoning.textContent = this.thoughts;
      if (this.text && !this.folded) { this.details.open = false; this.folded = true; }
    }
    render(this.body, this.text);
    if (follow) toEnd();
  }
  end(facts) {
    this.draw();
    this.body.classList.remove("busy");
    this.facts.append(...facts.map((fact) => element("span", fact)));
    if (this.text) this.facts.append(...copyButton(() => this.text));
    this.facts.append(button("Regenerate", () => regenerate(this)));
  }
}

// The content of a turn with pictures, sounds or videos is a list of parts.
const textOf = (turn) => typeof turn.content === "string" ? turn.content
  : turn.content.filter((part) => part.type === "text").map((part) => part.text).join("");
const FILES = {
  image_url: (part) => ({ name: "picture", url: part.image_url.url }),
  input_audio: (part) => ({ name: "sound", sound: part.input_audio }),
  video_url: (part) => ({ name: "video", video: part.video_url.url }),
};
const filesOf = (turn) => typeof turn.content === "string" ? []
  : turn.content.filter((part) => part.type !== "text").map((part) => FILES[part.type](part));
function partOf(file) {
  if (file.url) return { type: "image_url", image_url: { url: file.url } };
  if (file.video) return { type: "video_url", video_url: { url: file.video } };
  return { type: "input_audio", input_audio: file.sound };
}

function picture(url) {
  const node = document.createElement("img");
  node.src = url;
  node.alt = "Attached picture";
  return node;
}

function media(file) {
  const kind = file.video ? "video" : "sound";
  return file.url ? picture(file.url) : named(kind, element("span", `Attached ${kind}`));
}

function showQuestion(turn) {
  const node = shown(named("turn user", element("div", ...filesOf(turn).map(media), textOf(turn))));
  const actions = named("actions", element("div", button("Edit", () => edit(turn))));
  node.after(actions);
  actions.classList.add("turn");
}

function redraw() {
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  for (const turn of turns) {
    if (turn.role === "user") { showQuestion(turn); continue; }
    const answer = new Answer();
    answer.add(turn);
    answer.end([]);
  }
}

function cutBefore(at) {
  running?.abort();
  turns = turns.slice(0, at);
  keep();
  redraw();
}

function edit(turn) {
  const at = turns.indexOf(turn);
  if (at < 0) return;
  cutBefore(at);
  $("question").value = textOf(turn);
  attach(filesOf(turn));
  state();
  $("question").focus();
}

function regenerate(answer) {
  if (running) return;
  const nodes = [...document.querySelectorAll(".turn.assistant")];
  const replies = turns.flatMap((turn, at) => turn.role === "assistant" ? [at] : []);
  const at = replies[nodes.indexOf(answer.node)] ?? turns.length;
  const question = turns[at - 1];
  if (question?.role !== "user") return;
  cutBefore(at);
  reply(question);
}

function parameters() {
  const found = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (!Number.isNaN($(name).valueAsNumber)) found[name] = $(name).valueAsNumber;
  }
  return found;
}

function payload(messages) {
  const system = $("system").value.trim();
  return {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    ...parameters(),
  };
}

function ask(question) {
  const texts = attached.filter((file) => file.text !== undefined).map((file) => `${file.name}:\n\`\`\`\n${file.text}\n\`\`\`\n`);
  const text = [...texts, question].join("\n");
  const parts = attached.filter((file) => file.text === undefined).map(partOf);
  const turn = { role: "user", content: parts.length ? [...parts, { type: "text", text }] : text };
  attach([]);
  turns.push(turn);
  showQuestion(turn);
  return reply(turn, question);
}

async function reply(turn, typed = textOf(turn)) {
  const said = turns;  // a new chat replaces `turns`
  const answer = new Answer();
  const facts = [];
  const own = running = new AbortController();
  state();
  let error = null, first = 0, usage = null;
  try {
    const body = { ...payload(said), stream: true, stream_options: { include_usage: true } };
    const response = await request("v1/chat/completions", body, { signal: own.signal });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message ?? String(event.error));
      usage = event.usage ?? usage;
      for (const choice of event.choices ?? []) {
        if (choice.delta?.content || choice.delta?.reasoning_content) first ||= performance.now();
        answer.add(choice.delta ?? {});
        if (choice.finish_reason === "length") facts.push("cut: the most tokens, or the context is full");
      }
    }
  } catch (caught) {
    if (caught.name === "AbortError") facts.push("stopped");
    else error = caught;
  }
  if (running === own) running = null;
  if (usage && first) {
    const taken = (performance.now() - first) / 1000;
    facts.push(`${usage.completion_tokens} tokens`);
    if (taken > 0.05) facts.push(`${((usage.completion_tokens - 1) / taken).toFixed(1)} a second`);
  }
  answer.end(facts);
  if (answer.text || answer.thoughts) {
    const made = { role: "assistant", content: answer.text };
    if (answer.thoughts) made.reasoning_content = answer.thoughts;
    said.push(made);
  } else {
    said.pop();  // there is no reply, so the question can be sent again
    if (error) {
      if (!$("question").value) {
        $("question").value = typed;
        attach([...filesOf(turn), ...attached]);
      }
      answer.node.remove();
    }
  }
  if (said === turns) keep();
  if (error) fail(error);
  state();
}

// Files

const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

const SOUND = /^(?:audio|application)\/(?:x-|vnd\.)?(wav|wave|mpeg|mp3|flac|ogg)$/;
const FORMATS = { wave: "wav", mpeg: "mp3" };

async function read(file) {
  const sound = SOUND.exec(file.type)?.[1];
  if (sound) {
    const url = await dataUrl(file);
    return { name: file.name, sound: { data: url.slice(url.indexOf(",") + 1), format: FORMATS[sound] ?? sound } };
  }
  if (/^image\/(png|jpeg|webp|gif)$/.test(file.type)) return { name: file.name, url: await dataUrl(file) };
  if (/^video\/(mp4|quicktime|webm|x-matroska|x-m4v)$/.test(file.type)) return { name: file.name, video: await dataUrl(file) };
  const text = await file.text();
  if (text.includes("\0") || text.includes("\ufffd")) throw new Error(`${file.name} is not a text file, a picture, a sound or a video.`);
  return { name: file.name, text };
}

async function attachFiles(files) {
  const found = [];
  for (const file of [...files]) {
    try { found.push(await read(file)); } catch (error) { fail(error); }
  }
  attach([...attached, ...found]);
}

async function attachChosen() {
  await attachFiles($("attach").files);
  $("attach").value = "";
}

// Pasted and dropped files; text is left to the browser.
function attachGiven(event, data) {
  if (!data.files.length) return;
  event.preventDefault();
  attachFiles(data.files);
}

function attach(files) {
  attached = files;
  $("files").replaceChildren(...files.map((file) => element("li", ...(file.text === undefined ? [media(file)] : []), `${file.name} `,
    button("Remove", () => attach(attached.filter((other) => other !== file))))));
}

async function loadModels() {
  let found = [];
  try {
    const chats = (model) => model.capabilities?.includes("completion") ?? true;
    found = (await json("v1/models")).data.filter(chats).map((model) => model.id);
    if (!found.length) fail(new Error("There are no chat models yet. Run modelpack pull to get one."));
  } catch (caught) {
    fail(caught);
  }
  const before = $("model").value || localStorage.getItem("modelpack-model");
  $("model").replaceChildren(...found.map((name) => new Option(name, name)));
  if (found.includes(before)) $("model").value = before;
  state();
}

function state() {
  $("send").textContent = running ? "Stop" : "Send";
  $("send").disabled = !running && (!$("question").value.trim() || !$("model").value);
  const area = $("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function submit() {
  if (running) { running.abort(); return; }
  const question = $("question").value.trim();
  if (!question || !$("model").value) return;
  $("question").value = "";
  ask(question);
}
