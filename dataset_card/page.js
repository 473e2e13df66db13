"use strict";
// The page shows one example at a time. Every text reaches the document as a text node, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const IGNORED = -100;
const CELL = 5; // width of a unit in CSS pixels
const WAVE = 36, CELLS = 14, GAP = 8; // heights of the waveform, of the units, and of the space between two lines
const SHOWN_TOKENS = 2; // at each end of a run of units, of the instruction, or of a long text, that is not expanded
const LONG_TEXT = 400; // tokens
const MP3_DELAY = 1105 / 16000; // seconds that LAME adds, for a browser that does not remove them

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const decode = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

const isUnit = (id) => id >= data.first_unit && id < data.first_unit + data.num_units;
const startOf = (unit) => unit / data.units_per_second + 1e-9; // a hair more, so that floor() gives this unit

// ---- sound: one recording at a time, decoded whole, so that it starts at a unit exactly

const sound = {
  context: null,
  playing: null, // { timeline, source, origin }: second `t` of the recording sounds at context time `origin + t`

  async buffer(recording) {
    recording.decoded ??= await this.context.decodeAudioData(decode(recording.audio).buffer);
    return { decoded: recording.decoded, lead: recording.decoded.duration - recording.seconds > MP3_DELAY / 2 ? MP3_DELAY : 0 };
  },

  async play(timeline, from) {
    this.stop();
    this.context ??= new AudioContext();
    const [{ decoded, lead }] = await Promise.all([this.buffer(timeline.recording), this.context.resume()]);
    this.stop();
    const source = this.context.createBufferSource();
    source.buffer = decoded;
    source.connect(this.context.destination);
    this.playing = { timeline, source, origin: this.context.currentTime - from };
    source.onended = () => this.playing?.source === source && this.finish();
    source.start(0, from + lead);
    timeline.changed();
    this.follow();
  },

  follow() {
    if (!this.playing) return;
    const { timeline, origin } = this.playing;
    timeline.moveTo(Math.max(0, this.context.currentTime - origin));
    requestAnimationFrame(() => this.follow());
  },

  stop() {
    if (!this.playing) return;
    const { timeline, source } = this.playing;
    this.playing = null;
    source.onended = null;
    source.stop();
    timeline.changed();
  },

  finish() {
    const { timeline } = this.playing;
    this.stop();
    timeline.moveTo(0);
    timeline.ended?.();
  },
};

// ---- one turn: waveform, units, cursor

