// The rows of a dataset folder, read from its Parquet files when the page needs them. hyparquet 1.33.0 (MIT) is as on npm.
import { asyncBufferFromUrl, cachedAsyncBuffer, parquetMetadataAsync, parquetReadObjects } from "./hyparquet/src/index.js";

const WHOLE = 1 << 20; // bytes; a smaller file is fetched once and kept, of a larger one the ranges that are needed
const FOOTER = 1 << 15; // bytes at the end of a file, where its metadata is; more are fetched if it is longer
const AT_ONCE = 6; // files that are read at a time
const ROLES = ["user", "agent"], SHOWN = ["speaker", "text", "emotion"];
const RATE = 16000, PEAKS_PER_UNIT = 2;

const perTurn = (...names) => ROLES.flatMap((role) => names.map((name) => `${role}_${name}`));
const asList = (value) => (Array.isArray(value) || ArrayBuffer.isView(value) ? Array.from(value) : [value]);

class ParquetFile {
  // `start` is the number of its first row in the split.
  constructor(base, [name, byteLength, start]) { Object.assign(this, { url: base + name.split("/").map(encodeURIComponent).join("/"), byteLength, start }); }

  open() {
    this.opened ??= (async () => {
      const remote = await asyncBufferFromUrl({ url: this.url, byteLength: this.byteLength });
      const file = this.byteLength < WHOLE ? cachedAsyncBuffer(remote, { minSize: WHOLE }) : remote;
      return { file, metadata: await parquetMetadataAsync(file, { initialFetchSize: FOOTER }) };
    })();
    return this.opened;
  }

  // All rows, or one; all columns, or those of these names that the file has.
  async read({ columns, row, ...more } = {}) {
    const { file, metadata } = await this.open();
    const has = new Set(metadata.schema.map(({ name }) => name));
    const range = row === undefined ? {} : { rowStart: row, rowEnd: row + 1, useOffsetIndex: true };
    return parquetReadObjects({ file, metadata, columns: columns?.filter((name) => has.has(name)), ...range, ...more });
  }
}

