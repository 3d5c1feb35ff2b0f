// The last question as curl, Python and JavaScript send it.

function showExamples() {
  const last = turns.findLastIndex((turn) => turn.role === "user");
  const body = payload(last < 0 ? [{ role: "user", content: "Hello!" }] : turns.slice(0, last + 1));
  const text = JSON.stringify(body, null, 2), base = new URL("v1", location.href).href;
  const quoted = text.replaceAll("'", `'\\''`);
  const keyed = $("key").value.trim();
  const examples = {
    curl: `curl ${base}/chat/completions \\\n  -H 'Content-Type: application/json' \\\n`
      + (keyed ? `  -H "Authorization: Bearer $MODELPACK_API_KEY" \\\n` : "") + `  -d '${quoted}'`,
    Python: `import json\nimport os\n\nfrom openai import OpenAI\n\n`
      + `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=os.environ.get("MODELPACK_API_KEY", "none"))\n`
      + `body = json.loads(${JSON.stringify(JSON.stringify(body))})\n`
      + `reply = client.chat.completions.create(**body)\nprint(reply.choices[0].message.content)`,
    JavaScript: `import OpenAI from "openai";\n\n`
      + `const client = new OpenAI({ baseURL: ${JSON.stringify(base)}, apiKey: process.env.MODELPACK_API_KEY ?? "none" });\n`
      + `const reply = await client.chat.completions.create(${text});\nconsole.log(reply.choices[0].message.content);`,
  };
  $("examples").replaceChildren(...Object.entries(examples).flatMap(([title, source]) => [
    element("h2", title), block("code", ["~~~~~~", ...source.split("\n"), "~~~~~~"]),
  ]));
}
