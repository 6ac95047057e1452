// @ts-check
import { at, get, post } from "../lib/api.js";
import { ago, money, seconds } from "../lib/format.js";
import { html, useEffect, useState } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { setQuery } from "../lib/router.js";
import { Button, Card, Empty, Field, Meter, Page, Select, Status, Table, attempt, confirm } from "../parts/index.js";

/** @type {Record<string, "ok" | "warn" | "bad" | "idle" | "busy">} */
export const TONES = { queued: "idle", active: "busy", aborting: "warn", complete: "ok", failed: "bad", aborted: "idle" };
const UNENDED = ["queued", "active"];

/** @param {any} job */
export const cancel = (job) =>
  confirm({
    title: `Cancel this job of ${job.model}?`,
    body: `Tenant ${job.tenant} is told that it was aborted. What it computed so far is lost.`,
    action: "Cancel the job",
    danger: true,
    act: () => post(at("admin", "jobs", job.id, "cancel")),
  });

/** @param {{job: any}} props */
export const Progress = ({ job }) =>
  job.status === "queued" || !job.progress
    ? html`<span class="muted">\u2013</span>`
    : html`<span class="row"><${Meter} value=${job.progress.fraction} label=${`Progress of ${job.id}`} /><span class="num small muted">${job.progress.step} / ${job.progress.num_steps}</span></span>`;

/** @param {{query: URLSearchParams}} props */
export default function Jobs({ query }) {
  const wanted = { status: query.get("status") ?? "", model: query.get("model") ?? "", tenant: query.get("tenant") ?? "" };
  const first = useQuery("/admin/jobs", { query: { ...wanted, limit: 100 }, every: 2 });
  const [more, setMore] = useState(/** @type {{jobs: any[], next: string | null} | null} */ (null));
  useEffect(() => setMore(null), [wanted.status, wanted.model, wanted.tenant]);
  const seen = new Set(first.data?.jobs.map((/** @type {any} */ each) => each.id));
  const jobs = first.data && [...first.data.jobs, ...(more?.jobs ?? []).filter((each) => !seen.has(each.id))];
  const next = more ? more.next : first.data?.next;
  const older = () => attempt(async () => {
    const page = await get("/admin/jobs", { ...wanted, limit: 100, before: next });
    setMore({ jobs: [...(more?.jobs ?? []), ...page.jobs], next: page.next });
  });
  const columns = [
    { id: "preview", label: "Preview", width: "56px", show: (/** @type {any} */ each) => each.progress?.preview ? html`<img class="job-thumb" src=${each.progress.preview} alt="" />` : html`<span class="job-thumb"></span>` },
    { id: "id", label: "Job", show: (/** @type {any} */ each) => html`<a class="mono" href=${at("ui", "jobs", each.id)}>${each.id.slice(0, 18)}…</a>` },
    { id: "status", label: "Status", by: (/** @type {any} */ each) => each.status, show: (/** @type {any} */ each) => html`<${Status} tone=${TONES[each.status] ?? "idle"}>${each.status}${each.error ? `: ${each.error.reason}` : ""}<//>` },
    { id: "progress", label: "Progress", width: "150px", show: (/** @type {any} */ each) => html`<${Progress} job=${each} />` },
    { id: "model", label: "Model", by: (/** @type {any} */ each) => each.model, show: (/** @type {any} */ each) => html`${each.model}${each.version && html`<span class="muted">@${each.version}</span>`}` },
    { id: "kind", label: "Kind", by: (/** @type {any} */ each) => each.kind, show: (/** @type {any} */ each) => each.kind },
    { id: "tenant", label: "Tenant", by: (/** @type {any} */ each) => each.tenant, show: (/** @type {any} */ each) => each.tenant },
    { id: "created", label: "Handed in", by: (/** @type {any} */ each) => each.created, show: (/** @type {any} */ each) => ago(each.created) },
    { id: "took", label: "Ran", num: true, by: (/** @type {any} */ each) => took(each), show: (/** @type {any} */ each) => seconds(took(each)) },
    { id: "cost", label: "Cost", num: true, by: (/** @type {any} */ each) => each.cost, show: (/** @type {any} */ each) => (each.cost ? money(each.cost) : "\u2013") },
    { id: "act", label: "", show: (/** @type {any} */ each) => UNENDED.includes(each.status) && html`<${Button} kind="quiet" icon="stop" label=${`Cancel ${each.id}`} onClick=${async () => (await cancel(each)) && first.refresh()} />` },
  ];
  const filtered = Object.values(wanted).some(Boolean);
  const statuses = ["queued", "active", "aborting", "complete", "failed", "aborted"];
  return html`
    <${Page} title="Jobs" note="Requests that are answered later, of all tenants">
      <div class="row wrap">
        <div class="filter"><${Field} label="Status">${(/** @type {string} */ id) => html`<${Select} id=${id} value=${wanted.status} options=${[{ value: "", text: "any" }, { value: "queued,active,aborting", text: "not ended" }, ...statuses]} onChange=${(/** @type {string} */ status) => setQuery({ status })} />`}<//></div>
        <div class="filter"><${Field} label="Model" value=${wanted.model} placeholder="any" spellcheck=${false} onInput=${(/** @type {string} */ model) => setQuery({ model })} /></div>
        <div class="filter"><${Field} label="Tenant" value=${wanted.tenant} placeholder="any" spellcheck=${false} onInput=${(/** @type {string} */ tenant) => setQuery({ tenant })} /></div>
      </div>
      <${Card} flush label="Jobs" footer=${next && html`<${Button} icon="down" onClick=${older}>Older jobs<//>`}>
        <${Table} label="Jobs" columns=${columns} rows=${jobs} loading=${first.loading} error=${first.error} retry=${first.refresh} rowKey=${(/** @type {any} */ each) => each.id} height=${720}
          empty=${filtered ? html`<${Empty} icon="search" title="No such jobs" />` : html`<${Empty} icon="list" title="No jobs yet">Whatever is posted to <code>/v1/jobs</code>, and every picture, is one.<//>`} />
      <//>
    <//>
  `;
}

/** @param {any} job */
export const took = (job) => (job.started ? (job.ended ?? Date.now() / 1000) - job.started : null);