class Timeline {
  // `load` returns the recording where it is not in the page; null for a turn without one.
  constructor(turn, number, load) {
    this.turn = turn;
    this.load = load;
    this.playsOn = false; // true while all turns are played
    this.seconds = 0;
    this.unit = 0;
    this.use(data.recordings[turn.recording]);
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.slider = make("div", {
      className: "timeline", role: "slider", tabIndex: 0, "aria-label": `Units of turn ${number + 1}, ${turn.role}`,
      "aria-valuemin": 0, "aria-valuemax": Math.max(0, turn.units.length - 1),
      onclick: (event) => this.clicked(event), onkeydown: (event) => this.pressed(event),
    }, this.canvas);
    this.readout = make("span", { className: "readout" });
    this.button = make("button", { type: "button", className: "button", onclick: () => this.toggle() });
    this.element = make("div", { className: "track" }, this.slider, make("div", { className: "controls" }, ...(this.recording || load ? [this.button] : []), this.readout));
    this.element.style.width = `${turn.units.length * CELL}px`;
    this.changed();
    this.moveTo(0);
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  use(recording) {
    this.recording = recording;
    this.peaks = recording && (recording.peaks instanceof Uint8Array ? recording.peaks : decode(recording.peaks));
  }

  async fetch() {
    if (this.recording || !this.load) return;
    try {
      this.loading ??= this.load();
      this.use(await this.loading);
      if (!this.recording) this.button.remove();
      this.draw();
    } catch (error) {
      this.readout.textContent = `The recording cannot be read: ${error.message}`;
    }
  }

  get isPlaying() { return sound.playing?.timeline === this; }

  toggle() {
    this.playsOn = false;
    return this.isPlaying ? sound.stop() : this.play(this.seconds);
  }

  async play(from) {
    await this.fetch();
    if (!this.peaks || !this.element.isConnected) return;
    try {
      await sound.play(this, from);
    } catch (error) {
      this.readout.textContent = `This browser cannot play the recording: ${error.message}`;
    }
  }

  // A unit covers its share of a second from its place; the last one also covers the rest of the recording.
  moveTo(seconds) {
    this.seconds = seconds;
    this.unit = Math.max(0, Math.min(Math.floor(seconds * data.units_per_second), this.turn.units.length - 1));
    const place = `${this.unit + 1} of ${this.turn.units.length}`;
    this.slider.dataset.seconds = seconds;
    this.slider.setAttribute("aria-valuenow", this.unit);
    this.slider.setAttribute("aria-valuetext", `unit ${place}: ${this.turn.units[this.unit]}, ${seconds.toFixed(2)} seconds`);
    this.readout.replaceChildren("unit ", make("b", {}, String(this.turn.units[this.unit] ?? "none")), ` · ${place} · ${seconds.toFixed(2)} s`);
    this.draw();
  }

  moveToUnit(unit) {
    const seconds = startOf(Math.max(0, Math.min(unit, this.turn.units.length - 1)));
    if (this.isPlaying) return this.play(seconds);
    this.moveTo(seconds);
  }

  changed() {
    this.button.textContent = this.isPlaying ? "❚❚ Pause" : "▶ Play";
    this.button.setAttribute("aria-label", `${this.isPlaying ? "Pause" : "Play"} the ${this.turn.role}'s turn`);
  }

  clicked(event) {
    const box = this.canvas.getBoundingClientRect();
    const line = Math.floor((event.clientY - box.top) / (this.lineHeight + GAP));
    const unit = line * this.perLine + Math.floor((event.clientX - box.left) / CELL);
    if (unit >= this.turn.units.length) return;
    this.playsOn = false;
    this.moveTo(startOf(unit));
    this.play(this.seconds);
  }

  pressed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const second = Math.round(data.units_per_second);
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: second, PageDown: -second };
    if (event.key in steps) this.moveToUnit(this.unit + steps[event.key]);
    else if (event.key === "Home") this.moveToUnit(0);
    else if (event.key === "End") this.moveToUnit(this.turn.units.length - 1);
    else if (event.key === " " || event.key === "Enter") this.toggle();
    else return;
    event.preventDefault();
  }

  get lineHeight() { return (this.peaks ? WAVE : 0) + CELLS; }

  draw() {
    const available = this.element.clientWidth;
    if (!available) return;
    const { units } = this.turn;
    this.perLine = Math.max(1, Math.floor(available / CELL));
    const lines = Math.max(1, Math.ceil(units.length / this.perLine));
    const width = Math.min(this.perLine, units.length) * CELL, height = lines * (this.lineHeight + GAP) - GAP;
    const scale = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
      this.slider.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
    }
    const paint = this.canvas.getContext("2d");
    paint.setTransform(scale, 0, 0, scale, 0, 0);
    paint.clearRect(0, 0, width, height);
    const colors = readColors(this.element.parentElement ?? document.body);
    for (let unit = 0; unit < units.length; unit++) this.drawUnit(paint, unit, colors);
    this.drawCursor(paint, colors);
  }

  place(unit) { return [(unit % this.perLine) * CELL, Math.floor(unit / this.perLine) * (this.lineHeight + GAP)]; }

  drawUnit(paint, unit, colors) {
    const [x, y] = this.place(unit), { units } = this.turn, top = y + this.lineHeight - CELLS;
    const isHere = unit === this.unit;
    if (isHere) {
      paint.fillStyle = colors.highlight;
      paint.fillRect(x - 1, y, CELL + 2, this.lineHeight);
    }
    if (this.peaks) {
      paint.fillStyle = unit <= this.unit ? colors.role : colors.soft;
      for (const [half, peak] of [this.peaks[2 * unit] ?? 0, this.peaks[2 * unit + 1] ?? 0].entries()) {
        const size = Math.max(1, (peak / 255) * (WAVE - 4));
        paint.fillRect(x + (half * CELL) / 2, y + (WAVE - 2 - size) / 2, CELL / 2 - 0.6, size);
      }
    }
    // Neighbours of equal units touch, so that repetition shows without colours.
    const repeats = units[unit] === units[unit + 1];
    paint.fillStyle = `hsl(${(units[unit] * 137.508) % 360} 58% ${isHere ? colors.bright : colors.light})`;
    paint.fillRect(x, top + (isHere ? 0 : 2), CELL - (repeats ? 0 : 1), CELLS - (isHere ? 0 : 2));
  }

  drawCursor(paint, colors) {
    const [x, y] = this.place(this.unit);
    const inside = Math.min(1, Math.max(0, this.seconds * data.units_per_second - this.unit));
    paint.fillStyle = colors.cursor;
    paint.fillRect(x + inside * CELL - 1, y, 2, this.lineHeight);
  }
}

