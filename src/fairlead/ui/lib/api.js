// @ts-check
/** The server. Every page asks it through here, so that each request has the session's token and each error one shape. */
import { signal } from "./html.js";

/**
 * @typedef {object} Session
 * @property {boolean} required  Somebody must log in before anything is told.
 * @property {string} who  Id of the key; "" for anyone on an open server.
 * @property {string[]} scopes
 * @property {string} csrf
 * @property {string} tenant
 * @property {string} version  Of the server.
 * @property {string[]} features  Parts of the administration that this server has: see `has`.
 */

/** Who looks; null: not known yet. @type {import("@preact/signals").Signal<Session | null>} */
export const session = signal(/** @type {Session | null} */ (null));

/** An answer that is none. `status` 0: the server did not answer. */
export class Problem extends Error {
  /**
   * @param {number} status
   * @param {string} title
   * @param {string} detail
   * @param {{field: string, detail: string}[]} [errors]
   * @param {any} [body]
   */
  constructor(status, title, detail, errors = [], body = null) {
    super(detail || title);
    this.status = status;
    this.title = title;
    this.detail = detail;
    this.errors = errors;
    /** As the server said it, in the shape of its protocol; null where it said nothing. */
    this.body = body;
  }
}

/**
 * @typedef {object} Options
 * @property {Record<string, string | number | boolean | null | undefined>} [query]  Null and undefined are left out.
 * @property {any} [body]  Becomes JSON, unless it is a Blob, a FormData, an ArrayBuffer or a view of one.
 * @property {Record<string, string>} [headers]
 * @property {AbortSignal} [signal]
 */

/**
 * The bare answer, which may be an error's.
 * @param {string} method
 * @param {string} path
 * @param {Options} [options]
 * @returns {Promise<Response>}
 */
export async function send(method, path, { query, body, headers = {}, signal: abort } = {}) {
  const plain = body === undefined || body instanceof Blob || body instanceof FormData || body instanceof ArrayBuffer || ArrayBuffer.isView(body);
  const csrf = session.value?.csrf;
  try {
    return await fetch(path + asQuery(query), {
      method,
      signal: abort,
      credentials: "same-origin",
      headers: {
        Accept: "application/json",
        ...(plain ? {} : { "Content-Type": "application/json" }),
        ...(csrf && method !== "GET" ? { "x-fairlead-csrf": csrf } : {}),
        ...headers,
      },
      body: /** @type {any} */ (plain ? body : JSON.stringify(body)),
    });
  } catch (error) {
    if (abort?.aborted) throw error;
    throw new Problem(0, "The server does not answer", "It may be restarting, or this machine is offline.");
  }
}

/**
 * The JSON of an answer. Throws a Problem.
 * @param {string} method
 * @param {string} path
 * @param {Options} [options]
 * @returns {Promise<any>}
 */
export async function ask(method, path, options) {
  const answer = await send(method, path, options);
  if (!answer.ok) throw await problemOf(answer);
  return answer.status === 204 ? null : answer.json();
}

/** @param {string} path @param {Options["query"]} [query] @param {AbortSignal} [abort] */
export const get = (path, query, abort) => ask("GET", path, { query, signal: abort });
/** @param {string} path @param {any} [body] */
export const post = (path, body) => ask("POST", path, { body });
/** @param {string} path @param {any} [body] */
export const put = (path, body) => ask("PUT", path, { body });
/** @param {string} path @param {any} [body] */
export const patch = (path, body) => ask("PATCH", path, { body });
/** @param {string} path */
export const del = (path) => ask("DELETE", path);

/**
 * What went wrong, whichever protocol's shape it has. A session that has ended asks for a login.
 * @param {Response} answer
 * @returns {Promise<Problem>}
 */
export async function problemOf(answer) {
  if (answer.status === 401 && session.value?.who) session.value = { ...session.value, required: true, who: "" };
  /** @type {any} */
  let body = null;
  try {
    body = await answer.json();
  } catch {
    // not ours: the status has to do
  }
  const error = body?.error;
  const detail = body?.detail ?? (typeof error === "string" ? error : error?.message) ?? "";
  return new Problem(answer.status, body?.title ?? `${answer.status} ${answer.statusText}`.trim(), String(detail), body?.errors ?? [], body);
}

/**
 * Server-sent events of any method (EventSource can only GET). Ends with the answer, or when `signal` aborts. Throws a Problem.
 * @param {string} path
 * @param {Options & {method?: string}} options
 * @returns {AsyncGenerator<{event: string, data: string, id: string}>}
 */
export async function* events(path, { method = "POST", ...options }) {
  const answer = await send(method, path, { ...options, headers: { Accept: "text/event-stream", ...options.headers } });
  if (!answer.ok || !answer.body) throw await problemOf(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r\n", "\n");
      for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
        const found = eventOf(rest.slice(0, end));
        rest = rest.slice(end + 2);
        if (found) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** @param {string} block */
function eventOf(block) {
  const data = [];
  let event = "message";
  let id = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    else if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("id:")) id = line.slice(3).trim();
  }
  return data.length ? { event, data: data.join("\n"), id } : null;
}

/** @param {Options["query"]} [query] */
export function asQuery(query) {
  const pairs = new URLSearchParams();
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value !== null && value !== undefined && value !== "") pairs.set(name, String(value));
  }
  const text = pairs.toString();
  return text && `?${text}`;
}

/**
 * A path from its segments, each escaped: at("admin", "models", name).
 * @param {...(string | number)} segments
 */
export const at = (...segments) => "/" + segments.map((each) => encodeURIComponent(String(each))).join("/");

/** Whether this server has a part of the administration. @param {string} feature  models, rollouts, tenants, usage, audit, config, replicas, slo, requests, ... */
export const has = (feature) => session.value?.features.includes(feature) ?? false;

/** Who looks, asked of the server. */
export async function whoLooks() {
  session.value = await get("/ui/session");
}

/** @param {string} key */
export async function login(key) {
  session.value = await ask("POST", "/ui/login", { body: { key } });
}

export async function logout() {
  await post("/ui/logout", {});
  await whoLooks();
}
