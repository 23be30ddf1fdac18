// The alpha slider's view. One core, mount(root, source), draws both the Jupyter widget (kernelSource: a kernel
// answers) and the exported page (pageSource: a precomputed grid answers). No library, no build step.
//
// A source is { meta, start, connect(listener) -> disconnect, move(setting), say(message) }; what it tells the listener
// are the messages listed at the top of widget.py. A setting is { alpha, tau, score, text }.
//
// What is known of a text: pieces (one string per token), costs (per setting, from the closed forms), and points by key,
// each the outcome of one pass of the model. Moving a control redraws at once, from the costs and the nearest point that
// is known; the exact point follows as soon as the model has run.

// ---------------------------------------------------------------------------------------------------- small tools

const NS = "http://www.w3.org/2000/svg";
const SHADES = 8; // of the ramp .d0 to .d8: the share of layers that a token goes through

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  // JupyterLab would take the arrow keys of a focused control for walking between cells; it asks the control itself.
  if (["input", "select", "button", "textarea"].includes(tag) || "tabIndex" in props) {
    node.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function s(tag, attributes = {}, ...children) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const decimals = (x, n) => x.toFixed(n);
const showAlpha = (a) => decimals(a, 3).replace(/0$/, "");
const percent = (p) => (p > 0 && p < 0.001 ? "<0.1%" : p < 1 && p > 0.999 ? ">99.9%" : decimals(100 * p, p < 0.0995 ? 1 : 0) + "%");
const scaled = (x, units, base) => {
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log(x) / Math.log(base))));
  const value = x / base ** power;
  return `${value >= 99.5 || power === 0 ? decimals(value, 0) : value.toPrecision(2)} ${units[power]}`;
};
const showMacs = (x) => scaled(x, ["", "k", "M", "G", "T", "P"], 1000);
const showBytes = (x) => scaled(x, ["B", "kB", "MB", "GB", "TB"], 1000);
const showMs = (x) => (x >= 1000 ? `${decimals(x / 1000, 2)} s` : `${x >= 100 ? decimals(x, 0) : x.toPrecision(2)} ms`);
const times = (x) => `${x >= 9.95 ? decimals(x, 0) : decimals(x, 1)}×`;
const word = (piece) => piece.replace(/\n/g, "↵").trim() || (piece === "" ? "…" : "space");
const quoted = (piece) => `“${word(piece)}”`;
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const shade = (depth, layers) => (depth >= layers ? SHADES : Math.floor((SHADES * depth) / layers));
const xml = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function download(name, blob) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link); // Firefox clicks only what is in the document
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// -------------------------------------------------------------------------------------------------------- sources

/** Answers come from the kernel behind an anywidget model. */
export function kernelSource(model) {
  const setting = () => Object.fromEntries(["alpha", "tau", "score", "text"].map((name) => [name, model.get(name)]));
  return {
    meta: model.get("meta"),
    start: setting(),
    connect(listener) {
      const hear = (message) => listener(message);
      const moved = () => listener({ type: "moved", setting: setting() });
      const names = ["alpha", "tau", "score", "text"].map((name) => `change:${name}`);
      model.on("msg:custom", hear);
      for (const name of names) model.on(name, moved);
      model.send({ type: "hello" });
      return () => {
        model.off("msg:custom", hear);
        for (const name of names) model.off(name, moved);
      };
    },
    move(to) {
      for (const [name, value] of Object.entries(to)) model.set(name, value);
      model.save_changes();
    },
    say: (message) => model.send(message),
  };
}

/** Answers come from the grid in an exported page; continuations are played as they were recorded. */
export function pageSource({ meta, start, texts }) {
  let listener = () => {};
  let timers = [];
  let at = start;
  const stop = () => timers.splice(0).forEach(clearTimeout);
  return {
    meta,
    start,
    connect(given) {
      listener = given;
      for (const text of texts) {
        listener(text);
        listener({ type: "points", text: text.id, points: text.points });
      }
      return stop;
    },
    move(to) {
      at = to;
      stop();
    },
    recorded: (id) => Object.values(texts.find((text) => text.id === id).streams).map((stream) => stream.alpha),
    say(message) {
      stop();
      if (message.type !== "stream") return;
      const [key, stream] = Object.entries(texts.find((text) => text.id === at.text).streams).find(
        ([, recording]) => recording.alpha === at.alpha,
      );
      listener({ type: "stream", text: at.text, key, alpha: at.alpha, event: null });
      timers = stream.events.map((event) =>
        setTimeout(() => listener({ type: "stream", text: at.text, key, event }), event.ms),
      );
    },
  };
}

// ------------------------------------------------------------------------------------------------------- the view