let isDark = false;

function readColors(element) {
  const style = getComputedStyle(element);
  const role = getComputedStyle(element.querySelector("h3") ?? element).color;
  return {
    role, soft: isDark ? "#6b7684" : "#a3adb9", cursor: isDark ? "#ff6b8f" : "#c4003d",
    highlight: isDark ? "#ffffff40" : "#0000002e", light: isDark ? "52%" : "56%", bright: isDark ? "68%" : "40%", text: style.color,
  };
}

// ---- an example

function showTurn(turn, number, load) {
  const timeline = new Timeline(turn, number, load);
  const repeated = repeatedShare(turn.units);
  const element = make("article", { className: `turn ${turn.role}`, "aria-label": `Turn ${number + 1}, ${turn.role}` },
    make("header", {},
      make("h3", {}, turn.role === "user" ? "User" : "Agent"),
      make("span", { dir: "auto" }, `speaker ${turn.speaker}`),
      ...turn.left_out.map((name) => make("span", { className: "chip" }, `${name} not in input_ids`)),
      ...(turn.emotion ? [make("span", { className: "chip", dir: "auto" }, turn.emotion)] : []),
      make("span", {}, `${turn.seconds.toFixed(2)} s · ${count(turn.units.length, "unit")} · ${percent(repeated)} repeated`)),
    make("p", { className: "words", dir: "auto" }, turn.text),
    timeline.element);
  return [element, timeline];
}

// Share of the units that equal the one before.
function repeatedShare(units) {
  let repeated = 0;
  for (let i = 1; i < units.length; i++) repeated += units[i] === units[i - 1];
  return units.length ? repeated / units.length : 0;
}

function countLabels(labels) { return labels.reduce((sum, label) => sum + (label !== IGNORED), 0); }

