// @ts-check
import { html, signal, useEffect, useId, useRef, useState } from "../lib/html.js";
import { Problem } from "../lib/api.js";
import { Button, Field } from "./controls.js";
import { Icon } from "./icons.js";

/**
 * @typedef {object} Question
 * @property {string} title  What happens, by name: "Abort the rollout of fraud@7?"
 * @property {any} [body]  What follows from it.
 * @property {string} action  The verb on the button: "Abort".
 * @property {boolean} [danger]
 * @property {string} [reason]  Label of a line for why; it is handed to `act`.
 * @property {string} [type]  What must be typed to go on, for what cannot be taken back.
 * @property {(reason: string) => Promise<any>} act  A Problem is shown, and the dialog stays.
 */

/** @type {import("@preact/signals").Signal<(Question & {done: (did: boolean) => void}) | null>} */
const asked = signal(/** @type {any} */ (null));

/** Ask before something is done. Whether it was. @param {Question} question @returns {Promise<boolean>} */
export const confirm = (question) => new Promise((done) => (asked.value = { ...question, done }));

/** @param {{open: boolean, onClose: () => void, title: string, wide?: boolean, children?: any}} props  The children are drawn while it is open. */
export function Dialog({ open, onClose, title, wide = false, children }) {
  const ref = useRef(/** @type {any} */ (null));
  const id = useId();
  useEffect(() => {
    if (open && !ref.current?.open) ref.current?.showModal();
    if (!open && ref.current?.open) ref.current.close();
  }, [open]);
  return html`
    <dialog ref=${ref} class=${wide ? "wide" : ""} aria-labelledby=${id} onClose=${onClose} onClick=${(/** @type {any} */ event) => event.target === ref.current && onClose()}>
      ${open && html`<div class="inside"><h2 id=${id}>${title}</h2>${children}</div>`}
    </dialog>
  `;
}

/** Drawn once, by the shell. */
export function Questions() {
  const question = asked.value;
  const close = () => {
    question?.done(false);
    asked.value = null;
  };
  return html`<${Dialog} open=${question !== null} title=${question?.title ?? ""} onClose=${close}>${question && html`<${Answering} question=${question} close=${close} />`}<//>`;
}

/** @param {{question: Question & {done: (did: boolean) => void}, close: () => void}} props */
function Answering({ question, close }) {
  const [reason, setReason] = useState("");
  const [typed, setTyped] = useState("");
  const [failed, setFailed] = useState("");
  const [busy, setBusy] = useState(false);
  const act = async (/** @type {any} */ event) => {
    event.preventDefault();
    setBusy(true);
    setFailed("");
    try {
      await question.act(reason);
      question.done(true);
      asked.value = null;
    } catch (error) {
      setFailed(error instanceof Problem ? error.message : String(error));
      setBusy(false);
    }
  };
  return html`
    <form class="stack" onSubmit=${act}>
      ${question.body && html`<div class="muted break">${question.body}</div>`}
      ${question.reason && html`<${Field} label=${question.reason} value=${reason} onInput=${setReason} maxlength="1000" autofocus />`}
      ${question.type && html`<${Field} label=${`Type ${question.type} to go on`} value=${typed} onInput=${setTyped} autocomplete="off" spellcheck=${false} />`}
      ${failed && html`<div class="notice bad" role="alert"><${Icon} name="bad" /><div>${failed}</div></div>`}
      <footer>
        <${Button} onClick=${close}>Cancel<//>
        <${Button} type="submit" kind=${question.danger ? "danger" : "primary"} busy=${busy} disabled=${Boolean(question.type) && typed !== question.type}>${question.action}<//>
      </footer>
    </form>
  `;
}

/** @type {import("@preact/signals").Signal<{id: number, tone: string, text: string}[]>} */
const toasts = signal(/** @type {any[]} */ ([]));
let next = 0;

/** Says what happened, for a moment. @param {string} text @param {"ok" | "warn" | "bad" | "info"} [tone] */
export function toast(text, tone = "ok") {
  const id = ++next;
  toasts.value = [...toasts.value.slice(-3), { id, tone, text }];
  setTimeout(() => (toasts.value = toasts.value.filter((each) => each.id !== id)), tone === "bad" ? 10000 : 5000);
}

/** Does something that may fail, and says so in a toast. @param {() => Promise<any>} work @param {string} [done] @returns {Promise<boolean>} */
export async function attempt(work, done) {
  try {
    await work();
    if (done) toast(done);
    return true;
  } catch (error) {
    toast(error instanceof Problem ? `${error.title}: ${error.message}` : String(error), "bad");
    return false;
  }
}

export const Toasts = () => html`
  <div class="toasts" role="status" aria-live="polite">
    ${toasts.value.map((each) => html`<div class="toast" key=${each.id}><span class=${each.tone}><${Icon} name=${each.tone} /></span><div>${each.text}</div></div>`)}
  </div>
`;
