// @ts-check
import { at } from "../lib/api.js";
import { ago, money, number, seconds } from "../lib/format.js";
import { html } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { setQuery } from "../lib/router.js";
import { Card, Check, Empty, Field, Page, Segments, Status, Table } from "../parts/index.js";
import { Phases } from "./request.js";

const KINDS = [
  { value: "recent", text: "Latest" },
  { value: "slow", text: "Slowest" },
  { value: "failed", text: "Failed" },
];
/** @type {Record<string, "ok" | "warn" | "bad" | "idle">} */
export const TONES = { success: "ok", refused: "warn", failure: "bad", cancelled: "idle" };

/** @param {{query: URLSearchParams}} props */
export default function Requests({ query }) {
  const kind = query.get("kind") ?? "recent";
  const model = query.get("model") ?? "";
  const all = query.get("all") === "1";
  const found = useQuery("/admin/requests", { query: { kind, model, limit: 200 }, every: 3 });
  const rows = found.data?.requests.filter((/** @type {any} */ each) => all || each.kind || each.model) ?? null;
  const columns = [
    { id: "arrived", label: "Arrived", width: "96px", by: (/** @type {any} */ each) => each.arrived, show: (/** @type {any} */ each) => html`<time title=${new Date(each.arrived * 1000).toISOString()}>${ago(each.arrived)}</time>` },
    { id: "id", label: "Request", show: (/** @type {any} */ each) => html`<a class="mono clip" href=${at("ui", "requests", each.id)}>${each.id}</a>` },
    { id: "model", label: "Model", by: (/** @type {any} */ each) => each.model, show: (/** @type {any} */ each) => html`${each.model || html`<span class="muted">${each.path}</span>`}${each.version && html`<span class="muted">@${each.version}</span>`}` },
    { id: "outcome", label: "Ended", by: (/** @type {any} */ each) => each.outcome, show: (/** @type {any} */ each) => html`<${Status} tone=${TONES[each.outcome] ?? "idle"}>${each.outcome === "success" ? "answered" : each.reason || each.outcome}<//>` },
    { id: "status", label: "Status", num: true, show: (/** @type {any} */ each) => each.status },
    { id: "seconds", label: "Time", num: true, by: (/** @type {any} */ each) => each.seconds, show: (/** @type {any} */ each) => seconds(each.seconds) },
    { id: "phases", label: "Where it went", width: "180px", show: (/** @type {any} */ each) => html`<${Phases} phases=${each.phases ?? []} seconds=${each.seconds} />` },
    { id: "first", label: "First piece", num: true, by: (/** @type {any} */ each) => each.first_seconds, show: (/** @type {any} */ each) => seconds(each.first_seconds) },
    { id: "tokens", label: "Tokens", num: true, by: (/** @type {any} */ each) => (each.tokens_in ?? 0) + (each.tokens_out ?? 0), show: (/** @type {any} */ each) => (each.tokens_in || each.tokens_out ? `${number(each.tokens_in)} + ${number(each.tokens_out)}` : "\u2013") },
    { id: "tenant", label: "Tenant", by: (/** @type {any} */ each) => each.tenant, show: (/** @type {any} */ each) => each.tenant || "\u2013" },
    { id: "cost", label: "Cost", num: true, by: (/** @type {any} */ each) => each.cost, show: (/** @type {any} */ each) => (each.cost ? money(each.cost) : "\u2013") },
  ];
  const nothing = {
    recent: html`<${Empty} icon="clock" title="No request has ended yet">Each one is kept for a while once it has ended, with where its time went.<//>`,
    slow: html`<${Empty} icon="clock" title="No request of a model has ended yet">The slowest of each model are kept for an hour.<//>`,
    failed: html`<${Empty} icon="ok" title="Nothing has failed">Refusals are among the latest.<//>`,
  };
  return html`
    <${Page} title="Requests" note="Where the time of each one went">
      <div class="row wrap between">
        <${Segments} label="Which requests" value=${kind} options=${KINDS} onChange=${(/** @type {string} */ value) => setQuery({ kind: value === "recent" ? null : value })} />
        <${Check} checked=${all} onChange=${(/** @type {boolean} */ on) => setQuery({ all: on ? "1" : null })}>Those too that asked no model<//>
        <div class="filter"><${Field} label="Model" value=${model} placeholder="any" spellcheck=${false} onInput=${(/** @type {string} */ value) => setQuery({ model: value })} /></div>
      </div>
      <${Card} flush label="Requests">
        <${Table} label="Requests" columns=${columns} rows=${rows} loading=${found.loading} error=${found.error} retry=${found.refresh} rowKey=${(/** @type {any} */ each) => each.id + each.arrived} height=${720}
          empty=${model ? html`<${Empty} icon="search" title="None of this model" />` : nothing[/** @type {keyof typeof nothing} */ (kind)]} />
      <//>
    <//>
  `;
}
