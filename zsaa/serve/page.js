// Asks /live twice a second and draws the last two minutes; sends the text box to the chosen model.
// Of several replicas: what is in the house is added up, of p95 the largest is shown, of alpha the smallest.
"use strict";
const SHOWN = 240;
const BOUND = { p95_ms: "promise_ms", alpha: "floor" };
const $ = (id) => document.getElementById(id);
const history = [];

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function together(replicas) {
  const all = Object.values(replicas).flatMap((lanes) => Object.values(lanes));
  const of = (name) => all.map((lane) => lane[name]).filter((value) => value !== null);
  const sum = (name) => of(name).reduce((a, b) => a + b, 0);
  return {
    pending: sum("waiting") + sum("running"), waiting: sum("waiting"), running: sum("running"),
    p95_ms: of("p95_ms").length ? Math.max(...of("p95_ms")) : null, promise_ms: Math.max(...of("promise_ms")),
    alpha: Math.min(...of("alpha")), floor: Math.min(...of("floor")),
    answered: sum("answered"), refused: sum("refused"),
  };
}

function line(values, low, high, kind) {
  const points = values.flatMap((value, i) => value === null ? [] : [
    `${(100 * (i + SHOWN - values.length)) / (SHOWN - 1)},${100 - (96 * (value - low)) / (high - low || 1) - 2}`]);
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  drawn.setAttribute("points", points.join(" "));
  if (kind) drawn.setAttribute("class", kind);
  return drawn;
}

function draw() {
  for (const svg of document.querySelectorAll("svg[data-of]")) {
    const name = svg.dataset.of, bound = BOUND[name];
    const values = history.map((now) => now[name]);
    const bounds = bound ? history.map((now) => now[bound]) : [];
    const seen = [...values, ...bounds].filter((value) => value !== null);
    const low = name === "alpha" ? Math.min(...seen, 0.9) : 0, high = name === "alpha" ? 1 : Math.max(...seen, 1);
    svg.setAttribute("viewBox", "0 0 100 100");
    svg.setAttribute("preserveAspectRatio", "none");
    const last = values[values.length - 1];
    svg.setAttribute("aria-label", `${name} now: ${last === null ? "none" : last}; from ${low} to ${high}`);
    svg.replaceChildren(line(values, low, high), ...(bound ? [line(bounds, low, high, "bound")] : []));
  }
}

async function look() {
  try {
    const response = await fetch("/live", { headers: headers() });
    if (!response.ok) throw new Error((await response.json()).error.message);
    const now = together((await response.json()).replicas);
    history.push(now);
    history.splice(0, history.length - SHOWN);
    $("now").textContent = `alpha ${now.alpha.toFixed(3)}, ${now.running} running, ${now.waiting} waiting, p95 ` +
      `${now.p95_ms === null ? "none" : `${Math.round(now.p95_ms)} ms`}, ${now.answered} answered, ` +
      `${now.refused} refused`;
    draw();
  } catch (error) {
    $("now").textContent = `no numbers: ${error.message}`;
  }
  setTimeout(look, 500);
}

async function models() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) return;
  for (const model of (await response.json()).data) {
    const option = document.createElement("option");
    option.value = model.id;
    option.dataset.path = model.zsaa.path;
    option.textContent = `${model.id} (${model.zsaa.path})`;
    $("model").append(option);
  }
}

async function ask(event) {
  event.preventDefault();
  const path = $("model").selectedOptions[0].dataset.path, classify = path === "/classify";
  const body = { model: $("model").value, ...($("whole").checked ? { pruning: false } : {}),
    ...(classify ? { input: $("text").value } : { prompt: $("text").value, max_tokens: 64, temperature: 0 }) };
  $("answer").textContent = "waiting";
  delete $("answer").dataset.failed;
  try {
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body) });
    const said = await response.json();
    if (!response.ok) throw new Error(said.error.message);
    const first = classify ? said.data[0] : said.choices[0];
    $("answer").textContent = `${classify ? first.label : first.text}\n(alpha ${first.zsaa.alpha}, ` +
      `${first.zsaa.mac_reduction} times fewer multiply-accumulates)`;
  } catch (error) {
    $("answer").textContent = error.message;
    $("answer").dataset.failed = "true";
  }
}

$("ask").addEventListener("submit", ask);
$("key").addEventListener("change", () => { if (!$("model").length) models(); });
models();
look();