function showParts(example) {
  const total = countLabels(example.labels);
  const rows = Object.entries(data.parts).map(([part, name]) => {
    let tokens = 0, labelled = 0;
    for (const [other, start, length] of example.parts) {
      if (other !== part) continue;
      tokens += length;
      labelled += countLabels(example.labels.slice(start, start + length));
    }
    const share = total ? labelled / total : 0;
    return make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, tokens.toLocaleString("en")),
      make("td", { "data-labelled": labelled }, labelled.toLocaleString("en")),
      make("td", {}, make("span", { className: "share" }, make("meter", { value: share, "aria-label": `share of ${name}` }), percent(share))));
  });
  const head = ["part", "tokens", "labelled", "share of the loss"].map((name) => make("th", { scope: "col" }, name));
  return make("table", { className: "parts" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function showToken(example, position) {
  const id = example.ids[position], label = example.labels[position];
  const piece = isUnit(id) ? `unit ${id - data.first_unit}` : data.pieces[id] ?? `no token ${id}`;
  return make("li", { className: label === IGNORED ? "" : "labelled" },
    make("span", { className: "piece" }, piece), make("span", {}, String(id)), make("span", {}, String(label)));
}

// A button in place of some tokens, which brings them back.
function showFold(example, start, length, noun) {
  const item = make("li", { className: "more" });
  const expand = () => {
    const tokens = Array.from({ length }, (_, i) => showToken(example, start + i));
    item.replaceWith(...tokens);
    tokens[0].tabIndex = -1;
    tokens[0].focus();
  };
  item.append(make("button", { type: "button", className: "button", "aria-expanded": "false", onclick: expand }, `… ${count(length, noun)} …`));
  return item;
}

function showRun(example, [part, start, length]) {
  const labelled = countLabels(example.labels.slice(start, start + length));
  const list = make("ol", { className: "tokens" });
  const show = (from, to) => { for (let i = from; i < to; i++) list.append(showToken(example, start + i)); };
  let folded = 0;
  while (folded < length && isUnit(example.ids[start + folded])) folded++;
  const noun = folded ? "unit" : "token";
  if (part === "frame" || (!folded && length > LONG_TEXT)) folded = length;
  const hidden = folded - 2 * SHOWN_TOKENS;
  if (hidden > (part === "frame" ? 8 : 1)) {
    show(0, SHOWN_TOKENS);
    list.append(showFold(example, start + SHOWN_TOKENS, hidden, noun));
    show(folded - SHOWN_TOKENS, length);
  } else {
    show(0, length);
  }
  return make("div", { className: "part" },
    make("h4", {}, make("b", {}, data.parts[part]), ` · ${count(length, "token")}${labelled ? `, ${labelled.toLocaleString("en")} labelled` : ""}`), list);
}

function showExample(example) {
  sound.stop();
  const turns = example.turns.map((turn, i) => showTurn(turn, i, source.recording && (() => source.recording(example, i))));
  const timelines = turns.map(([, timeline]) => timeline);
  timelines.forEach((timeline, i) => { timeline.ended = () => timeline.playsOn && timelines[i + 1]?.playOn(); });
  for (const timeline of timelines) timeline.playOn = () => { timeline.playsOn = true; timeline.play(0); };
  const hasSound = source.recording || timelines.some((timeline) => timeline.peaks);
  const playAll = make("button", { type: "button", className: "button", onclick: () => timelines[0].playOn() }, "▶ Play all");
  const step = (by, name) => make("button", {
    type: "button", className: "button", "data-step": by, onclick: () => select(neighbour(by), { focus: false }),
  }, name);
  const flag = make("button", { type: "button", className: "button", "aria-pressed": flags.has(example.id), onclick: () => toggleFlag(example.id, flag) }, "⚑ Flag");
  const focused = document.activeElement.dataset.step; // this button is made again
  const seconds = example.turns.reduce((sum, turn) => sum + turn.seconds, 0);
  document.getElementById("example").replaceChildren(
    make("div", { className: "bar" },
      make("h2", {}, example.id),
      make("p", {}, `${count(example.ids.length, "token")}, ${countLabels(example.labels).toLocaleString("en")} labelled · ${seconds.toFixed(2)} s`),
      make("div", { className: "buttons" }, ...(hasSound ? [playAll] : []), flag, step(-1, "Previous"), step(1, "Next"))),
    ...turns.map(([element]) => element),
    make("section", { "aria-label": "Tokens and labels" },
      make("h3", {}, "Tokens and labels"),
      showParts(example),
      make("p", { className: "key" }, "Each token with its id and its label. The loss counts the highlighted ones; a label of -100 is ignored."),
      ...example.parts.map((run) => showRun(example, run))));
  showSteps();
  document.querySelector(`[data-step="${focused}"]`)?.focus();
  timelines.forEach((timeline) => timeline.draw());
  if (source.isLocal) for (const timeline of timelines) timeline.fetch(); // from elsewhere a recording is fetched when it is played
}

// ---- flags: ids of rows, which the browser keeps for this dataset and `dailytalk-usdm edit --drop` reads from the saved file

const FLAGS = `flags of ${data.key}`;
const flags = new Set();
try {
  for (const id of JSON.parse(localStorage.getItem(FLAGS) ?? "[]")) flags.add(id);
} catch { /* a browser without storage: flags last until the page is closed */ }

function toggleFlag(id, button) {
  if (!flags.delete(id)) flags.add(id);
  button.setAttribute("aria-pressed", flags.has(id));
  try {
    localStorage.setItem(FLAGS, JSON.stringify([...flags]));
  } catch { /* as above */ }
  showFlags();
  showList();
}

function showFlags() {
  const button = document.getElementById("save");
  button.textContent = `Save flags.json (${count(flags.size, "row")})`;
  button.hidden = !flags.size;
  for (const option of filter.options) option.textContent = titleOf(option.value);
}

function saveFlags() {
  const text = JSON.stringify({ key: data.key, rows: [...flags].sort() }, null, 2) + "\n";
  const href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href, download: "flags.json" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60000);
}

// ---- the list

const search = document.getElementById("search"), filter = document.getElementById("filter"), list = document.getElementById("list");
const found = document.getElementById("found");
const LISTED = 200; // entries in the list at a time

const summarize = (id, size, turns) => ({
  id, size, words: (turns[0].text ?? "").slice(0, 200),
  text: [id, ...turns.flatMap((turn) => [turn.text, turn.emotion, `speaker ${turn.speaker}`])].join("\n").toLowerCase(),
});

// Where rows come from: the page itself, or the files of a folder (folder.js).
let source = {
  rows: data.examples.map((example) => summarize(example.id, example.ids.length, example.turns)),
  example: async (number) => data.examples[number],
  repetition: async () => data.examples.map((example) => repeatedShare(example.turns.flatMap((turn) => turn.units))),
  recording: null,
};

const tenth = () => Math.max(1, Math.round(source.rows.length / 10));

// The rows with the largest (or smallest) values: a tenth of all, at least one.
function extremes(values, sign) {
  const order = values.map((_, i) => i).sort((a, b) => sign * (values[b] - values[a]) || a - b);
  return order.slice(0, tenth()).sort((a, b) => a - b);
}

const sizes = () => source.rows.map((row) => row.size);
const filters = {
  all: ["All examples", () => source.rows.length, () => [...source.rows.keys()]],
  long: ["The longest tenth", tenth, () => extremes(sizes(), 1)],
  short: ["The shortest tenth", tenth, () => extremes(sizes(), -1)],
  repeated: ["The tenth with the most repeated units", tenth, async () => extremes(await (source.shares ??= source.repetition(say)), 1)],
  flagged: ["Flagged", () => source.rows.filter((row) => flags.has(row.id)).length, () => [...source.rows.keys()].filter((i) => flags.has(source.rows[i].id))],
  left_out: ["Left out of the split", () => data.left_out.length, null],
};
const titleOf = (name) => `${filters[name][0]} (${filters[name][1]().toLocaleString("en")})`;
const say = (text) => { found.textContent = text; };

let shown = [], leftOut = [], current = 0, first = 0; // rows and names in the list, the chosen row, the first entry that is listed

function neighbour(by) {
  const place = shown.indexOf(current);
  return place < 0 ? null : shown[place + by] ?? null;
}

function showSteps() {
  for (const button of document.querySelectorAll("[data-step]")) button.disabled = neighbour(+button.dataset.step) === null;
}

async function select(number, { focus }) {
  current = number;
  const place = shown.indexOf(number);
  if (place < first || place >= first + LISTED) {
    first = Math.floor(place / LISTED) * LISTED;
    showList();
  }
  for (const button of list.querySelectorAll("[data-example]")) {
    if (+button.dataset.example === current) {
      button.setAttribute("aria-current", "true");
      button.scrollIntoView({ block: "nearest" });
      if (focus) button.focus();
    } else button.removeAttribute("aria-current");
  }
  try {
    const example = await source.example(number);
    if (current === number) showExample(example);
  } catch (error) {
    if (current === number) showProblem(error);
  }
}

function showProblem(error) {
  document.getElementById("example").replaceChildren(make("p", { className: "problem", role: "alert" }, error.message));
}

function listItem(number) {
  const { id, size, words } = source.rows[number];
  return make("li", {}, make("button", { type: "button", "data-example": number, ...(number === current ? { "aria-current": "true" } : {}), onclick: () => select(number, { focus: false }) },
    make("span", { className: "name" }, id), make("span", { className: "size" }, `${flags.has(id) ? "⚑ flagged · " : ""}${count(size, "token")}`),
    make("span", { className: "words", dir: "auto" }, words)));
}

function listLeftOut([name, reason]) {
  return make("li", {}, make("div", { className: "left-out" },
    make("span", { className: "name" }, name), make("span", { className: "size" }, "left out"), make("span", { className: "words", dir: "auto" }, reason)));
}

// The entries from `first` on, between buttons that list those before and after them.
function showList() {
  const entries = shown.length ? shown : leftOut, end = first + LISTED;
  const more = (number, word, start) => number > 0 ? [make("li", {}, make("button", {
    type: "button", className: "more", onclick: () => { first = start; showList(); list.scrollTop = 0; },
  }, `${number.toLocaleString("en")} ${word}`))] : [];
  list.replaceChildren(...more(first, "before these", first - LISTED), ...entries.slice(first, end).map(shown.length ? listItem : listLeftOut),
    ...more(entries.length - end, "after these", end));
}

let updates = 0;

// `again` shows the chosen example once more, even if it stays the same.
async function update({ again }) {
  if (!filter.value) return; // the rows are being read
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean), number = ++updates;
  const matches = (text) => words.every((word) => text.includes(word));
  const choose = filters[filter.value][2];
  const chosen = choose ? await choose() : [];
  if (number !== updates) return; // another choice was made meanwhile
  leftOut = choose ? [] : data.left_out.filter((entry) => matches(entry.join("\n").toLowerCase()));
  shown = chosen.filter((i) => matches(source.rows[i].text));
  first = Math.floor(Math.max(0, shown.indexOf(current)) / LISTED) * LISTED;
  showList();
  showSteps();
  say(choose ? `${count(shown.length, "example")} of ${source.rows.length.toLocaleString("en")}` : `${leftOut.length} of ${data.left_out.length} left out`);
  if (shown.length && (again || !shown.includes(current))) await select(shown.includes(current) ? current : shown[0], { focus: false });
}

