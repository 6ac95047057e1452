// @ts-check
/** Keys that work anywhere but where somebody types. */

/** @type {Map<string, {what: string, act: () => void}>} */
export const shortcuts = new Map();

let before = "";
let since = 0;

/**
 * `?`, `/`, or two keys with a blank between them: `g o`. Returns what takes it away.
 * @param {string} keys
 * @param {string} what  For the list of keys.
 * @param {() => void} act
 */
export function on(keys, what, act) {
  shortcuts.set(keys, { what, act });
  return () => {
    shortcuts.delete(keys);
  };
}

/** @param {EventTarget | null} target */
const types = (target) => target instanceof HTMLElement && (target.isContentEditable || ["INPUT", "TEXTAREA", "SELECT"].includes(target.tagName));

export function listen() {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || types(event.target) || document.querySelector("dialog[open]")) return;
    const pair = event.timeStamp - since < 1200 ? `${before} ${event.key}` : "";
    const found = shortcuts.get(pair) ?? shortcuts.get(event.key);
    before = event.key;
    since = event.timeStamp;
    if (found) {
      event.preventDefault();
      before = "";
      found.act();
    }
  });
}
