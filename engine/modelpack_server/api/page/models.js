// The models in the store: pull, load, unload, keep loaded, delete, details.

async function showModels() {
  try {
    const [{ models: stored }, pool] = await Promise.all([json("api/tags"), json("pool")]);
    const loaded = new Map(pool.models.flatMap((model) => [[model.digest, model]]));
    const used = pool.models.reduce((sum, model) => sum + (model.memory ?? 0), 0);
    $("memory").textContent = `${stored.length} ${stored.length === 1 ? "model" : "models"}; loaded models take ${bytes(used)}`
      + (pool.memory ? ` of ${bytes(pool.memory)}` : "");
    $("stored").replaceChildren(...stored.map((model) => modelRow(model, loaded.get(`sha256:${model.digest}`))));
  } catch (error) {
    $("memory").replaceChildren(failure(error));
  }
}

function modelRow(model, running) {
  const act = (label, work) => button(label, async () => {
    try { await work(); } catch (error) { $("pulls").replaceChildren(failure(error)); }
    showModels();
  });
  const keep = (time) => request("api/generate", { model: model.name, keep_alive: time, stream: false });
  const forever = running && (running.pinned || running.expires_at === null);
  const actions = [
    running ? act("Unload", () => request("pool/unload", { models: [model.name] })) : act("Load", () => keep("5m")),
    ...(forever ? [] : [act("Pin", () => keep(-1))]),
    act("Details", () => showDetails(model.name)),
    act("Delete", () => remove(model.name)),
  ];
  const row = cells(model.name, bytes(model.size), model.details.parameter_size,
    model.details.quantization_level, running ? `${running.state}${forever ? ", pinned" : ""}` : "stored",
    running?.memory ? bytes(running.memory) : "", actions);
  row.lastChild.className = "actions";
  return row;
}

function confirmed(question) {
  $("asked").textContent = question;
  $("confirm").returnValue = "";
  $("confirm").showModal();
  return new Promise((done) => {
    $("confirm").onclose = () => done($("confirm").returnValue === "yes");
  });
}

async function remove(name) {
  if (!await confirmed(`Delete ${name}? Its files go with its last name.`)) return;
  await request("api/delete", { model: name }, { method: "DELETE" });
  loadModels();
}

async function pullModel(name) {
  const bar = element("progress"), line = element("p", `${name}: asking the registry`);
  $("pulls").replaceChildren(line, bar);
  bar.setAttribute("aria-label", `Pull of ${name}`);
  const done = new Map(), totals = new Map();
  try {
    for await (const text of lines(await request("api/pull", { model: name }))) {
      if (!text.trim()) continue;
      const event = JSON.parse(text);
      if (event.error) throw new Error(event.error);
      if (event.digest) {
        totals.set(event.digest, event.total ?? 0);
        done.set(event.digest, event.completed ?? 0);
      }
      const sum = (map) => [...map.values()].reduce((one, other) => one + other, 0);
      bar.max = sum(totals) || 1;
      bar.value = sum(done);
      line.textContent = `${name}: ${event.status}, ${bytes(sum(done))} of ${bytes(sum(totals))}`;
    }
    $("pulls").replaceChildren(element("p", `${name} is here.`));
  } catch (error) {
    $("pulls").replaceChildren(failure(error));
  }
  showModels();
  loadModels();
}

function section(title, text) {
  return text ? [element("details", element("summary", title), scrolling(element("pre", element("code", text))))] : [];
}

async function showDetails(name) {
  const [shown, stored] = await Promise.all([
    json("api/show", { model: name }),
    json(`pool/models/${name.split("/").map(encodeURIComponent).join("/")}`),
  ]);
  const files = stored.files.map((file) => cells(file.file ?? "", file.role, file.media_type, bytes(file.size), file.digest));
  const head = ["File", "Purpose", "Media type", "Size", "Digest"].map((title) => element("th", title));
  const card = named("text", element("div"));
  render(card, stored.card);
  const view = scrolling(named("scroll", element("div", element("table", element("thead", element("tr", ...head)), element("tbody", ...files)))));
  const title = element("h2", name);
  title.tabIndex = -1;
  $("details").replaceChildren(
    title,
    element("p", `${stored.digest}, ${bytes(stored.size)}, for ${(shown.capabilities ?? []).join(", ") || "nothing that is served"}`),
    view,
    element("p", stored.attached.length
      ? `Attached: ${stored.attached.map((one) => `${one.artifact_type} (${one.digest.slice(0, 19)})`).join(", ")}`
      : "No signatures or other documents are attached in this store."),
    ...section("Chat template", shown.template),
    ...section("Parameters", shown.parameters),
    ...section("License", shown.license),
    ...(stored.card ? [element("details", element("summary", "Card"), card)] : []),
  );
  title.focus();
}