function move(by, focus) {
  const number = neighbour(by);
  if (number !== null) select(number, { focus });
}

async function start() {
  if (data.folder) {
    say("Reading");
    const { openFolder } = await import("./folder.js");
    source = await openFolder(data, summarize, repeatedShare, say);
    shown = [...source.rows.keys()]; // those of the first file, until all are read
    showList();
    if (shown.length) await select(shown[0], { focus: false });
    await source.rest();
  }
  for (const name of Object.keys(filters)) filter.append(make("option", { value: name }, titleOf(name)));
  showFlags();
  const inList = list.contains(document.activeElement);
  await update({ again: !data.folder });
  if (inList) list.querySelector("[aria-current]")?.focus();
}

document.getElementById("save").addEventListener("click", saveFlags);
const refresh = () => update({ again: true }).catch((error) => { source.shares = undefined; showProblem(error); });
search.addEventListener("input", refresh);
filter.addEventListener("change", refresh);
document.addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const inList = list.contains(event.target);
  if (!by || !(event.altKey || inList) || event.target === filter) return;
  event.preventDefault();
  move(by, inList);
});

const scheme = matchMedia("(prefers-color-scheme: dark)");
isDark = scheme.matches;
scheme.addEventListener("change", () => { isDark = scheme.matches; refresh(); });
start().catch((error) => { say(""); showProblem(error); });
