// @ts-check
import { at, has } from "../lib/api.js";
import { date, money, number, percent, seconds } from "../lib/format.js";
import { html } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { Badge, Card, Copyable, Empty, Facts, Failure, Notice, Page, Skeleton, Status } from "../parts/index.js";
import { TONES } from "./requests.js";

/** @typedef {{name: string, start: number, seconds: number}} Phase  `start`: seconds after its arrival. */

const WAITS = ["queue", "job", "batch wait", "engine queue", "limits", "retry", "preempted"];
const COMPUTES = ["compute", "prefill", "denoise", "encode prompt", "gather"];
const DECODES = ["decode", "decode picture"];

/** What kind of time a phase is. @param {string} name */
const kindOf = (name) => (WAITS.includes(name) ? "phase-wait" : COMPUTES.includes(name) ? "phase-compute" : DECODES.includes(name) ? "phase-decode" : "phase-io");

/** Of a row of a table: parts of its time, the widest first seen. @param {{phases: Phase[], seconds: number}} props */
export const Phases = ({ phases, seconds: whole }) => html`
  <span class="phases" role="img" aria-label=${phases.map((each) => `${each.name} ${seconds(each.seconds)}`).join(", ") || "Not known"} title=${phases.map((each) => `${each.name} ${seconds(each.seconds)}`).join("\n")}>
    ${phases.map((each, index) => html`<i key=${index} class=${kindOf(each.name)} style=${{ width: `${(100 * each.seconds) / (whole || 1)}%` }}></i>`)}
  </span>
`;

/** @param {{params: Record<string, string>}} props */
export default function Request({ params }) {
  const id = params.request ?? "";
  const query = useQuery(at("admin", "requests", id));
  return html`
    <${Page} title="Request" name=${`Request ${id}`} note=${html`<${Copyable} text=${id} />`} crumbs=${[{ href: "/ui/requests", text: "Requests" }]}>
      ${query.loading && html`<${Skeleton} height=${320} />`}
      ${query.error && (query.error.status === 404
        ? html`<${Card}><${Empty} icon="search" title="It is not kept any more">The latest requests are kept, the slowest and the failed ones longer. One that still runs is not there yet.<//><//>`
        : html`<${Failure} error=${query.error} retry=${query.refresh} />`)}
      ${query.data && html`<${Details} each=${query.data} />`}
    <//>
  `;
}

/** @param {{each: any}} props */
function Details({ each }) {
  const one = each.request;
  return html`
    ${one.error && html`<${Notice} tone=${one.outcome === "failure" ? "bad" : "warn"}>${one.reason && html`<strong>${one.reason}: </strong>`}${one.error}<//>`}
    <div class="grid">
      <div class="w4">
        <${Card} title="What it was">
          <${Facts} rows=${[
            ["Ended", html`<${Status} tone=${TONES[one.outcome] ?? "idle"}>${one.outcome === "success" ? "answered" : one.outcome}<//> <span class="muted num">${one.status}</span>`],
            ["Time", html`<strong class="num">${seconds(one.seconds)}</strong>${each.median_seconds !== null && html` <span class="muted num">half of its model's take ${seconds(each.median_seconds)} or less</span>`}`],
            ["First piece", one.first_seconds === null ? null : seconds(one.first_seconds)],
            ["Arrived", date(one.arrived)],
            ["Model", one.model ? html`<a href=${at("ui", "models", one.model)}>${one.model}</a>${one.version && `@${one.version}`}` : null],
            ["Door", html`${one.protocol} <span class="mono small muted">${one.path}</span>`],
            ["Kind", one.kind || null],
            ["Tenant", one.tenant ? (has("tenants") ? html`<a href=${at("ui", "tenants", one.tenant)}>${one.tenant}</a>` : one.tenant) : null],
            ["Class", one.qos_class || null],
            ["Rows", one.rows ? number(one.rows) : null],
            ["Tokens", one.tokens_in || one.tokens_out ? `${number(one.tokens_in)} in, ${number(one.tokens_out)} out` : null],
            ["Cost", one.cost ? money(one.cost) : null],
            ["Job", one.job ? html`<a class="mono" href=${at("ui", "jobs", one.job)}>${one.job.slice(0, 18)}…</a>` : null],
            ["Trace", one.trace_id ? html`<${Copyable} text=${one.trace_id} />` : null],
          ]} />
        <//>
      </div>
      <div class="w8 stack">
        <${Card} title="Where the time went">
          <div class="stack">
            <p class="strong break">${each.why}</p>
            <${Waterfall} phases=${one.phases} whole=${one.seconds} shares=${each.shares} />
          </div>
        <//>
      </div>
      <div>
        <${Card} title="What happened" footer=${each.dropped ? `${number(each.dropped)} more steps were too many to keep` : ""}>
          <ol class="events">
            ${each.steps.map((/** @type {any} */ step, /** @type {number} */ index) => html`<li key=${index}><span class="num muted">${seconds(step.at)}</span><span><${Badge}>${step.name}<//></span><span class="break">${step.text}${step.seconds > 0 && html` <span class="muted num">(${seconds(step.seconds)})</span>`}</span></li>`)}
          </ol>
        <//>
      </div>
      ${each.related.length > 0 && html`
        <div>
          <${Card} title="Belongs to it">
            <ul class="stack tight">${each.related.map((/** @type {any} */ other) => html`<li key=${other.id + other.arrived} class="row wrap"><a class="mono" href=${at("ui", "requests", other.id)}>${other.id}</a><span class="muted">${other.protocol} ${other.kind}</span><${Status} tone=${TONES[other.outcome] ?? "idle"}>${other.outcome === "success" ? "answered" : other.outcome}<//><span class="num">${seconds(other.seconds)}</span></li>`)}</ul>
          <//>
        </div>
      `}
    </div>
  `;
}

/** @param {{phases: Phase[], whole: number, shares: {name: string, meaning: string, seconds: number, share: number}[]}} props */
function Waterfall({ phases, whole, shares }) {
  if (!phases.length) return html`<${Empty} icon="clock" title="Nothing was measured">It was answered, or refused, before any room did something for it.<//>`;
  const length = Math.max(whole, ...phases.map((each) => each.start + each.seconds)) || 1;
  const names = [...new Set(phases.map((each) => each.name))];
  return html`
    <ol class="waterfall" aria-label="Phases, in their order">
      ${names.map((name) => {
        const share = shares.find((each) => each.name === name);
        return html`
          <li key=${name}>
            <span class="break" title=${share?.meaning}>${name}</span>
            <span class="lane" aria-hidden="true">${phases.filter((each) => each.name === name).map((each, index) => html`<i key=${index} class=${kindOf(name)} style=${{ left: `${(100 * each.start) / length}%`, width: `${(100 * each.seconds) / length}%` }}></i>`)}</span>
            <span class="num right">${seconds(share?.seconds)}</span>
            <span class="small muted waterfall-why">${share?.meaning}${share && html` <span class="num">(${percent(share.share)})</span>`}</span>
          </li>
        `;
      })}
    </ol>
  `;
}
