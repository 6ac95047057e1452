// @ts-check
import { html, useId, useState } from "../lib/html.js";
import { Icon } from "./icons.js";

/**
 * @param {{children?: any, icon?: string, kind?: "" | "primary" | "danger" | "quiet", label?: string, href?: string, type?: string, disabled?: boolean, pressed?: boolean, busy?: boolean, title?: string, onClick?: (event: any) => any}} props
 *   `label`: of a button that is an icon only. `busy`: it works on it. An `onClick` that returns a promise makes it busy by itself.
 */
export function Button({ children, icon, kind = "", label, href, type = "button", disabled = false, pressed, busy = false, title, onClick }) {
  const [working, setWorking] = useState(false);
  const name = `button ${kind} ${children === undefined ? "icon" : ""}`;
  const inside = html`${(icon || busy || working) && html`<${Icon} name=${busy || working ? "busy" : icon} />`}${children}`;
  if (href) return html`<a class=${name} href=${href} aria-label=${label} title=${title ?? label}>${inside}</a>`;
  const act = (/** @type {any} */ event) => {
    const done = onClick?.(event);
    if (!(done instanceof Promise)) return;
    setWorking(true);
    done.finally(() => setWorking(false));
  };
  return html`
    <button class=${name} type=${type} disabled=${disabled || busy || working} aria-label=${label} aria-pressed=${pressed === undefined ? undefined : String(pressed)} title=${title ?? label} onClick=${act}>${inside}</button>
  `;
}

/**
 * A label above what is filled in. `children`: a function of the id that the input must have, or nothing for a plain input.
 * @param {{label: string, hint?: any, error?: string, children?: (id: string) => any, value?: any, onInput?: (value: string) => void, [more: string]: any}} props
 */
export function Field({ label, hint, error, children, value, onInput, ...more }) {
  const id = useId();
  return html`
    <div class="field">
      <label for=${id}>${label}</label>
      ${children ? children(id) : html`<input class="input" id=${id} value=${value} aria-invalid=${error ? "true" : undefined} aria-describedby=${`${id}-hint`} onInput=${(/** @type {any} */ event) => onInput?.(event.currentTarget.value)} ...${more} />`}
      <span id=${`${id}-hint`} class=${error ? "error" : "hint"}>${error || hint}</span>
    </div>
  `;
}

/** @param {{id?: string, value: string, options: (string | {value: string, text: string})[], onChange: (value: string) => void, label?: string}} props */
export const Select = ({ id, value, options, onChange, label }) => html`
  <select class="input" id=${id} aria-label=${label} value=${value} onChange=${(/** @type {any} */ event) => onChange(event.currentTarget.value)}>
    ${options.map((each) => {
      const { value: one, text } = typeof each === "string" ? { value: each, text: each } : each;
      return html`<option key=${one} value=${one} selected=${one === value}>${text}</option>`;
    })}
  </select>
`;

/** @param {{checked: boolean, onChange: (checked: boolean) => void, children?: any}} props */
export const Check = ({ checked, onChange, children }) => html`
  <label class="check"><input type="checkbox" checked=${checked} onChange=${(/** @type {any} */ event) => onChange(event.currentTarget.checked)} />${children}</label>
`;

/** One of a few. @param {{value: string, options: {value: string, text: string}[], onChange: (value: string) => void, label: string}} props */
export const Segments = ({ value, options, onChange, label }) => html`
  <div class="segments" role="group" aria-label=${label}>
    ${options.map((each) => html`<button key=${each.value} type="button" aria-pressed=${String(each.value === value)} onClick=${() => onChange(each.value)}>${each.text}</button>`)}
  </div>
`;

/** What narrows a list down. @param {{value: string, onInput: (value: string) => void, label: string, placeholder?: string}} props */
export const Search = ({ value, onInput, label, placeholder }) => html`
  <div class="search grow">
    <${Icon} name="search" />
    <input class="input" type="search" aria-label=${label} placeholder=${placeholder ?? label} value=${value} onInput=${(/** @type {any} */ event) => onInput(event.currentTarget.value)} />
  </div>
`;

/** @param {{text: string, label?: string}} props */
export function Copy({ text, label = "Copy" }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await copyText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return html`
    <button class="button quiet icon copy" type="button" aria-label=${label} title=${label} onClick=${copy}><${Icon} name=${copied ? "check" : "copy"} size=${14} /></button>
    <span class="hidden" role="status">${copied ? "Copied" : ""}</span>
  `;
}

/** Without a secure context (plain HTTP on another address than loopback) browsers have no clipboard. @param {string} text */
async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A text that people take along: an id, a digest. @param {{text: string, shown?: any}} props */
export const Copyable = ({ text, shown }) => html`<span class="copyable"><span class="mono clip" title=${text}>${shown ?? text}</span><${Copy} text=${text} label=${`Copy ${text}`} /></span>`;

/** @param {{text: string, label?: string, copy?: boolean}} props */
export const Code = ({ text, label = "Code", copy = true }) => html`
  <div class="code"><pre tabindex="0" aria-label=${label}><code>${text}</code></pre>${copy && html`<${Copy} text=${text} />`}</div>
`;
