// The latest requests: what the server's log says of each.

let latest = { requests: [], content: false };

async function loadRequests() {
  try {
    latest = await json("pool/requests");
    showRequests();
  } catch (error) {
    $("content").replaceChildren(failure(error));
  }
}

function showRequests() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = latest.requests.filter((one) => {
    const text = [one.model, one.key, one.caller, one.path, one.status, one.finish, one.id].join(" ").toLowerCase();
    return words.every((word) => text.includes(word)) && (!$("failed").checked || one.status >= 400);
  });
  $("listed").replaceChildren(...wanted.map(requestRow));
}

function requestRow(one) {
  const status = one.running ? "running" : [one.status, one.finish].filter(Boolean).join(" ");
  const row = cells(`${seconds(one.age_s)} ago`, one.key ?? one.caller ?? "", one.model ?? "", one.path, status,
    one.prompt_tokens, one.cached_tokens, one.completion_tokens ?? one.counted_tokens,
    seconds(one.queue_s), seconds(one.ttft_s), seconds(one.tpot_s), seconds(one.duration_s));
  if (one.status >= 400) row.className = "bad";
  if (one.running) row.lastChild.append(button("Cancel", () => request(`v1/requests/${encodeURIComponent(one.id)}/cancel`, {})));
  if (latest.content) row.lastChild.append(button("Content", () => showContent(one.id)));
  return row;
}

async function showContent(id) {
  try {
    const one = await json(`pool/requests/${encodeURIComponent(id)}`);
    const pretty = (text) => { try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; } };
    $("content").replaceChildren(element("h2", id), ...section("Prompt", pretty(one.request)),
      ...section("Reply", pretty(one.response ?? "")), ...section("Error", pretty(one.error ?? "")));
    $("content").querySelectorAll("details").forEach((node) => { node.open = true; });
  } catch (error) {
    $("content").replaceChildren(failure(error));
  }
}
