// @ts-check
import { html } from "../lib/html.js";
import { at, has } from "../lib/api.js";
import { NONE, ago, bytes, duration, money, number, percent, plural, rate, seconds, short } from "../lib/format.js";
import { feed, live, past } from "../lib/live.js";
import { Badge, Card, Chart, Empty, Notice, Page, Sparkline, Stat, Stats, Table } from "../parts/index.js";

export default function Overview() {
  const now = live.value;
  const hour = past.value;
  const totals = now?.totals;
  const times = hour?.at ?? [];
  const series = (/** @type {string} */ name) => hour?.series[name] ?? [];
  const failing = totals && totals.requests ? totals.errors / totals.requests : null;
  return html`
    <${Page} title="Overview" note=${now ? html`${plural(now.models.loaded, "model")} ready, up for ${duration(now.at - now.server.started)}` : "\u00a0"}>
      <${Strip} now=${now} />
      <${Stats} label="Now">
        <${Stat} label="Requests" value=${rate(totals?.requests)} unit="/s" note=${totals?.refused ? `${rate(totals.refused)}/s refused` : "none refused"} />
        <${Stat} label="Errors" value=${percent(failing ?? (totals ? 0 : null))} tone=${failing && failing > 0.01 ? "bad" : ""} note=${totals ? `${rate(totals.errors)}/s` : ""} />
        <${Stat} label="Latency, p99" value=${seconds(totals?.p99)} note=${`p50 ${seconds(totals?.p50)}`} />
        <${Stat} label="Under way" value=${short(totals?.in_flight)} note=${`${number(totals?.waiting)} waiting`} tone=${totals && totals.waiting > 0 ? "warn" : ""} />
        <${Stat} label="Tokens" value=${rate(totals?.tokens)} unit="/s" note=${totals?.kv === null || totals === undefined ? "no KV memory" : `${percent(totals.kv)} of KV memory`} />
        <${Stat} label="Processor" value=${totals ? totals.cpu.toFixed(2) : number(null)} unit="cores" note=${now ? `of ${now.server.cpus}, ${bytes(totals?.rss)}` : ""} />
        <${Stat} label="Cost" value=${money(totals ? totals.cost * 3600 : null)} unit="/h" note="at the present rate" />
      <//>
      <div class="grid">
        <div class="w6"><${Card} title="Requests per second">
          <${Chart} label="Requests per second" at=${times} show=${rate} lines=${[
            { label: "All", values: series("requests"), colour: 1, area: true },
            { label: "Refused", values: series("refused"), colour: 3 },
            { label: "Errors", values: series("errors"), colour: 4 },
          ]} />
        <//></div>
        <div class="w6"><${Card} title="Latency">
          <${Chart} label="Latency" at=${times} show=${seconds} lines=${[
            { label: "p50", values: series("p50"), colour: 1 },
            { label: "p95", values: series("p95"), colour: 2 },
            { label: "p99", values: series("p99"), colour: 3 },
          ]} />
        <//></div>
        <div class="w4"><${Card} title="Under way">
          <${Chart} label="Requests under way" height=${130} at=${times} show=${short} lines=${[
            { label: "Under way", values: series("in_flight"), colour: 1, area: true },
            { label: "Waiting", values: series("waiting"), colour: 3 },
          ]} />
        <//></div>
        <div class="w4"><${Card} title="Tokens per second">
          <${Chart} label="Tokens per second" height=${130} at=${times} show=${rate} lines=${[{ label: "Tokens", values: series("tokens"), colour: 2, area: true }]} />
        <//></div>
        <div class="w4"><${Card} title="Cores busy">
          <${Chart} label="Cores busy" height=${130} at=${times} show=${short} max=${now?.server.cpus} lines=${[{ label: `of ${now?.server.cpus ?? 1}`, values: series("cpu"), colour: 5, area: true }]} />
        <//></div>
        <div class="w8"><${Card} title="Busiest models" actions=${html`<a href="/ui/models">All models</a>`} flush><${Busiest} now=${now} /><//></div>
        <div class="w4"><${Card} title="Why requests fail" actions=${html`<span class="faint small">last hour</span>`} flush><${Reasons} now=${now} /><//></div>
      </div>
    <//>
  `;
}