// The rows of all files, in no order of the files; `each` is called with the rows of a file and the file.
async function readAll(files, columns, each, progress) {
  let next = 0, done = 0;
  const work = async () => {
    while (next < files.length) {
      const file = files[next++];
      each(await file.read({ columns }), file);
      progress?.(`Reading file ${++done} of ${files.length}`);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
}

// The turns of a row as the page shows them, with the columns that it has.
function listTurns(row, names, leftOut = []) {
  const lists = Array.isArray(row.user_text);
  const exchanges = lists ? row.user_text.length : 1;
  return Array.from({ length: 2 * exchanges }, (_, i) => {
    const role = ROLES[i % 2], turn = { role, left_out: leftOut[role] };
    for (const name of names) turn[name] = lists ? row[`${role}_${name}`][i >> 1] : row[`${role}_${name}`];
    return turn;
  });
}

// Units with one for each frame, where runs of equal units are one unit with its duration.
const expand = (units, durations) => (durations ? asList(units).flatMap((unit, i) => Array(durations[i]).fill(unit)) : asList(units));

// The runs of tokens of one part, as `find_parts` in template/parts.py.
export function findParts(ids, { names, ends, instruction, exchange, newline_after_speech, chat }) {
  const parts = chat ? findPartsOfChat(ids, chat) : [];
  for (let i = 0, end = -instruction; !chat && i < ids.length; i++) {
    const part = end < 0 ? names[0] : names[exchange[end % exchange.length]];
    parts.push(ids[i] === newline_after_speech && part.endsWith("_units") ? names[0] : part);
    end += ends.includes(ids[i]);
  }
  const runs = [];
  parts.forEach((part, i) => (runs.at(-1)?.[0] === part ? runs.at(-1)[2]++ : runs.push([part, i, 1])));
  return runs;
}

function findPartsOfChat(ids, { stop_id, stops: [one, two], places }) {
  const number = 1 + Math.floor((ids.filter((id) => id === stop_id).length - one) / (two - one));
  const parts = Array(ids.length).fill("frame");
  for (let position = 0, end = 0; position < number; position++) {
    const isFirst = position === 0, isLast = position === number - 1;
    const pieces = places[isFirst ? (isLast ? 0 : 1) : isLast ? 3 : 2];
    pieces.forEach(([part, fixed], i) => {
      const start = end, next = pieces[i + 1]?.[1];
      if (fixed) end += fixed.length;
      else if (next) end = ids.indexOf(next[0], start) < 0 ? ids.length : ids.indexOf(next[0], start);
      parts.fill(part, start, end);
    });
  }
  return parts;
}

// The largest magnitude of every half of a unit, as `find_peaks` in folder/page.py.
function findPeaks(decoded, unitsPerSecond) {
  const samples = decoded.getChannelData(0), step = RATE / (PEAKS_PER_UNIT * unitsPerSecond);
  const loud = Array.from({ length: Math.ceil(samples.length / step) }, (_, i) =>
    samples.subarray(Math.floor(i * step), Math.floor((i + 1) * step)).reduce((most, sample) => Math.max(most, Math.abs(sample)), 0));
  const most = Math.max(1e-9, ...loud);
  return Uint8Array.from(loud, (peak) => Math.round((peak / most) * 255));
}

export async function openFolder(data, summarize, repeatedShare, progress) {
  const { base, corpus, history, layout } = data.folder;
  const files = data.folder.files.map((file) => new ParquetFile(base, file));
  const recordings = data.folder.recordings.map((file) => new ParquetFile(base, file));
  if (base) {
    const response = await fetch(`${base}counts.json`);
    if (!response.ok) throw new Error(`${base} cannot be read (${response.status}): the dataset must be public`);
    if ((await response.json()).key !== data.key) throw new Error("The dataset was pushed again since this page was written: write the page again.");
  }
  const leftOut = Object.fromEntries(ROLES.map((role) => [role, ["text", "units"].filter((name) => !(`${role}_${name}` in data.parts))]));
  const rows = [], places = [];
  const list = (files, progress) => readAll(files, ["id", "length", ...perTurn(...SHOWN)], (found, file) => found.forEach((row, i) => {
    rows[file.start + i] = summarize(row.id, row.length, listTurns(row, SHOWN));
    places[file.start + i] = [file, i];
  }), progress);
  await list(files.slice(0, 1));
  const rest = () => list(files.slice(1), progress);

  async function example(number) {
    const [file, place] = places[number];
    const [row] = await file.read({ row: place });
    const turns = listTurns(row, [...SHOWN, "units", "seconds", ...("user_durations" in row ? ["durations"] : [])], leftOut);
    turns.forEach((turn, i) => {
      turn.units = expand(turn.units, turn.durations);
      turn.number = row.turn - (history ? turns.length - 2 : 0) + i;
    });
    const ids = asList(row.input_ids);
    return { id: row.id, dialog: row.dialog_id, turn: row.turn, turns, ids, labels: asList(row.labels), parts: findParts(ids, layout) };
  }

  // The share of repeated units of every row.
  async function repetition(progress) {
    const shares = [];
    await readAll(files, ["user_text", ...perTurn("units", "durations")], (found, { start }) => found.forEach((row, i) => {
      const names = "user_durations" in row ? ["units", "durations"] : ["units"];
      shares[start + i] = repeatedShare(listTurns(row, names).flatMap((turn) => expand(turn.units, turn.durations)));
    }), progress);
    return shares;
  }

  let kept = null; // the place of each recording, by dialog and turn
  async function findKept(example, turn) {
    kept ??= (async () => {
      const found = new Map();
      await readAll(recordings, ["dialog", "turn"], (list, file) => list.forEach((row, i) => found.set(`${row.dialog} ${row.turn}`, [file, i])));
      return found;
    })();
    const [file, row] = (await kept).get(`${example.dialog} ${turn.number}`) ?? [];
    const [found] = file ? await file.read({ columns: ["audio"], row, utf8: false }) : [];
    if (!found?.audio) return null;
    const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(found.audio.bytes.slice().buffer);
    return { decoded, peaks: findPeaks(decoded, data.units_per_second), seconds: turn.seconds };
  }

  function fetchFromCorpus(example) {
    example.recordings ??= (async () => {
      const query = new URLSearchParams({ split: corpus, dialog: example.dialog, turn: example.turn, turns: example.turns.length });
      const response = await fetch(`recordings?${query}`);
      if (!response.ok) throw new Error(await response.text());
      return response.json();
    })();
    return example.recordings;
  }

  const recording = corpus !== null
    ? async (example, number) => (await fetchFromCorpus(example))[number] ?? null
    : recordings.length ? (example, number) => findKept(example, example.turns[number]) : null;
  return { rows, rest, example, repetition, recording, isLocal: !base };
}
