// @ts-check
import { at } from "../lib/api.js";
import { bytes, date, money, number, seconds } from "../lib/format.js";
import { html } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { Button, Card, Code, Copyable, Facts, Loaded, Notice, Page, Status } from "../parts/index.js";
import { fileOf } from "../playground/asking.js";
import { Progress, TONES, cancel, took } from "./jobs.js";

const ENDED = ["complete", "failed", "aborted"];

/** @param {{params: Record<string, string>}} props */
export default function Job({ params }) {
  const id = params.job ?? "";
  const query = useQuery(at("admin", "jobs", id), { every: 2 });
  /** @type {any} */
  const job = query.data;
  const actions = job && !ENDED.includes(job.status) && html`<${Button} icon="stop" kind="danger" disabled=${job.status === "aborting"} onClick=${async () => (await cancel(job)) && query.refresh()}>Cancel<//>`;
  return html`
    <${Page} title="Job" name=${`Job ${id}`} note=${html`<${Copyable} text=${id} />`} crumbs=${[{ href: "/ui/jobs", text: "Jobs" }]} actions=${actions}>
      <${Loaded} query=${query} height=${320}>${(/** @type {any} */ each) => html`<${Details} job=${each} />`}<//>
    <//>
  `;
}

/** @param {{job: any}} props */
function Details({ job }) {
  const pictures = job.result?.pictures ?? [];
  const texts = (job.result?.choices ?? []).filter((/** @type {any} */ each) => each.text);
  const rest = [...(job.result?.outputs ?? []), ...(job.result?.answer ? [job.result.answer] : [])];
  return html`
    ${job.error && html`<${Notice} tone="bad"><strong>${job.error.reason}</strong> ${job.error.message}${job.error.retryable ? " It may be handed in again." : ""}<//>`}
    <div class="grid">
      <div class="w5">
        <${Card} title="What it is">
          <${Facts} rows=${[
            ["Status", html`<${Status} tone=${TONES[job.status] ?? "idle"}>${job.status}<//>`],
            ["Progress", job.progress ? html`<${Progress} job=${job} />` : null],
            ["Before it", job.position === null ? null : `${number(job.position)} of its model`],
            ["Model", html`${job.model}${job.version && `@${job.version}`}`],
            ["Kind", job.kind],
            ["Tenant", html`<a href=${at("ui", "tenants", job.tenant)}>${job.tenant}</a>, project ${job.project}`],
            ["Key", job.key ? html`<span class="mono">${job.key}</span>` : null],
            ["Class", job.qos_class || null],
            ["Handed in", date(job.created)],
            ["Started", job.started ? date(job.started) : null],
            ["Ran", took(job) === null ? null : seconds(took(job))],
            ["Tries", number(job.tries)],
            ["Cost", job.cost ? money(job.cost) : null],
            ["Removed", job.expires ? date(job.expires) : null],
            ["Handed in by", job.request_id ? html`<a class="mono" href=${at("ui", "requests", job.request_id)}>${job.request_id}</a>` : null],
          ]} />
        <//>
      </div>
      <div class="w7 stack">
        ${job.progress?.preview && !job.result && html`<${Card} title="How far it is"><img class="job-picture" src=${job.progress.preview} alt="Preview" /><//>`}
        ${pictures.length > 0 && html`
          <${Card} title="Pictures">
            <ul class="job-pictures">
              ${pictures.map((/** @type {any} */ each, /** @type {number} */ index) => html`
                <li key=${each.url}><figure><img class="job-picture" src=${fileOf(each.url)} width=${each.width} height=${each.height} alt=${`Picture ${index + 1}`} /><figcaption class="small muted num">${each.width}×${each.height}, seed ${each.seed ?? "\u2013"}, ${bytes(each.num_bytes)}</figcaption></figure></li>
              `)}
            </ul>
          <//>
        `}
        ${texts.map((/** @type {any} */ each) => html`<${Card} key=${each.index} title="Answer"><p class="job-text">${each.text}</p><//>`)}
        ${rest.length > 0 && html`<${Card} title="Answer"><${Code} label="Answer" text=${JSON.stringify(rest, null, 2).slice(0, 20000)} /><//>`}
        ${Object.keys(job.metadata ?? {}).length > 0 && html`<${Card} title="The caller's notes"><${Facts} rows=${Object.entries(job.metadata)} /><//>`}
      </div>
    </div>
  `;
}
