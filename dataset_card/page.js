"use strict";
// The page shows one example at a time. Every text reaches the document as a text node, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const IGNORED = -100;
const CELL = 5; // width of a unit in CSS pixels
const WAVE = 36, CELLS = 14, GAP = 8; // heights of the waveform, of the units, and of the space between two lines
const SHOWN_TOKENS = 2; // at each end of a run of units, or of the instruction, that is not expanded
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

const startOf = (unit) => unit / data.units_per_second + 1e-9; // a hair more, so that floor() gives this unit

// ---- sound: one recording at a time, decoded whole, so that it starts at a unit exactly

const sound = {
  context: null,
  buffers: new Map(),
  playing: null, // { timeline, source, origin }: second `t` of the recording sounds at context time `origin + t`

  async buffer(position) {
    if (!this.buffers.has(position)) {
      const { audio, seconds } = data.recordings[position];
      const decoded = await this.context.decodeAudioData(decode(audio).buffer);
      this.buffers.set(position, { decoded, lead: decoded.duration - seconds > MP3_DELAY / 2 ? MP3_DELAY : 0 });
    }
    return this.buffers.get(position);
  },

  async play(timeline, from) {
    this.stop();
    this.context ??= new AudioContext();
    const [{ decoded, lead }] = await Promise.all([this.buffer(timeline.turn.recording), this.context.resume()]);
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
  constructor(turn, number) {
    this.turn = turn;
    this.playsOn = false; // true while all turns are played
    this.seconds = 0;
    this.unit = 0;
    const recording = data.recordings[turn.recording];
    this.peaks = recording && decode(recording.peaks);
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.slider = make("div", {
      className: "timeline", role: "slider", tabIndex: 0, "aria-label": `Units of turn ${number + 1}, ${turn.role}`,
      "aria-valuemin": 0, "aria-valuemax": Math.max(0, turn.units.length - 1),
      onclick: (event) => this.clicked(event), onkeydown: (event) => this.pressed(event),
    }, this.canvas);
    this.readout = make("span", { className: "readout" });
    this.button = make("button", { type: "button", className: "button", onclick: () => this.toggle() });
    this.element = make("div", { className: "track" }, this.slider, make("div", { className: "controls" }, ...(recording ? [this.button] : []), this.readout));
    this.element.style.width = `${turn.units.length * CELL}px`;
    this.changed();
    this.moveTo(0);
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  get isPlaying() { return sound.playing?.timeline === this; }

  toggle() {
    this.playsOn = false;
    return this.isPlaying ? sound.stop() : this.play(this.seconds);
  }

  async play(from) {
    if (!this.peaks) return;
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

function showTurn(turn, number) {
  const timeline = new Timeline(turn, number);
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
  const piece = data.pieces[id] ?? `unit ${id - data.first_unit}`;
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
  let folded = part === "frame" ? length : 0;
  while (folded < length && !(example.ids[start + folded] in data.pieces)) folded++;
  const hidden = folded - 2 * SHOWN_TOKENS;
  if (hidden > (part === "frame" ? 8 : 1)) {
    show(0, SHOWN_TOKENS);
    list.append(showFold(example, start + SHOWN_TOKENS, hidden, part === "frame" ? "token" : "unit"));
    show(folded - SHOWN_TOKENS, length);
  } else {
    show(0, length);
  }
  return make("div", { className: "part" },
    make("h4", {}, make("b", {}, data.parts[part]), ` · ${count(length, "token")}${labelled ? `, ${labelled.toLocaleString("en")} labelled` : ""}`), list);
}

function showExample(example) {
  sound.stop();
  const turns = example.turns.map(showTurn);
  const timelines = turns.map(([, timeline]) => timeline);
  timelines.forEach((timeline, i) => { timeline.ended = () => timeline.playsOn && timelines[i + 1]?.playOn(); });
  for (const timeline of timelines) timeline.playOn = () => { timeline.playsOn = true; timeline.play(0); };
  const hasSound = timelines.some((timeline) => timeline.peaks);
  const playAll = make("button", { type: "button", className: "button", onclick: () => timelines[0].playOn() }, "▶ Play all");
  const step = (by, name) => make("button", {
    type: "button", className: "button", disabled: !neighbour(by), onclick: () => select(neighbour(by), { focus: false }),
  }, name);
  const seconds = example.turns.reduce((sum, turn) => sum + turn.seconds, 0);
  document.getElementById("example").replaceChildren(
    make("div", { className: "bar" },
      make("h2", {}, example.id),
      make("p", {}, `${count(example.ids.length, "token")}, ${countLabels(example.labels).toLocaleString("en")} labelled · ${seconds.toFixed(2)} s`),
      make("div", { className: "buttons" }, ...(hasSound ? [playAll] : []), step(-1, "Previous"), step(1, "Next"))),
    ...turns.map(([element]) => element),
    make("section", { "aria-label": "Tokens and labels" },
      make("h3", {}, "Tokens and labels"),
      showParts(example),
      make("p", { className: "key" }, "Each token with its id and its label. The loss counts the highlighted ones; a label of -100 is ignored."),
      ...example.parts.map((run) => showRun(example, run))));
  timelines.forEach((timeline) => timeline.draw());
}

// ---- the list

const search = document.getElementById("search"), filter = document.getElementById("filter"), list = document.getElementById("list");
const sizes = data.examples.map((example) => example.ids.length);
const repetition = data.examples.map((example) => repeatedShare(example.turns.flatMap((turn) => turn.units)));
const texts = data.examples.map((example) =>
  [example.id, ...example.turns.flatMap((turn) => [turn.text, turn.emotion, `speaker ${turn.speaker}`])].join("\n").toLowerCase());

// The examples with the largest (or smallest) values: a tenth of all, at least one.
function extremes(values, sign) {
  const order = values.map((_, i) => i).sort((a, b) => sign * (values[b] - values[a]) || a - b);
  return new Set(order.slice(0, Math.max(1, Math.round(values.length / 10))));
}

const filters = {
  all: ["All examples", new Set(sizes.keys())],
  long: ["The longest tenth", extremes(sizes, 1)],
  short: ["The shortest tenth", extremes(sizes, -1)],
  repeated: ["The tenth with the most repeated units", extremes(repetition, 1)],
  left_out: ["Left out of the split", null],
};

let shown = [], current = 0;

function neighbour(by) {
  const place = shown.indexOf(current);
  return place < 0 ? null : data.examples[shown[place + by]] ?? null;
}

function select(example, { focus }) {
  current = data.examples.indexOf(example);
  for (const button of list.querySelectorAll("button")) {
    if (+button.dataset.example === current) {
      button.setAttribute("aria-current", "true");
      button.scrollIntoView({ block: "nearest" });
      if (focus) button.focus();
    } else button.removeAttribute("aria-current");
  }
  showExample(example);
}

function listItem(i) {
  const example = data.examples[i];
  return make("li", {}, make("button", { type: "button", "data-example": i, onclick: () => select(example, { focus: false }) },
    make("span", { className: "name" }, example.id), make("span", { className: "size" }, count(sizes[i], "token")),
    make("span", { className: "words", dir: "auto" }, example.turns[0].text)));
}

function listLeftOut([name, reason]) {
  return make("li", {}, make("div", { className: "left-out" },
    make("span", { className: "name" }, name), make("span", { className: "size" }, "left out"), make("span", { className: "words", dir: "auto" }, reason)));
}

function update() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (text) => words.every((word) => text.includes(word));
  const [, chosen] = filters[filter.value];
  const leftOut = chosen ? [] : data.left_out.filter((entry) => matches(entry.join("\n").toLowerCase()));
  shown = chosen ? [...chosen].filter((i) => matches(texts[i])).sort((a, b) => a - b) : [];
  list.replaceChildren(...shown.map(listItem), ...leftOut.map(listLeftOut));
  document.getElementById("found").textContent = chosen
    ? `${count(shown.length, "example")} of ${data.examples.length}` : `${leftOut.length} of ${data.left_out.length} left out`;
  if (shown.length) select(data.examples[shown.includes(current) ? current : shown[0]], { focus: false });
}

function move(by, focus) {
  const example = neighbour(by);
  if (example) select(example, { focus });
}

for (const [name, [title, chosen]] of Object.entries(filters)) {
  filter.append(make("option", { value: name }, `${title} (${chosen ? chosen.size : data.left_out.length})`));
}
search.addEventListener("input", update);
filter.addEventListener("change", update);
document.addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const inList = list.contains(event.target);
  if (!by || !(event.altKey || inList) || event.target === filter) return;
  event.preventDefault();
  move(by, inList);
});

const scheme = matchMedia("(prefers-color-scheme: dark)");
isDark = scheme.matches;
scheme.addEventListener("change", () => { isDark = scheme.matches; update(); });
update();
