// Live charts of the server's own metrics, which any Prometheus can read too.

const SPAN = 90;  // samples of two seconds
const SVG = "http://www.w3.org/2000/svg";
const CHARTS = [
  ["Generated tokens a second", "rate", "vllm:generation_tokens_total"],
  ["Prompt tokens a second", "rate", "vllm:prompt_tokens_total"],
  ["Requests running", "sum", "vllm:num_requests_running"],
  ["Requests waiting", "sum", "vllm:num_requests_waiting"],
  ["KV cache in use, %", "share", "vllm:kv_cache_usage_perc"],
  ["Prefix cache hits, %", "ratio", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"],
];
const samples = CHARTS.map(() => []);
let before = null;

function totals(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = /^([a-z_:]+)(?:\{[^}]*\})? (\S+)$/.exec(line);
    if (match) found[match[1]] = (found[match[1]] ?? 0) + Number(match[2]);
  }
  return found;
}

function value([, kind, name, other], now, then, passed) {
  const step = (key) => Math.max(0, (now[key] ?? 0) - (then?.[key] ?? now[key] ?? 0));
  if (kind === "rate") return passed ? step(name) / passed : 0;
  if (kind === "share") return 100 * (now[name] ?? 0);
  if (kind === "ratio") return now[other] ? 100 * now[name] / now[other] : 0;
  return now[name] ?? 0;
}

async function sample() {
  try {
    const at = performance.now() / 1000, now = totals(await (await request("metrics")).text());
    CHARTS.forEach((chart, index) => {
      samples[index].push(value(chart, now, before?.now, before ? at - before.at : 0));
      samples[index].splice(0, samples[index].length - SPAN);
    });
    before = { at, now };
    $("charts").replaceChildren(...CHARTS.map(([title], index) => chart(title, samples[index])));
  } catch (error) {
    $("charts").replaceChildren(failure(error));
  }
}

function chart(title, values) {
  const most = Math.max(1, ...values), svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  const points = values.map((one, at) => `${SPAN - values.length + at},${100 - 96 * one / most}`);
  path.setAttribute("d", points.length ? `M${points.join("L")}` : "");
  svg.setAttribute("viewBox", `0 0 ${SPAN} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const last = values.at(-1) ?? 0, shown = last < 10 ? last.toFixed(1) : last.toFixed(0);
  svg.setAttribute("aria-label", `${title}: ${shown}, at most ${most.toFixed(1)} in the last minutes`);
  svg.append(path);
  return element("figure", element("figcaption", title, element("b", shown)), svg);
}
