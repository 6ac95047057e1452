// @ts-check
/** What happens now: one snapshot every two seconds, and the last hour of them. All pages share one stream. */
import { signal } from "./html.js";
import { get, session, whoLooks } from "./api.js";

/**
 * @typedef {object} Totals  Everything per second unless it says otherwise; null: nobody can say.
 * @property {number} requests
 * @property {number} errors
 * @property {number} refused
 * @property {number | null} p50  Seconds.
 * @property {number | null} p95
 * @property {number | null} p99
 * @property {number} in_flight  Now.
 * @property {number} waiting  Now.
 * @property {number} tokens
 * @property {number} cost
 * @property {number | null} kv  Part of the KV memory that is used.
 * @property {number} cpu  Cores of this machine that the server and its replicas keep busy.
 * @property {number} rss  Bytes.
 */
/**
 * @typedef {object} BusyModel
 * @property {string} model
 * @property {number} requests
 * @property {number} errors
 * @property {number | null} p50
 * @property {number | null} p95
 * @property {number | null} p99
 * @property {number} in_flight
 * @property {number} waiting
 * @property {number} tokens
 * @property {number | null} kv
 * @property {(number | null)[]} spark  Requests per second, the newest last.
 */
/**
 * @typedef {object} Snapshot
 * @property {number} at  Seconds since 1970.
 * @property {{version: string, started: number, ready: boolean, stopping: boolean, cpus: number}} server
 * @property {{loaded: number, known: number, failed: number}} models
 * @property {Totals} totals
 * @property {{reason: string, rate: number, hour: number}[]} reasons  Why requests failed or were refused.
 * @property {BusyModel[]} busiest
 * @property {any[]} alerts
 */
/**
 * @typedef {object} History
 * @property {number} step  Seconds.
 * @property {number[]} at
 * @property {Record<string, (number | null)[]>} series  By the names of Totals.
 */

/** @type {import("@preact/signals").Signal<Snapshot | null>} */
export const live = signal(/** @type {Snapshot | null} */ (null));
/** @type {import("@preact/signals").Signal<History | null>} */
export const past = signal(/** @type {History | null} */ (null));
/** connecting, live, late (the last numbers are old), off. */
export const feed = signal("off");

const SILENT_SECONDS = 8;
const RETRY_SECONDS = 3;

/** @type {EventSource | null} */
let source = null;
let heard = 0;
let timer = 0;

/** Begins, once somebody may see it. */
export function watch() {
  if (source || document.hidden || !session.value || session.value.required) return;
  feed.value = live.value ? "late" : "connecting";
  source = new EventSource("/ui/live");
  heard = performance.now();
  source.onmessage = (event) => {
    heard = performance.now();
    feed.value = "live";
    live.value = JSON.parse(event.data);
    extend(/** @type {Snapshot} */ (live.value));
  };
  source.addEventListener("beat", () => (heard = performance.now()));
  source.addEventListener("over", again);
  clearInterval(timer);
  timer = setInterval(check, 1000);
  readPast();
}

/** Ends: for a tab that nobody sees, and after a logout. */
export function rest() {
  source?.close();
  source = null;
  clearInterval(timer);
  feed.value = "off";
}

export function followVisibility() {
  document.addEventListener("visibilitychange", () => (document.hidden ? rest() : watch()));
}

function check() {
  const silent = (performance.now() - heard) / 1000;
  if (silent > SILENT_SECONDS) feed.value = "late";
  if (source?.readyState === EventSource.CLOSED || silent > SILENT_SECONDS + RETRY_SECONDS) again();
}

/** Begin anew in a while: after asking whether we still may, for the stream does not say why it broke. */
function again() {
  rest();
  feed.value = "late";
  timer = setTimeout(() => whoLooks().then(watch, again), RETRY_SECONDS * 1000);
}

async function readPast() {
  try {
    past.value = await get("/ui/history");
  } catch {
    // the live numbers tell it
  }
}

/** The hour goes on with what is live, in its own steps. @param {Snapshot} now */
function extend(now) {
  const known = past.value;
  const last = known?.at.at(-1);
  if (!known || (last !== undefined && now.at - last < known.step)) return;
  const from = known.at.findIndex((at) => at > now.at - 3600);
  const cut = from < 0 ? known.at.length : from;
  /** @type {Record<string, (number | null)[]>} */
  const series = {};
  for (const [name, values] of Object.entries(known.series)) {
    series[name] = [...values.slice(cut), /** @type {any} */ (now.totals)[name] ?? null];
  }
  past.value = { step: known.step, at: [...known.at.slice(cut), now.at], series };
}