/** What somebody should look at first. @param {{now: import("../lib/live.js").Snapshot | null}} props */
function Strip({ now }) {
  if (!now) return null;
  return html`
    ${feed.value === "late" && html`<${Notice} tone="warn">The server has said nothing for a while: these numbers are of ${ago(now.at)}.<//>`}
    ${!now.server.ready && html`<${Notice} tone="bad">The server is not ready: load balancers send it nothing.<//>`}
    ${now.alerts.filter((each) => each.state === "firing").map((each) => html`
      <${Notice} key=${each.id} tone=${each.severity === "page" ? "bad" : "warn"} actions=${html`<span class="row">${/^https?:\/\//.test(each.runbook) && html`<a href=${each.runbook} target="_blank" rel="noreferrer">Runbook</a>`}${has("slo") && html`<a href="/ui/slo">Objectives</a>`}</span>`}>
        <span class="strong">${each.alert}</span>: ${each.summary} <span class="muted">(${ago(each.since)})</span>
      <//>
    `)}
    ${now.models.failed > 0 && !now.alerts.some((each) => each.alert === "FairleadModelNotLoaded" && each.state === "firing") && html`<${Notice} tone="warn" actions=${html`<a href="/ui/models?state=failed">Show</a>`}>${plural(now.models.failed, "model")} could not be loaded.<//>`}
  `;
}

/** @param {{now: import("../lib/live.js").Snapshot | null}} props */
function Busiest({ now }) {
  /** @type {import("../parts/table.js").Column<import("../lib/live.js").BusyModel>[]} */
  const columns = [
    { id: "model", label: "Model", by: (each) => each.model, show: (each) => html`<a href=${at("ui", "models", each.model)}>${each.model}</a>` },
    { id: "spark", label: "Trend", width: "112px", show: (each) => html`<${Sparkline} values=${each.spark} label=${`${rate(each.requests)} requests per second`} />` },
    { id: "requests", label: "Req/s", num: true, by: (each) => each.requests, show: (each) => rate(each.requests) },
    { id: "errors", label: "Errors", num: true, by: (each) => each.errors, show: (each) => html`<span class=${each.errors > 0 ? "bad" : "faint"}>${each.requests ? percent(each.errors / each.requests) : "\u2013"}</span>` },
    { id: "p50", label: "p50", num: true, by: (each) => each.p50, show: (each) => seconds(each.p50) },
    { id: "p99", label: "p99", num: true, by: (each) => each.p99, show: (each) => seconds(each.p99) },
    { id: "tokens", label: "Tok/s", num: true, by: (each) => each.tokens, show: (each) => (each.tokens ? rate(each.tokens) : NONE) },
  ];
  return html`<${Table} label="Busiest models" columns=${columns} rows=${now?.busiest ?? null} rowKey=${(/** @type {any} */ each) => each.model} sort="requests" descending height=${420}
    empty=${html`<${Empty} icon="pulse" title="Quiet">No model was asked anything in the last hour. <a href="/ui/models">See what is served</a>.<//>`} />`;
}

/** @param {{now: import("../lib/live.js").Snapshot | null}} props */
function Reasons({ now }) {
  const rows = now?.reasons ?? null;
  if (rows?.length === 0) return html`<${Empty} icon="ok" title="Nothing failed">Neither refused nor failed in the last hour.<//>`;
  const columns = [
    { id: "reason", label: "Reason", by: (/** @type {any} */ each) => each.reason, show: (/** @type {any} */ each) => html`<${Badge} tone=${FAILURES.has(each.reason) ? "bad" : "warn"}>${each.reason}<//>` },
    { id: "rate", label: "Now", num: true, by: (/** @type {any} */ each) => each.rate, show: (/** @type {any} */ each) => (each.rate ? `${rate(each.rate)}/s` : NONE) },
    { id: "hour", label: "Hour", num: true, by: (/** @type {any} */ each) => each.hour, show: (/** @type {any} */ each) => number(each.hour) },
  ];
  return html`<${Table} label="Why requests fail" columns=${columns} rows=${rows} rowKey=${(/** @type {any} */ each) => each.reason} sort="hour" descending height=${420} />`;
}

/** Ours; the others refuse. */
const FAILURES = new Set(["model-error", "replica-died", "upstream-error", "failure", "unavailable"]);
