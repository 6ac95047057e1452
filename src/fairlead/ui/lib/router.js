// @ts-check
/** Where we are. Links are ordinary links; those of /ui stay in this page. */
import { signal } from "./html.js";

/**
 * @typedef {object} Place
 * @property {string} path  As in the address, escaped.
 * @property {URLSearchParams} query
 */

/** @returns {Place} */
const here = () => ({ path: location.pathname, query: new URLSearchParams(location.search) });

export const place = signal(here());

/**
 * @param {string} address  Path and query.
 * @param {{replace?: boolean, keepScroll?: boolean}} [options]
 */
export function go(address, { replace = false, keepScroll = false } = {}) {
  history[replace ? "replaceState" : "pushState"](null, "", address);
  place.value = here();
  if (!keepScroll) scrollTo(0, 0);
}

/**
 * Part of the query, so that an address says all that is seen. Null takes it away.
 * @param {Record<string, string | number | null>} changes
 */
export function setQuery(changes) {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) value === null || value === "" ? query.delete(name) : query.set(name, String(value));
  const text = query.toString();
  go(location.pathname + (text && `?${text}`), { replace: true, keepScroll: true });
}

/**
 * What a pattern such as /ui/models/:model finds in a path; null: it is another one's.
 * @param {string} pattern
 * @param {string} path
 * @returns {Record<string, string> | null}
 */
export function match(pattern, path) {
  const wanted = pattern.split("/");
  const found = path.replace(/\/$/, "").split("/");
  if (wanted.length !== found.length) return null;
  /** @type {Record<string, string>} */
  const params = {};
  for (let i = 0; i < wanted.length; i++) {
    const want = /** @type {string} */ (wanted[i]);
    const have = /** @type {string} */ (found[i]);
    if (want.startsWith(":")) {
      try {
        params[want.slice(1)] = decodeURIComponent(have);
      } catch {
        return null;
      }
    } else if (want !== have) return null;
  }
  return params;
}

/** Lets links be followed here. */
export function follow() {
  addEventListener("popstate", () => (place.value = here()));
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a") : null;
    if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    if (link.origin !== location.origin || !link.pathname.startsWith("/ui") || link.target || link.hasAttribute("download")) return;
    if (link.pathname === location.pathname && link.hash) return;
    event.preventDefault();
    go(link.pathname + link.search);
  });
}
