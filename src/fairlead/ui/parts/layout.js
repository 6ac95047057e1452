// @ts-check
import { html, useEffect } from "../lib/html.js";
import { Problem } from "../lib/api.js";
import { Icon } from "./icons.js";
import { Button } from "./controls.js";

/**
 * A page: its heading, what can be done, and what is in it.
 * @param {{title: any, note?: any, crumbs?: {href: string, text: string}[], actions?: any, name?: string, children?: any}} props  `name`: for the window, where `title` is no text.
 */
export function Page({ title, note, crumbs = [], actions, name, children }) {
  const text = name ?? (typeof title === "string" ? title : "");
  useEffect(() => {
    document.title = text ? `${text} \u00b7 Fairlead` : "Fairlead";
  }, [text]);
  return html`
    <div class="page">
      <header>
        <div class="titles">
          ${crumbs.length > 0 && html`<nav class="crumbs" aria-label="Where this is">${crumbs.map((each) => html`<a href=${each.href}>${each.text}</a> / `)}</nav>`}
          <h1>${title}</h1>
          ${note && html`<p>${note}</p>`}
        </div>
        ${actions && html`<div class="actions">${actions}</div>`}
      </header>
      <div class="stack">${children}</div>
    </div>
  `;
}

/**
 * @param {{title?: any, actions?: any, footer?: any, flush?: boolean, class?: string, label?: string, children?: any}} props
 *   `flush`: a table or a list, up to the edges.
 */
export const Card = ({ title, actions, footer, flush = false, class: more = "", label, children }) => html`
  <section class=${`card ${more}`} aria-label=${label ?? (typeof title === "string" ? title : undefined)}>
    ${(title || actions) && html`<header><h2>${title}</h2>${actions}</header>`}
    <div class=${flush ? "flush" : "body"}>${children}</div>
    ${footer && html`<footer>${footer}</footer>`}
  </section>
`;

/** Nothing is here, and why that is well. @param {{icon?: string, title: string, children?: any}} props */
export const Empty = ({ icon = "box", title, children }) => html`
  <div class="empty"><${Icon} name=${icon} size=${24} /><strong>${title}</strong>${children && html`<p>${children}</p>`}</div>
`;

/**
 * What went wrong, in place of what was to be shown.
 * @param {{error: any, retry?: () => void}} props
 */
export function Failure({ error, retry }) {
  const problem = error instanceof Problem ? error : new Problem(0, "This did not work", String(error?.message ?? error));
  return html`
    <div class="empty" role="alert">
      <${Icon} name=${problem.status === 404 ? "search" : "warn"} size=${24} />
      <strong>${problem.title}</strong>
      ${problem.detail && problem.detail !== problem.title && html`<p>${problem.detail}</p>`}
      ${retry && html`<${Button} icon="refresh" onClick=${retry}>Try again<//>`}
    </div>
  `;
}

/**
 * What a query answers: a skeleton, the failure, or the children, a function of the data. A failure after data says so above it.
 * @param {{query: import("../lib/query.js").Answer<any>, children: (data: any) => any, height?: number, lines?: number}} props
 */
export function Loaded({ query, children, height = 160, lines = 4 }) {
  if (query.data !== null) {
    return html`
      ${query.error && html`<${Notice} tone="warn">What you see is old: ${query.error.message}<//>`}
      ${children(query.data)}
    `;
  }
  if (query.error) return html`<${Failure} error=${query.error} retry=${query.refresh} />`;
  return html`<${Skeleton} height=${height} lines=${lines} />`;
}

/** @param {{height?: number, lines?: number}} props */
export const Skeleton = ({ height = 160, lines = 4 }) => html`
  <div class="stack tight" aria-busy="true" style=${{ minHeight: `${height}px`, padding: "var(--s4)" }}>
    <span class="hidden">Loading</span>
    ${Array.from({ length: lines }, (_, i) => html`<span class="skeleton" key=${i} style=${{ width: `${[92, 78, 85, 60][i % 4]}%` }}></span>`)}
  </div>
`;

/** @param {{tone?: "info" | "ok" | "warn" | "bad", children?: any, actions?: any}} props */
export const Notice = ({ tone = "info", children, actions }) => html`
  <div class=${`notice ${tone}`} role=${tone === "bad" ? "alert" : "status"}><${Icon} name=${tone} /><div>${children}</div>${actions}</div>
`;

/** Numbers side by side: children are `Stat`s. @param {{children?: any, label: string}} props */
export const Stats = ({ children, label }) => html`<dl class="stats" aria-label=${label}>${children}</dl>`;

/** @param {{label: string, value: any, unit?: string, note?: any, tone?: string, title?: string}} props */
export const Stat = ({ label, value, unit, note, tone = "", title }) => html`
  <div class="stat" title=${title}>
    <dt>${label}</dt>
    <dd class=${tone}>${value}${unit && html`<small>${unit}</small>`}</dd>
    <dd class="note">${note}</dd>
  </div>
`;

/** @param {{rows: [string, any][]}} props  Those whose value is null or undefined are left out. */
export const Facts = ({ rows }) => html`
  <dl class="facts">
    ${rows.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => html`<dt key=${name}>${name}</dt><dd>${value}</dd>`)}
  </dl>
`;

const ICONS = /** @type {Record<string, string>} */ ({ ok: "ok", warn: "warn", bad: "bad", info: "info", idle: "idle", busy: "busy" });

/** How something is: colour, sign and words. @param {{tone: "ok" | "warn" | "bad" | "info" | "idle" | "busy", children?: any}} props */
export const Status = ({ tone, children }) => html`<span class=${`status ${tone === "busy" ? "info" : tone}`}><${Icon} name=${ICONS[tone]} size=${14} />${children}</span>`;

/** @param {{tone?: "" | "ok" | "warn" | "bad" | "info" | "accent", children?: any, title?: string}} props */
export const Badge = ({ tone = "", children, title }) => html`<span class=${`badge ${tone}`} title=${title}>${children}</span>`;

/** A part of a whole, 0 to 1. @param {{value: number | null, label: string, tone?: string}} props */
export const Meter = ({ value, label, tone = "" }) => html`
  <span class=${`meter ${tone}`} role="meter" aria-label=${label} aria-valuemin="0" aria-valuemax="100" aria-valuenow=${Math.round((value ?? 0) * 100)}>
    <span style=${{ width: `${Math.min(Math.max(value ?? 0, 0), 1) * 100}%` }}></span>
  </span>
`;

/** @param {{tabs: {id: string, text: any}[], chosen: string, onChoose: (id: string) => void, label: string}} props  What is beneath has role "tabpanel". */
export function Tabs({ tabs, chosen, onChoose, label }) {
  const move = (/** @type {KeyboardEvent} */ event) => {
    const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (!step) return;
    const next = tabs[(tabs.findIndex((each) => each.id === chosen) + step + tabs.length) % tabs.length];
    if (!next) return;
    event.preventDefault();
    onChoose(next.id);
    /** @type {HTMLElement | null} */ (/** @type {HTMLElement} */ (event.currentTarget).querySelector(`[data-id="${CSS.escape(next.id)}"]`))?.focus();
  };
  return html`
    <div class="tabs" role="tablist" aria-label=${label} onKeyDown=${move}>
      ${tabs.map((each) => html`
        <button key=${each.id} role="tab" type="button" data-id=${each.id} aria-selected=${String(each.id === chosen)} tabindex=${each.id === chosen ? 0 : -1} onClick=${() => onChoose(each.id)}>${each.text}</button>
      `)}
    </div>
  `;
}
