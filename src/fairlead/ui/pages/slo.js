// @ts-check
import { at, has, post } from "../lib/api.js";
import { ago, bytes, date, duration, number, percent, seconds, short } from "../lib/format.js";
import { html } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { Badge, Button, Card, Copyable, Empty, Loaded, Meter, Notice, Page, Status, Table, confirm } from "../parts/index.js";

/** @type {Record<string, string>} */
const KINDS = { availability: "Availability", latency: "Latency", time_to_first_token: "Time to first token", inter_token: "Time between tokens" };
const FAST = 14.4;
const SLOW = 1;

/** What is promised, in a sentence. @param {any} each */
const promise = (each) =>
  each.kind === "availability"
    ? `${percent(each.target, 3)} of requests are answered`
    : `${percent(each.target, 3)} of answers: ${(KINDS[each.kind] ?? each.kind).toLowerCase()} at most ${seconds(each.threshold)}`;

export default function Slo() {
  const objectives = useQuery("/admin/slo", { every: 5 });
  const alerts = useQuery("/admin/alerts", { every: 5 });
  return html`
    <${Page} title="Objectives" note="What this server promises, what is left of its error budgets, and who should look">
      <${Alerts} query=${alerts} />
      <${Loaded} query=${objectives}>${(/** @type {any} */ data) =>
        data.objectives.length
          ? html`<div class="grid">${data.objectives.map((/** @type {any} */ each) => html`<div key=${each.name} class="w6"><${Objective} each=${each} /></div>`)}</div>`
          : html`<${Card}><${Empty} icon="target" title="No objectives">Name them under <code>slos</code> in fairlead.yaml: what share of which requests must be good.<//><//>`}<//>
      ${has("incidents") && html`<${Incidents} />`}
    <//>
  `;
}

/** @param {{each: any}} props */
function Objective({ each }) {
  const left = each.budget_left;
  const tone = left <= 0 ? "bad" : left < 0.25 ? "warn" : "ok";
  const firing = each.alerts.filter((/** @type {any} */ alert) => alert.state !== "resolved");
  return html`
    <${Card} title=${html`<span class="break">${each.name}</span>`} label=${each.name} actions=${html`<${Badge}>${KINDS[each.kind] ?? each.kind}<//>`} footer=${`${number(each.good)} good, ${number(each.bad)} bad in ${duration(each.window)}${each.enough ? "" : ". Too few for an alert"}`}>
      <div class="stack tight">
        <p class="muted break">${promise(each)}${each.model && html`, of <strong>${each.model}</strong>`}${each.class && html`, class <strong>${each.class}</strong>`}</p>
        <div class="row between"><span>Attained</span><strong class="num">${each.attained === null ? "\u2013" : percent(each.attained, 3)}</strong></div>
        <div class="row between"><span>Budget left</span><strong class=${`num ${tone}`}>${percent(left, 1)}</strong></div>
        <${Meter} value=${left} tone=${tone} label=${`Budget left of ${each.name}`} />
        <h3>Burn rate <span class="muted">1: just used up at the end of the window</span></h3>
        <dl class="burn num">${Object.entries(each.burn).map(([span, burn]) => html`<div key=${span}><dt>${span}</dt><dd class=${burn >= FAST ? "bad strong" : burn > SLOW ? "warn strong" : ""}>${short(burn)}×</dd></div>`)}</dl>
        ${firing.map((/** @type {any} */ alert) => html`<${Status} key=${alert.severity} tone=${alert.state === "firing" ? "bad" : "warn"}>${alert.severity} ${alert.state} since ${ago(alert.since)}<//>`)}
      </div>
    <//>
  `;
}

/** @param {{query: any}} props */
function Alerts({ query }) {
  const rows = query.data && [...query.data.alerts, ...query.data.recent];
  const columns = [
    { id: "state", label: "State", show: (/** @type {any} */ each) => html`<${Status} tone=${each.state === "firing" ? "bad" : each.state === "pending" ? "warn" : "ok"}>${each.state}<//>` },
    { id: "severity", label: "Severity", show: (/** @type {any} */ each) => html`<${Badge} tone=${each.severity === "page" ? "bad" : "warn"}>${each.severity}<//>` },
    { id: "alert", label: "Alert", show: (/** @type {any} */ each) => html`<span class="strong">${each.alert}</span>${each.subject && html` <span class="muted">${each.subject}</span>`}` },
    { id: "summary", label: "What happens", class: "wraps", show: (/** @type {any} */ each) => each.summary },
    { id: "since", label: "Since", show: (/** @type {any} */ each) => html`<span title=${date(each.since)}>${ago(each.since)}</span>` },
    { id: "runbook", label: "Runbook", show: (/** @type {any} */ each) => /^https?:\/\//.test(each.runbook) ? html`<a href=${each.runbook} target="_blank" rel="noopener noreferrer">What to do</a>` : each.runbook && html`<${Copyable} text=${each.runbook} />` },
  ];
  if (rows && !rows.length) return html`<${Notice} tone="ok">No alert fires, and none did lately.<//>`;
  return html`
    <${Card} flush title="Alerts">
      <${Table} label="Alerts" columns=${columns} rows=${rows} rowHeight=${0} loading=${query.loading} error=${query.error} retry=${query.refresh} rowKey=${(/** @type {any} */ each) => each.id + each.since} />
    <//>
  `;
}

function Incidents() {
  const query = useQuery("/admin/incidents", { every: 10 });
  const rows = query.data?.incidents ?? null;
  const running = rows?.find((/** @type {any} */ each) => !each.ended);
  const start = async () => {
    const done = await confirm({ title: "Start an incident?", body: "From now on, and for a while before, everything that can be seen is kept: metrics, slow and failed requests, logs, and what was changed.", action: "Start", reason: "What is wrong", act: (title) => post("/admin/incidents/start", { title }) });
    if (done) query.refresh();
  };
  const stop = async () => {
    const done = await confirm({ title: `Stop ${running.title || running.id}?`, body: "It becomes one archive, with a post-mortem begun.", action: "Stop", act: () => post("/admin/incidents/stop") });
    if (done) query.refresh();
  };
  const columns = [
    { id: "title", label: "Incident", show: (/** @type {any} */ each) => html`<span class="strong">${each.title || each.id}</span>` },
    { id: "state", label: "State", show: (/** @type {any} */ each) => each === running ? html`<${Status} tone="busy">runs<//>` : html`<${Status} tone="ok">over<//>` },
    { id: "started", label: "Started", show: (/** @type {any} */ each) => date(each.began) },
    { id: "ended", label: "Ended", show: (/** @type {any} */ each) => (each.ended ? date(each.ended) : "\u2013") },
    { id: "size", label: "Archive", num: true, show: (/** @type {any} */ each) => each !== running && html`<a href=${at("admin", "incidents", each.id)} download>${each.bytes ? bytes(each.bytes) : "Download"}</a>` },
  ];
  return html`
    <${Card} flush title="Incidents" actions=${running ? html`<${Button} icon="stop" kind="danger" onClick=${stop}>Stop it<//>` : html`<${Button} icon="play" disabled=${!query.data} onClick=${start}>Start an incident<//>`}>
      <${Table} label="Incidents" columns=${columns} rows=${rows} loading=${query.loading} error=${query.error} retry=${query.refresh} rowKey=${(/** @type {any} */ each) => each.id} empty=${html`<${Empty} icon="flask" title="No incidents">Start one when something is wrong: it gathers what the post-mortem needs.<//>`} />
    <//>
  `;
}