/** Draw the slider into `root`; returns a function that takes it away again. */
export function mount(root, source) {
  const { meta } = source;
  const layers = meta.layers;
  // How the words about the layers go under the schedule of the dial; pages that name none are of Eq. 2.
  const schedule = meta.schedule === "rising"
    ? { name: "rising", says: "lower layers keep more, upper ones less (rising)", top: "", passes: "A layer in the middle passes on about ", rest: ", lower ones more, upper ones less" }
    : meta.schedule === "entry"
    ? { name: "entry", says: "all drops come before the first layer (entry)", top: "", passes: "Before the first layer the dial keeps ", rest: "" }
    : { name: "Eq. 2", says: "every layer keeps the same share (Eq. 2)", top: " (Eq. 2 of the paper)", passes: "Every layer passes on ", rest: "" };
  const known = new Map(); // text id -> { pieces, cut, costs, label, points: Map }
  const at = { ...source.start, layer: Math.round(layers / 3), token: null }; // layer: 0 is the input, l what layer l passes on
  let stream = null; // { text, key, alpha, sides: [{ pieces, tokens, first, ms, done }] }
  let asked = 0; // when the setting was moved, in ms, while its point is not known
  let typed = 0;
  let playing = 0;
  let frame = 0;
  let textDrawn = null;

  const alphaAt = () => clamp(meta.alphas.findIndex((a) => Math.abs(a - at.alpha) < 1e-9), 0, meta.alphas.length - 1);
  const text = () => known.get(at.text);
  const slotOf = (t, alpha, tau) => t.costs.slot[tau][alpha];
  const keyOf = (t, alpha, tau, score) => (slotOf(t, alpha, tau) ? `${score}/${slotOf(t, alpha, tau)}` : "stock");

  /** The point of the setting shown, or of the nearest stop that is known: { point, alpha, exact }, or null. */
  function nearest(t) {
    const here = alphaAt();
    for (let away = 0; away < meta.alphas.length; away++) {
      for (const i of away ? [here + away, here - away] : [here]) {
        const point = i >= 0 && i < meta.alphas.length && t.points.get(keyOf(t, i, at.tau, at.score));
        if (point) return { point, alpha: meta.alphas[i], exact: away === 0 };
      }
    }
    return null;
  }

  // ------------------------------------------------------------------------------------------ the elements, once

  const unique = `z${Math.random().toString(36).slice(2, 8)}`;
  const named = (name) => `${unique}-${name}`;
  const scoreNames = Object.keys(meta.scores);
  const live = meta.live;

  const alert = h("div", { className: "z-error", role: "alert", hidden: true });
  const strip = s("svg", { class: "z-strip", "aria-hidden": "true" });
  const alpha = h("input", {
    type: "range", id: named("alpha"), className: "z-alpha", min: 0, max: meta.alphas.length - 1, step: 1,
    oninput: () => move({ alpha: meta.alphas[Number(alpha.value)] }),
  });
  alpha.setAttribute("aria-describedby", named("says"));
  const alphaShown = h("output", { className: "z-big", htmlFor: named("alpha") });
  const ticks = h("div", { className: "z-ticks", "aria-hidden": "true" });
  const legend = h("div", { className: "z-legend", "aria-hidden": "true" });
  const says = h("p", { className: "z-says", id: named("says") });
  const notice = h("p", { className: "z-notice" });
  const spoken = h("div", { className: "z-hidden", role: "status", "aria-live": "polite" });

  const tau = h("input", {
    type: "range", id: named("tau"), min: 0, max: meta.taus.length - 1, step: 1,
    oninput: () => move({ tau: meta.taus[Number(tau.value)] }),
  });
  const tauShown = h("output", { htmlFor: named("tau") });
  const score = h("select", { id: named("score"), onchange: () => move({ score: score.value }) },
    ...scoreNames.map((name) => h("option", { value: name }, name.replace(/_/g, " "))));
  const scoreSays = h("span", { className: "z-faint z-about" });

  const facts = h("div", { className: "z-facts" });
  const fact = (name, help) => {
    const value = h("strong"), more = h("span", { className: "z-faint" });
    const bar = h("i"), mark = h("b");
    const box = h("div", { className: "z-fact", title: help }, h("span", { className: "z-name" }, name), value,
      h("div", { className: "z-bar", "aria-hidden": "true" }, bar, mark), more);
    facts.append(box);
    return (shown, share, note, at_ = null) => {
      value.textContent = shown;
      more.textContent = note;
      bar.style.width = `${100 * clamp(share, 0, 1)}%`;
      mark.hidden = at_ === null;
      if (at_ !== null) mark.style.left = `${100 * clamp(at_, 0, 1)}%`;
    };
  };
  const showTop = fact("Tokens at the last layer", `How many tokens the last layer passes on${schedule.top}`);
  const showWork = fact("Work", "Multiply-accumulates (MACs) of one pass over the text");
  const showCache = fact("Key/value cache", "Memory of the keys and values that the pass leaves behind");
  const showTime = fact("Time", `One pass over the text on ${meta.device}${meta.rounds > 1 ? `, the fastest of ${meta.rounds}` : ""}. The mark is the prediction.`);
  const showAccuracy = meta.accuracy
    ? fact("Accuracy", `Measured on ${meta.accuracy.n} held-out samples (results/${meta.accuracy.source}.json)`)
    : null;

  const which = h("select", { id: named("text"), onchange: () => choose(which.value) },
    ...meta.texts.map((t) => h("option", { value: t.id }, t.name)),
    live ? h("option", { value: "own" }, "Type your own …") : null);
  const label = h("span", { className: "z-faint" });
  const own = h("textarea", {
    className: "z-own", rows: 4, hidden: true, placeholder: "Type or paste a text; it is read as you type.",
    oninput: () => {
      clearTimeout(typed);
      typed = setTimeout(() => own.value.trim() && source.say({ type: "own", text: own.value }), 400);
    },
  });
  own.setAttribute("aria-label", "Your own text");
  const tokens = h("div", {
    className: "z-tokens", tabIndex: 0, role: "group",
    onpointerover: (event) => point(event.target.dataset.i === undefined ? null : Number(event.target.dataset.i)),
    onpointerleave: () => point(null),
    onkeydown: walk,
    onblur: () => point(null),
  });
  tokens.setAttribute("aria-label", "The text, token by token. Arrow keys walk through it.");
  const info = h("p", { className: "z-info z-faint" });

  const layer = h("input", {
    type: "range", id: named("layer"), min: 0, max: layers, step: 1, oninput: () => toLayer(Number(layer.value)),
  });
  const layerShown = h("output", { className: "z-layer", htmlFor: named("layer") });
  const play = h("button", { type: "button", onclick: () => (playing ? halt() : run()) }, "▶ Play");
  const canvas = h("canvas", {
    className: "z-map", role: "img",
    onpointerdown: (event) => { canvas.setPointerCapture(event.pointerId); fromMap(event, true); },
    onpointermove: (event) => fromMap(event, event.buttons === 1),
    onpointerleave: () => point(null),
  });
  const ramp = h("div", { className: "z-ramp", "aria-hidden": "true" }, h("span", {}, "dropped early"),
    ...Array.from({ length: SHADES + 1 }, (_, i) => h("i", { className: `d${i}` })), h("span", {}, "stays to the end"));
  const answer = h("div", { className: "z-answer" });

  const race = h("section", { className: "z-race", hidden: meta.kind !== "generate" || (!live && !meta.texts.some((t) => source.recorded(t.id).length)) });
  const go = h("button", { type: "button", className: "z-main-button", onclick: startStream }, "Continue the text");
  const stopButton = h("button", { type: "button", hidden: true, onclick: () => { source.say({ type: "stop" }); stream = null; paint(); } }, "Stop");
  const sides = [0, 1].map(() => {
    const title = h("h4"), body = h("div", { className: "z-stream", tabIndex: 0 }), clock = h("p", { className: "z-faint" });
    return { title, body, clock, box: h("div", { className: "z-side" }, title, body, clock) };
  });
  race.append(h("div", { className: "z-row" }, h("h3", {}, "Two continuations, side by side"), go, stopButton),
    h("div", { className: "z-sides" }, ...sides.map((side) => side.box)));

  const saveState = h("span", { className: "z-faint", role: "status" });
  const savePage = h("button", { type: "button", onclick: () => source.say({ type: "save" }) }, "Page (HTML)");
  const saves = h("div", { className: "z-row z-saves" }, h("span", { className: "z-name" }, "Save this view:"),
    live ? savePage : null,
    h("button", { type: "button", onclick: () => savePicture("png") }, "Picture (PNG)"),
    h("button", { type: "button", onclick: () => savePicture("svg") }, "Drawing (SVG)"), saveState);

  const view = h("div", { className: "zsaa" },
    meta.title ? h("header", {}, h("h1", {}, meta.title), h("p", {}, meta.about)) : null,
    h("section", { className: "z-dial" },
      h("div", { className: "z-head" },
        h("label", { htmlFor: named("alpha") }, h("span", { className: "z-symbol" }, "α"), alphaShown),
        says),
      h("div", { className: "z-track" }, strip, alpha, ticks),
      legend, notice),
    alert, facts,
    h("div", { className: "z-columns" },
      h("section", { className: "z-text" },
        h("div", { className: "z-row" }, h("label", { htmlFor: named("text") }, "Text"), which, label),
        own, tokens, info),
      h("section", { className: "z-side-column" },
        h("h3", {}, meta.kind === "generate" ? "What comes next, by this model" : meta.kind === "classify" ? "What the model says" : ""),
        answer,
        h("h3", {}, "Which tokens each layer passes on"),
        h("div", { className: "z-row z-stepper" },
          h("button", { type: "button", "aria-label": "One layer back", onclick: () => { halt(); toLayer(at.layer - 1); } }, "◀"),
          layer,
          h("button", { type: "button", "aria-label": "One layer on", onclick: () => { halt(); toLayer(at.layer + 1); } }, "▶"),
          play),
        layerShown, canvas, ramp)),
    race,
    h("section", { className: "z-foot" },
      h("div", { className: "z-row" },
        h("label", { htmlFor: named("tau") }, "at least ", h("span", { title: "τ in Eq. 2: no layer keeps fewer tokens" }, "τ"), " = ", tauShown, " tokens"), tau,
        h("label", { htmlFor: named("score") }, "ranked by"), score, scoreSays,
        h("span", { className: "z-faint z-schedule" }, schedule.says)),
      saves),
    meta.provenance ? h("p", { className: "z-faint" }, meta.provenance) : null,
    spoken);
  layer.setAttribute("aria-label", "Layer");
  root.replaceChildren(view);

  // ---------------------------------------------------------------------------------------------- moving about

  function setting() {
    return { alpha: at.alpha, tau: at.tau, score: at.score, text: at.text };
  }

  function move(change) {
    Object.assign(at, change);
    if (stream) stream.running = false;
    asked = performance.now();
    source.move(setting());
    paint();
  }

  function choose(id) {
    const free = id === "own";
    own.hidden = !free;
    if (!free) return move({ text: id, token: null });
    if (!own.value && text()) own.value = text().text;
    own.focus();
    own.select();
  }

  function toLayer(to) {
    at.layer = clamp(to, 0, layers);
    paint();
  }

  function run() {
    play.textContent = "■ Stop";
    at.layer = at.layer === layers ? 0 : at.layer;
    playing = setInterval(() => {
      toLayer(at.layer + 1);
      if (at.layer === layers) halt();
    }, Math.max(60, 3600 / layers));
    paint();
  }

  function halt() {
    clearInterval(playing);
    playing = 0;
    play.textContent = "▶ Play";
  }

  function point(token) {
    if (token === at.token) return;
    at.token = token;
    paint();
  }

  function walk(event) {
    const t = text();
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !t) return;
    event.preventDefault();
    point(clamp((at.token ?? -1) + step, 0, t.pieces.length - 1));
    tokens.children[at.token].scrollIntoView({ block: "nearest" });
    spoken.textContent = describe(t, at.token);
  }

  function fromMap(event, alsoLayer) {
    const t = text();
    if (!t) return;
    const box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) / (box.width - MARGIN);
    point(x >= 0 && x < 1 ? Math.floor(x * t.pieces.length) : null);
    if (alsoLayer) {
      halt();
      toLayer(Math.ceil(((event.clientY - box.top) / box.height) * layers));
    }
    if (at.token !== null) tokens.children[at.token]?.scrollIntoView({ block: "nearest" });
  }

  function startStream() {
    if (source.recorded) {
      const there = source.recorded(at.text);
      if (there.length && !there.includes(at.alpha)) move({ alpha: there[0] });
    }
    source.say({ type: "stream" });
  }

  // -------------------------------------------------------------------------------------------------- listening

  function hear(message) {
    if (message.type === "text") {
      const points = known.get(message.id)?.points ?? new Map();
      known.set(message.id, { ...message, points });
    } else if (message.type === "points") {
      const t = known.get(message.text);
      for (const [key, point] of Object.entries(message.points)) t?.points.set(key, point);
    } else if (message.type === "moved") {
      Object.assign(at, message.setting);
    } else if (message.type === "forget") {
      for (const t of known.values()) t.points.clear();
    } else if (message.type === "error") {
      asked = 0;
      if (stream) stream.running = false;
      saveState.textContent = "";
      savePage.disabled = false;
      alert.replaceChildren(h("strong", {}, message.title), h("p", {}, message.message), h("p", {}, message.remedy),
        h("button", { type: "button", onclick: () => { alert.hidden = true; asked = performance.now(); source.say({ type: "retry" }); } }, "Retry"),
        h("button", { type: "button", onclick: () => (alert.hidden = true) }, "Close"));
      alert.hidden = false;
    } else if (message.type === "status") {
      saveState.textContent = message.busy ? `computing ${message.done} of ${message.of} settings …` : "";
      savePage.disabled = message.busy;
    } else if (message.type === "ready") {
      alert.hidden = true;
    } else if (message.type === "page") {
      saveState.textContent = "";
      download("alpha-slider.html", new Blob([message.html], { type: "text/html" }));
    } else if (message.type === "stream") {
      if (message.event === null) {
        const blank = () => ({ text: "", tokens: [], first: null, ms: 0, done: false, split: null });
        stream = { text: message.text, key: message.key, alpha: message.alpha, running: true, sides: [blank(), blank()] };
      } else if (stream?.key === message.key && stream.text === message.text) {
        grow(stream, message.event);
      }
    }
    paint();
  }

  /** One more token for one side; `split` is where, in characters, its text leaves the other side's. */
  function grow({ sides: both }, event) {
    const side = both[event.side];
    const other = both[1 - event.side];
    const place = side.tokens.length;
    if (side.split === null && other.tokens.length > place && other.tokens[place] !== event.token) {
      side.split = side.text.length;
      other.split = other.starts[place];
    }
    (side.starts ??= []).push(side.text.length);
    side.tokens.push(event.token);
    side.text += event.piece;
    side.first ??= event.ms;
    side.ms = event.ms;
    side.done = event.end;
    if (both.every((one) => one.done)) stream.running = false;
  }

  // ---------------------------------------------------------------------------------------------------- drawing

  let speak = 0;
  let waiting = 0;

  function paint() {
    if (!frame) frame = requestAnimationFrame(draw);
  }

  function draw() {
    frame = 0;
    const t = text();
    const found = t && nearest(t);
    const exact = Boolean(found?.exact);
    if (exact) asked = 0;
    view.dataset.exact = exact;
    view.setAttribute("aria-busy", String(!exact));
    alpha.value = alphaAt();
    alpha.setAttribute("aria-valuetext", showAlpha(at.alpha));
    alphaShown.textContent = showAlpha(at.alpha);
    tau.value = meta.taus.indexOf(at.tau);
    tau.setAttribute("aria-valuetext", `${at.tau} tokens`);
    tauShown.textContent = at.tau;
    score.value = at.score;
    scoreSays.textContent = meta.scores[at.score];
    which.value = meta.texts.some((m) => m.id === at.text) ? at.text : "own";
    drawNotice(t, found, exact);
    if (!t) return;
    const now = { slot: slotOf(t, alphaAt(), at.tau), n: t.pieces.length };
    const depth = found && (found.point.bytes ??= bytes(found.point.depth));
    drawText(t, depth);
    drawStrip(t);
    drawFacts(t, now, found);
    drawAnswer(t, found);
    drawSays(t, now, found);
    drawLayer(t, depth);
    drawMap(t, depth);
    drawRace();
    info.textContent = at.token !== null && depth ? describe(t, at.token)
      : depth ? "Point at a token, here or in the map, to see how far it goes." : "";
    clearTimeout(speak);
    if (exact) speak = setTimeout(() => (spoken.textContent = says.textContent), 700);
  }

  function drawNotice(t, found, exact) {
    const notes = [];
    if (!t) notes.push(alert.hidden ? "Reading the text …" : "");
    else if (!found) notes.push("The model is running for the first time …");
    else if (!exact) notes.push(`Computing; until then, text and answer are those of α = ${showAlpha(found.alpha)}.`);
    if (asked && performance.now() - asked > 4000 && alert.hidden) notes.push("Waiting for the kernel: is another cell running?");
    clearTimeout(waiting);
    if (asked) waiting = setTimeout(paint, 4100);
    if (meta.trained && at.alpha < Math.min(meta.trained[0], 1)) notes.push(`Below the range that this model was fine-tuned for, α from ${meta.trained[0]} to ${meta.trained[1]}.`);
    if (!meta.trained && meta.kind !== "none") notes.push("This model was not fine-tuned for the dial: its answers move early.");
    if (t?.cut) notes.push(`Only the first ${t.pieces.length} tokens are read; ${t.cut} more were left out.`);
    notice.textContent = notes.filter(Boolean).join(" ");
  }

  function drawText(t, depth) {
    if (textDrawn !== t) {
      textDrawn = t;
      t.drawn = new Int8Array(t.pieces.length).fill(-1);
      t.pointed = null;
      const spans = document.createDocumentFragment();
      t.pieces.forEach((piece, i) => {
        const span = document.createElement("span");
        span.dataset.i = i;
        if (t.part) span.dataset.part = t.part[i] === 3 ? "asks" : t.part[i] ? "stays" : "document";
        span.textContent = piece === "" ? "·" : piece.replace(/\n/g, "↵\n");
        spans.append(span);
      });
      t.spans = [...spans.children];
      tokens.replaceChildren(spans);
      tokens.scrollTop = 0;
      at.token = at.token !== null && at.token < t.pieces.length ? at.token : null;
      if (live && !meta.texts.some((m) => m.id === t.id)) {
        own.hidden = false; // also in a view that is opened later
        own.value ||= t.text;
      }
      label.textContent = t.label ? `labelled ${t.label}` : "";
    }
    // Only what has changed is touched: a drag over a long text must not rebuild it.
    for (let i = 0; depth && i < depth.length; i++) {
      const code = shade(depth[i], layers) + (depth[i] < at.layer ? 16 : 0);
      if (code !== t.drawn[i]) {
        t.drawn[i] = code;
        t.spans[i].className = `t d${code & 15}${code & 16 ? " gone" : ""}`;
      }
    }
    if (t.pointed !== at.token) {
      t.spans[t.pointed]?.removeAttribute("data-here");
      t.spans[at.token]?.setAttribute("data-here", "");
      t.pointed = at.token;
    }
  }

  function describe(t, i) {
    const found = nearest(t);
    const d = found?.point.bytes?.[i];
    if (d === undefined) return "";
    if (t.part?.[i]) return `${quoted(t.pieces[i])} ${t.part[i] === 3 ? "asks" : "is not of the document"}, and never leaves.`;
    return d >= layers ? `${quoted(t.pieces[i])} goes through all ${layers} layers.`
      : d === 0 ? `${quoted(t.pieces[i])} is dropped by the first layer.`
      : `${quoted(t.pieces[i])} is dropped by layer ${d + 1} of ${layers}.`;
  }

  /** Accuracy at an alpha, on the line between the measured settings; null outside of them, or for another tau or score. */
  function accuracyAt(a) {
    const curve = meta.accuracy;
    if (!curve || at.score !== curve.score || at.tau !== curve.tau) return null;
    const after = curve.points.findIndex(([x]) => x >= a - 1e-9);
    if (after < 0) return null;
    const [x1, y1, low1, high1] = curve.points[after];
    if (Math.abs(x1 - a) < 1e-9) return { value: y1, low: low1, high: high1, measured: true };
    if (after === 0) return null;
    const [x0, y0] = curve.points[after - 1];
    return { value: y0 + ((y1 - y0) * (a - x0)) / (x1 - x0), measured: false };
  }

  /** How likely the answer of alpha = 1 is at a point. */
  function loyal(t, p) {
    const stock = t.points.get("stock");
    if (!stock || !p) return null;
    if (meta.kind === "classify") return p.p[stock.p.indexOf(Math.max(...stock.p))];
    if (meta.kind === "generate") return p.words.find(([w]) => w === stock.words[0][0])?.[1] ?? null;
    return null;
  }

  const GRIP = 22; // px, the slider's thumb
  const HIGH = 72;

  function drawStrip(t) {
    const width = strip.clientWidth || alpha.clientWidth;
    if (!width) return;
    const last = meta.alphas.length - 1;
    const x = (i) => GRIP / 2 + ((width - GRIP) * i) / Math.max(1, last);
    const y = (share) => HIGH - (HIGH - 14) * share;
    /** Where on the track an alpha between two stops lies. */
    const between = (a) => {
      const up = meta.alphas.findIndex((b) => b >= a - 1e-9);
      if (up <= 0) return up === 0 && meta.alphas[0] - a < 1e-9 ? x(0) : null;
      return x(up - 1 + (a - meta.alphas[up - 1]) / (meta.alphas[up] - meta.alphas[up - 1]));
    };
    const work = meta.alphas.map((_, i) => t.costs.macs[slotOf(t, i, at.tau)] / t.costs.macs[0]);
    const line = work.map((share, i) => `${x(i)},${y(share)}`).join(" ");
    const parts = [0.5, 1].flatMap((share) => [
      s("line", { class: "z-grid", x1: 0, x2: width, y1: y(share), y2: y(share) }),
      s("text", { class: "z-grid-name", x: 0, y: y(share) - 3 }, percent(share)),
    ]);
    parts.push(s("polygon", { class: "z-work", points: `${x(0)},${HIGH} ${line} ${x(last)},${HIGH}` }));
    if (meta.kind !== "none") {
      meta.alphas.forEach((_, i) => {
        const p = loyal(t, t.points.get(keyOf(t, i, at.tau, at.score)));
        if (p !== null) parts.push(s("path", { class: "z-loyal", d: `M${x(i)} ${y(p) - 3}l3 3l-3 3l-3 -3z` }));
      });
    }
    const curve = meta.accuracy;
    if (curve && at.score === curve.score && at.tau === curve.tau) {
      const dots = curve.points.map(([a, value]) => [between(a), y(value / 100)]).filter(([left]) => left !== null);
      parts.push(s("polyline", { class: "z-curve", points: dots.map((dot) => dot.join(",")).join(" ") }));
      for (const [left, top] of dots) parts.push(s("circle", { class: "z-dot", cx: left, cy: top, r: 3 }));
    }
    const here = x(alphaAt());
    parts.push(s("line", { class: "z-here", x1: here, x2: here, y1: 0, y2: HIGH }));
    strip.setAttribute("viewBox", `0 0 ${width} ${HIGH}`);
    strip.setAttribute("height", HIGH);
    strip.replaceChildren(...parts);

    if (ticks.dataset.width !== String(width)) {
      ticks.dataset.width = width;
      let edge = Infinity;
      const shown = [];
      for (let i = last; i >= 0; i--) {
        const round = Math.abs(meta.alphas[i] * 20 - Math.round(meta.alphas[i] * 20)) < 1e-9;
        if ((i === last || i === 0 || round) && edge - x(i) > 38 && (i === 0 || x(i) - x(0) > 38 || i === last)) {
          edge = x(i);
          shown.push(h("span", { style: `left:${x(i)}px` }, showAlpha(meta.alphas[i])));
        }
      }
      ticks.replaceChildren(...shown);
      const entry = (kind, words) => h("span", { className: kind }, words);
      legend.replaceChildren(...[entry("k-work", "work left (MACs)"),
        curve ? entry("k-curve", `accuracy, ${curve.n.toLocaleString("en")} held-out samples`) : null,
        meta.kind !== "none" ? entry("k-loyal", "this text: probability of the answer at α = 1") : null].filter(Boolean));
    }
  }

  function drawFacts(t, { slot, n }, found) {
    const { costs } = t;
    const top = costs.top[slot];
    showTop(`${top} of ${n}`, top / n, `${percent(costs.share[slot])} of all token-layers`);
    const less = costs.macs[0] / costs.macs[slot];
    showWork(slot ? `${times(less)} less` : "all", 1 / less, `${showMacs(costs.macs[slot])} of ${showMacs(costs.macs[0])} MACs`);
    showCache(showBytes(costs.kv[slot]), costs.kv[slot] / costs.kv[0], `of ${showBytes(costs.kv[0])}`);
    const stock = t.points.get("stock");
    const timed = costs.predicted?.tau === at.tau && costs.predicted.score === at.score ? costs.predicted.ms : null;
    const predicted = timed ? timed[alphaAt()] : stock ? stock.ms / less : null;
    const how = timed ? "by calibration" : "by MACs";
    const said = predicted === null ? "" : `, ${showMs(predicted)} ${how}`;
    if (!stock || !found) showTime("…", 0, "");
    else if (!found.exact) showTime("…", 0, `was ${showMs(stock.ms)} at α = 1${said}`, predicted / stock.ms);
    else if (found.point === stock) showTime(showMs(stock.ms), 1, `measured at α = 1`);
    else showTime(showMs(found.point.ms), found.point.ms / stock.ms, `measured; ${showMs(stock.ms)} at α = 1${said}`, predicted / stock.ms);
    if (showAccuracy) {
      const here = accuracyAt(at.alpha);
      const best = meta.accuracy.points.at(-1)[1];
      if (!here) showAccuracy("not measured", 0, at.score === meta.accuracy.score && at.tau === meta.accuracy.tau ? "at this alpha" : `only for τ = ${meta.accuracy.tau}, ${meta.accuracy.score}`);
      else showAccuracy(`${here.measured ? "" : "≈ "}${decimals(here.value, 1)}%`, here.value / 100,
        here.measured ? `measured: ${decimals(here.low, 1)} to ${decimals(here.high, 1)}` : `between measured; ${decimals(best, 1)}% at α = 1`, best / 100);
    }
  }

  const answerOf = (p) => {
    if (meta.kind === "classify") {
      const best = p.p.indexOf(Math.max(...p.p));
      return { name: meta.labels[best], p: p.p[best] };
    }
    return meta.kind === "generate" ? { name: quoted(p.words[0][0]), p: p.words[0][1] } : null;
  };

  function drawAnswer(t, found) {
    if (!found || meta.kind === "none") return answer.replaceChildren();
    const stock = t.points.get("stock");
    const classes = () => found.point.p.map((p, i) => [meta.labels[i], p, stock?.p[i] ?? null])
      .sort((a, b) => (found.point.p.length > 6 ? b[1] - a[1] : 0)).slice(0, 8);
    const rows = meta.kind === "classify" ? classes() : found.point.words.map(([w, p, was]) => [quoted(w), p, was]).slice(0, 8);
    const most = meta.kind === "classify" ? 1 : Math.max(...rows.flatMap(([, p, was]) => [p, was]));
    const best = Math.max(...rows.map(([, p]) => p));
    answer.replaceChildren(...rows.map(([name, p, was]) => {
      const row = h("div", { className: p === best ? "z-option best" : "z-option" }, h("span", { className: "z-option-name" }, name, name === t.label ? h("span", { className: "z-faint" }, " (label)") : null),
        h("div", { className: "z-bar", "aria-hidden": "true" }, h("i", { style: `width:${(100 * p) / most}%` }),
          was === null ? null : h("b", { style: `left:${(100 * was) / most}%` })),
        h("span", { className: "z-p" }, percent(p)),
        h("span", { className: "z-faint z-was" }, was === null ? "" : `was ${percent(was)}`));
      row.dataset.p = p;
      return row;
    }));
  }

  function drawSays(t, { slot, n }, found) {
    const top = t.costs.top[slot];
    const strong = (words) => h("strong", {}, words);
    const parts = at.alpha === 1 ? ["Every layer keeps ", strong("all"), ` ${n} tokens: this is the stock model. `]
      : slot === 0 ? [`Every layer keeps all ${n} tokens, for there are at most τ = ${at.tau}. `]
      : [schedule.passes, strong(`${percent(at.alpha)}`),
        ` of the tokens it gets${schedule.rest}; `, strong(`${top} of ${n}`), ` reach the end of layer ${layers}. `];
    const stock = t.points.get("stock");
    const mine = found && answerOf(found.point);
    if (mine && stock) {
      const was = answerOf(stock);
      const subject = meta.kind === "classify" ? "The model" : "The next word";
      const verb = meta.kind === "classify" ? "says" : "is";
      if (found.point === stock) parts.push(`${subject} ${verb} `, strong(`${mine.name}, ${percent(mine.p)}`), ".");
      else if (mine.name === was.name) parts.push(`${subject} ${verb === "says" ? "still says" : "still is"} `, strong(`${mine.name}, ${percent(mine.p)}`), ` (${percent(was.p)} at α = 1)`);
      else parts.push(h("span", { className: "z-flip" }, `≠ ${subject} now ${verb} ${mine.name}, ${percent(mine.p)}, not ${was.name} as at α = 1 (${percent(was.p)})`));
      if (found.point !== stock) parts.push(", for ", strong(`${times(t.costs.macs[0] / t.costs.macs[slot])} less work`), ".");
    } else if (slot) parts.push("That is ", strong(`${times(t.costs.macs[0] / t.costs.macs[slot])} less work`), ".");
    says.replaceChildren(...parts);
  }

  function drawLayer(t, depth) {
    layer.value = at.layer;
    const n = t.pieces.length;
    const left = depth ? depth.reduce((sum, d) => sum + (d >= at.layer), 0) : null;
    const words = at.layer === 0 ? `Input: all ${n} tokens, darker the further they go` : `After layer ${at.layer} of ${layers}: ${left ?? "…"} of ${n} tokens are left`;
    layerShown.textContent = words;
    layer.setAttribute("aria-valuetext", words);
  }

  const MARGIN = 46; // px right of the map, for the bars that count
  const grid = document.createElement("canvas");

  function colours() {
    const of = (node) => getComputedStyle(node);
    return {
      ramp: [...ramp.querySelectorAll("i")].map((node) => of(node).backgroundColor),
      ink: of(view).color, faint: of(info).color, here: of(layerShown).color, paper: of(tokens).backgroundColor, bar: of(ramp.querySelector(".d5")).backgroundColor,
    };
  }

  function drawMap(t, depth) {
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (!width || !depth) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const context = canvas.getContext("2d");
    const paint_ = colours();
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.fillStyle = paint_.paper;
    context.fillRect(0, 0, width - MARGIN, height);
    context.imageSmoothingEnabled = t.pieces.length * ratio > 2 * width;
    context.drawImage(icicles(depth, paint_.ramp), 0, 0, width - MARGIN, height);

    const n = t.pieces.length;
    const row = height / layers;
    const counts = new Array(layers).fill(0);
    for (const d of depth) for (let l = 0; l < d; l++) counts[l]++;
    context.fillStyle = paint_.bar;
    counts.forEach((count, l) => context.fillRect(width - MARGIN + 6, l * row + row * 0.15, Math.max(1, ((MARGIN - 8) * count) / n), row * 0.7));

    context.fillStyle = paint_.here;
    const y = clamp(at.layer * row, 1, height - 1);
    context.fillRect(0, y - 1, width, 2);
    context.beginPath();
    context.moveTo(width, y - 6);
    context.lineTo(width - 8, y);
    context.lineTo(width, y + 6);
    context.fill();
    if (at.token !== null) {
      const column = (width - MARGIN) / n;
      context.strokeStyle = paint_.here;
      context.lineWidth = 1.5;
      context.strokeRect(at.token * column - 1, 0, Math.max(2, column + 2), height);
    }
    canvas.setAttribute("aria-label", `Map of ${layers} layers by ${n} tokens. Layer by layer ${counts.join(", ")} tokens go on.`);
  }

  /** One pixel per layer and token: coloured as far down as the token goes. */
  function icicles(depth, shades) {
    const pixels = shades.map((colour) => {
      const [red, green, blue] = colour.match(/[\d.]+/g).map(Number);
      return new Uint32Array(Uint8Array.of(red, green, blue, 255).buffer)[0];
    });
    grid.width = depth.length;
    grid.height = layers;
    const context = grid.getContext("2d");
    const image = context.createImageData(depth.length, layers);
    const cells = new Uint32Array(image.data.buffer);
    depth.forEach((d, i) => {
      const pixel = pixels[shade(d, layers)];
      for (let l = 0; l < d; l++) cells[l * depth.length + i] = pixel;
    });
    context.putImageData(image, 0, 0);
    return grid;
  }

  function drawRace() {
    const running = Boolean(stream?.running);
    stopButton.hidden = !running;
    go.hidden = running;
    sides.forEach(({ title, body, clock }, i) => {
      const side = stream?.text === at.text ? stream.sides[i] : null;
      const a = i === 0 ? 1 : side ? stream.alpha : at.alpha;
      title.textContent = `α = ${showAlpha(a)}${i === 0 ? ", the stock model" : ""}`;
      if (!side) {
        body.replaceChildren(h("span", { className: "z-faint" }, "Press the button above."));
        clock.textContent = "";
        return;
      }
      const cut = side.split ?? side.text.length;
      body.replaceChildren(side.text.slice(0, cut), h("mark", { title: "From here on, the two differ" }, side.text.slice(cut)),
        running && !side.done ? h("span", { className: "z-cursor" }, "▍") : "");
      body.scrollTop = body.scrollHeight;
      const later = side.tokens.length > 1 ? `, then ${showMs((side.ms - side.first) / (side.tokens.length - 1))} a token` : "";
      clock.textContent = side.first === null ? "reading the text …" : `first token after ${showMs(side.first)}${later}; ${side.tokens.length} tokens in ${showMs(side.ms)}`;
    });
  }

  // ------------------------------------------------------------------------------------------- saving as picture

  function savePicture(kind) {
    const drawing = picture();
    const name = `alpha-${showAlpha(at.alpha)}`;
    const blob = new Blob([drawing.svg], { type: "image/svg+xml" });
    if (kind === "svg") return download(`${name}.svg`, blob);
    const image = new Image();
    image.onload = () => {
      const sheet = h("canvas", { width: drawing.width * 2, height: drawing.height * 2 });
      const context = sheet.getContext("2d");
      context.scale(2, 2);
      context.drawImage(image, 0, 0, drawing.width, drawing.height);
      sheet.toBlob((png) => download(`${name}.png`, png), "image/png");
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(drawing.svg)}`;
  }

  /** The view as one SVG drawing: the sentence, the numbers, the answer, the map and the whole text. */
  function picture() {
    const t = text();
    const found = t && nearest(t);
    const width = 920, pad = 28, inner = width - 2 * pad;
    const c = colours();
    const back = getComputedStyle(view).backgroundColor;
    const out = [];
    const font = "system-ui, sans-serif";
    const pen = document.createElement("canvas").getContext("2d");
    const write = (x, y, words, size = 14, more = "") => out.push(`<text x="${x}" y="${y}" font-size="${size}" font-family="${font}" ${more || `fill="${c.ink}"`}>${xml(words)}</text>`);
    let y = pad + 22;
    write(pad, y, `α = ${showAlpha(at.alpha)}`, 26, `fill="${c.ink}" font-weight="700"`);
    write(width - pad, y, `${meta.model}, τ = ${at.tau}, ${at.score}, ${schedule.name}`, 12, `fill="${c.faint}" text-anchor="end"`);
    y += 14;
    pen.font = `15px ${font}`;
    for (const line of wrap(pen, says.textContent.split(/(?<= )/), inner)) write(pad, (y += 21), line.map(({ word: w }) => w).join(""), 15);
    y += 18;
    const boxes = [...facts.children];
    boxes.forEach((box, i) => {
      const x = pad + (i * inner) / boxes.length;
      write(x, y + 12, box.querySelector(".z-name").textContent, 11, `fill="${c.faint}"`);
      write(x, y + 34, box.querySelector("strong").textContent, 17, `fill="${c.ink}" font-weight="600"`);
      pen.font = `11px ${font}`;
      wrap(pen, box.querySelector(":scope > .z-faint").textContent.split(/(?<= )/), inner / boxes.length - 12)
        .forEach((line, k) => write(x, y + 51 + 14 * k, line.map(({ word: w }) => w).join(""), 11, `fill="${c.faint}"`));
    });
    y += 92;
    for (const row of answer.children) {
      const [name, , p, was] = row.children;
      write(pad, y + 12, name.textContent, 13);
      const [bar, mark] = row.querySelector(".z-bar").children;
      out.push(`<rect x="${pad + 140}" y="${y + 2}" width="${(parseFloat(bar.style.width) / 100) * 420}" height="12" fill="${getComputedStyle(bar).backgroundColor}"/>`);
      if (mark) out.push(`<rect x="${pad + 139 + (parseFloat(mark.style.left) / 100) * 420}" y="${y - 1}" width="2" height="18" fill="${c.ink}"/>`);
      write(pad + 575, y + 12, `${p.textContent}  ${was.textContent}`, 13);
      y += 22;
    }
    y += 14;
    const depth = found?.point.bytes;
    if (depth) {
      const map = icicles(depth, c.ramp).toDataURL();
      const tall = clamp(layers * 7, 120, 240);
      write(pad, y + 12, layerShown.textContent, 13);
      out.push(`<rect x="${pad}" y="${y + 20}" width="${inner}" height="${tall}" fill="${c.paper}"/>`);
      out.push(`<image x="${pad}" y="${y + 20}" width="${inner}" height="${tall}" preserveAspectRatio="none" style="image-rendering:pixelated" href="${map}"/>`);
      out.push(`<rect x="${pad}" y="${y + 19 + (tall * at.layer) / layers}" width="${inner}" height="2" fill="${c.here}"/>`);
      y += tall + 36;
      pen.font = `14px ${font}`;
      for (const line of wrap(pen, t.pieces, inner)) {
        y += 24;
        for (const { word: w, x, wide, index } of line) {
          const span = tokens.children[index];
          const style = getComputedStyle(span);
          const gone = depth[index] < at.layer;
          if (!gone) out.push(`<rect x="${pad + x}" y="${y - 15}" width="${wide}" height="20" fill="${style.backgroundColor}"/>`);
          write(pad + x, y, w, 14, `fill="${style.color}" xml:space="preserve"${gone ? ' text-decoration="line-through"' : ""}`);
        }
      }
    }
    const height = Math.ceil(y + pad);
    const svg = `<svg xmlns="${NS}" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"><rect width="100%" height="100%" fill="${back}"/>${out.join("")}</svg>`;
    return { svg, width, height };
  }

  function wrap(pen, words, width) {
    const lines = [[]];
    let x = 0;
    words.forEach((w, index) => {
      const shown = w.replace(/\n/g, "↵");
      const wide = pen.measureText(shown).width;
      if (x + wide > width && x > 0) {
        lines.push([]);
        x = 0;
      }
      lines.at(-1).push({ word: shown, x, wide, index });
      x += wide;
      if (w.includes("\n")) {
        lines.push([]);
        x = 0;
      }
    });
    return lines;
  }

  // ---------------------------------------------------------------------------------------- staying up to date

  const resized = new ResizeObserver(() => paint());
  resized.observe(view);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", paint);
  const themed = new MutationObserver(paint); // JupyterLab, Colab and VS Code say their theme on body or html
  for (const node of [document.body, document.documentElement]) {
    themed.observe(node, { attributes: true, attributeFilter: ["class", "theme", "data-jp-theme-light", "data-jp-theme-name", "data-vscode-theme-kind"] });
  }
  const disconnect = source.connect(hear);
  paint();

  return () => {
    halt();
    [typed, speak, waiting].forEach(clearTimeout);
    cancelAnimationFrame(frame);
    resized.disconnect();
    themed.disconnect();
    dark.removeEventListener("change", paint);
    disconnect();
    root.replaceChildren();
  };
}

export default { render: ({ model, el }) => mount(el, kernelSource(model)) };
