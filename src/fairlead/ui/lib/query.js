// @ts-check
/** Reading from the server: `useQuery` for what a page shows, `usePages` for lists that are too long to have whole. */
import { useCallback, useEffect, useRef, useState } from "./html.js";
import { Problem, asQuery, get } from "./api.js";

/**
 * @template T
 * @typedef {object} Answer
 * @property {T | null} data  Null until it is there. The last one stays while the next is on its way, and when that fails.
 * @property {Problem | null} error
 * @property {boolean} loading  Nothing is known yet.
 * @property {number} updated  When data came, in milliseconds since 1970.
 * @property {() => Promise<void>} refresh
 */

/**
 * GET of a path, again every so many seconds while the tab is seen. A null path asks nothing.
 * @template T
 * @param {string | null} path
 * @param {{query?: Record<string, any>, every?: number}} [options]
 * @returns {Answer<T>}
 */
export function useQuery(path, { query, every = 0 } = {}) {
  const url = path === null ? null : path + asQuery(query);
  const [state, setState] = useState(/** @type {{url: string | null, data: any, error: any, updated: number}} */ ({ url: null, data: null, error: null, updated: 0 }));
  const turn = useRef(0);
  const refresh = useCallback(async () => {
    if (url === null) return;
    const mine = ++turn.current;
    try {
      const data = await get(url);
      if (mine === turn.current) setState({ url, data, error: null, updated: Date.now() });
    } catch (error) {
      const problem = error instanceof Problem ? error : new Problem(0, "This page failed", String(error));
      if (mine === turn.current) setState((old) => ({ ...(old.url === url ? old : { data: null, updated: 0 }), url, error: problem }));
    }
  }, [url]);
  useEffect(() => {
    refresh();
    const stop = every ? whileSeen(refresh, every) : () => {};
    return () => {
      turn.current++;
      stop();
    };
  }, [refresh, every]);
  const ours = state.url === url;
  return {
    data: ours ? state.data : null,
    error: ours ? state.error : null,
    loading: url !== null && (!ours || (state.data === null && state.error === null)),
    updated: ours ? state.updated : 0,
    refresh,
  };
}

/**
 * Calls again and again, one at a time, while the tab is seen; at once when it is seen again. Returns what stops it.
 * @param {() => Promise<void>} work
 * @param {number} seconds
 */
export function whileSeen(work, seconds) {
  let timer = 0;
  let stopped = false;
  const next = () => {
    clearTimeout(timer);
    if (!stopped && !document.hidden) timer = setTimeout(once, seconds * 1000);
  };
  const once = async () => {
    await work();
    next();
  };
  const seen = () => (document.hidden ? clearTimeout(timer) : once());
  document.addEventListener("visibilitychange", seen);
  next();
  return () => {
    stopped = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", seen);
  };
}

/**
 * A list read in pieces as it is scrolled: the server takes `offset` and `limit` and answers {total, [field]: [...]}.
 * @param {string} path
 * @param {string} field
 * @param {{query?: Record<string, any>, every?: number, size?: number}} [options]
 */
export function usePages(path, field, { query, every = 0, size = 100 } = {}) {
  const url = path + asQuery(query);
  const [state, setState] = useState(/** @type {{url: string, head: any, rows: Map<number, any>, error: any}} */ ({ url: "", head: null, rows: new Map(), error: null }));
  const wanted = useRef({ url: "", first: 0, last: 0 });
  const asking = useRef(/** @type {Set<string>} */ (new Set()));

  const load = useCallback(
    async (/** @type {number} */ first, /** @type {number} */ last, force = false) => {
      wanted.current = { url, first, last };
      for (let page = Math.floor(first / size); page <= Math.floor(last / size); page++) {
        const name = `${url}#${page}`;
        if (asking.current.has(name) && !force) continue;
        asking.current.add(name);
        try {
          const data = await get(path, { ...query, offset: page * size, limit: size });
          if (wanted.current.url !== url) return;
          setState((old) => {
            const rows = old.url === url ? new Map(old.rows) : new Map();
            data[field].forEach((/** @type {any} */ row, /** @type {number} */ i) => rows.set(page * size + i, row));
            return { url, head: { ...data, [field]: null }, rows, error: null };
          });
        } catch (error) {
          asking.current.delete(name);
          if (wanted.current.url === url) setState((old) => ({ ...(old.url === url ? old : { head: null, rows: new Map() }), url, error }));
        }
      }
    },
    [url, field, size],
  );
  useEffect(() => {
    asking.current.clear();
    load(0, 0);
    return every ? whileSeen(() => load(wanted.current.first, wanted.current.last, true), every) : undefined;
  }, [load, every]);
  return {
    /** What the server says beside the rows, of the last piece that came. */
    head: state.head,
    total: /** @type {number | null} */ (state.head?.total ?? null),
    /** @param {number} index */
    rowAt: (index) => (state.url === url ? (state.rows.get(index) ?? null) : null),
    error: state.error,
    loading: state.head === null && !state.error,
    load,
  };
}
