// @ts-check
import { html, useState } from "../lib/html.js";
import { at, has } from "../lib/api.js";
import { ago, bytes, date, digest, number, percent, rate, seconds, short } from "../lib/format.js";
import { useQuery } from "../lib/query.js";
import { setQuery } from "../lib/router.js";
import { Badge, Button, Card, Chart, Code, Copyable, Dialog, Empty, Facts, Failure, Loaded, Notice, Page, Stat, Stats, Status, Table, Tabs } from "../parts/index.js";
import { STATES, load, unload } from "./model-acts.js";
import { RolloutPanel, isRunning } from "./rollout-panel.js";
import { StartRollout } from "./rollout-start.js";

const STAGES = /** @type {Record<string, any>} */ ({ staged: "", validated: "info", serving: "ok", rejected: "bad", retired: "" });

/** @param {{params: Record<string, string>, query: URLSearchParams}} props */
export default function Model({ params, query }) {
  const name = params.model ?? "";
  const tab = query.get("tab") ?? "now";
  const found = useQuery("/ui/models.json", { query: { name }, every: 3 });
  const listed = found.data?.models.find((/** @type {any} */ each) => each.name === name) ?? null;
  const registered = (listed?.registered.length ?? 0) > 0 || Object.keys(listed?.aliases ?? {}).length > 0;
  const rollout = useQuery(registered && has("rollouts") ? "/admin/rollouts" : null, { query: { model: name, limit: 1 }, every: 2 });
  const latest = rollout.data?.rollouts[0] ?? null;
  const [starting, setStarting] = useState(0);
  const crumbs = [{ href: "/ui/models", text: "Models" }];
  if (found.error && !found.data) return html`<${Page} title=${name} crumbs=${crumbs}><${Failure} error=${found.error} retry=${found.refresh} /><//>`;
  if (found.data && !listed) return html`<${Page} title=${name} crumbs=${crumbs}><${Empty} icon="search" title="No such model">Neither a repository nor the registry has it.<//><//>`;
  const tabs = [
    { id: "now", text: "Now" },
    { id: "versions", text: "Versions" },
    ...(registered && has("rollouts") ? [{ id: "rollout", text: latest && isRunning(latest) ? html`Rollout <${Badge} tone="info">under way<//>` : "Rollout" }] : []),
    ...(registered ? [{ id: "events", text: "Events" }] : []),
  ];
  return html`
    <${Page} name=${name} crumbs=${crumbs}
      title=${html`<span class="row wrap">${name} ${listed && html`<${Status} tone=${STATES[listed.state]?.[0]}>${STATES[listed.state]?.[1]}<//>`}</span>`}
      actions=${html`
        ${has("load") && listed && !registered && !listed.remote && (listed.state === "ready" ? unload(name, found.refresh) : listed.state !== "loading" && load(name, found.refresh))}
        <${Button} href=${`/ui/playground?model=${encodeURIComponent(name)}`} icon="chat">Try it<//>
        ${has("requests") && html`<${Button} href=${`/ui/requests?model=${encodeURIComponent(name)}`} icon="list">Requests<//>`}
        ${registered && has("rollouts") && html`<${Button} kind="primary" icon="branch" onClick=${() => setStarting(-1)}>Roll out<//>`}
      `}>
      <${StartRollout} open=${starting !== 0} model=${name} version=${starting > 0 ? starting : undefined} onClose=${() => setStarting(0)} then=${rollout.refresh} />
      ${listed?.state === "failed" && html`<${Notice} tone="bad">${listed.reason}<//>`}
      <div>
        <${Tabs} label=${`About ${name}`} tabs=${tabs} chosen=${tab} onChoose=${(/** @type {string} */ id) => setQuery({ tab: id === "now" ? null : id })} />
        <div role="tabpanel" aria-label=${tab}>
          ${tab === "now" && html`<${Now} name=${name} now=${listed?.now} />`}
          ${tab === "versions" && html`<${Versions} name=${name} listed=${listed} registered=${registered} roll=${setStarting} />`}
          ${tab === "rollout" && (latest ? html`<${RolloutPanel} rollout=${latest} refresh=${rollout.refresh} linked />` : html`<${Card}><${Empty} icon="branch" title="Never rolled out"><${Button} onClick=${() => setStarting(-1)}>Start a rollout<//><//><//>`)}
          ${tab === "events" && html`<${Events} name=${name} />`}
        </div>
      </div>
    <//>
  `;
}

/** @param {{name: string, now: any}} props */
function Now({ name, now }) {
  const hour = useQuery("/ui/history", { query: { model: name }, every: 6 });
  const times = hour.data?.at ?? [];
  const series = (/** @type {string} */ each) => hour.data?.series[each] ?? [];
  const none = "No requests of late";
  return html`
    <div class="stack">
      <${Stats} label="Now">
        <${Stat} label="Requests" value=${rate(now?.requests)} unit="/s" note=${now?.refused ? `${rate(now.refused)}/s refused` : ""} />
        <${Stat} label="Errors" value=${percent(now?.requests ? now.errors / now.requests : now ? 0 : null)} tone=${now?.errors ? "bad" : ""} />
        <${Stat} label="Latency, p50" value=${seconds(now?.p50)} note=${`p95 ${seconds(now?.p95)}`} />
        <${Stat} label="Latency, p99" value=${seconds(now?.p99)} />
        <${Stat} label="Under way" value=${short(now?.in_flight)} note=${`${number(now?.waiting)} waiting`} />
        <${Stat} label="Tokens" value=${rate(now?.tokens)} unit="/s" note=${now?.kv === null || !now ? "" : `${percent(now.kv)} of KV memory`} />
      <//>
      <div class="grid">
        <div class="w6"><${Card} title="Requests per second"><${Chart} none=${none} label="Requests per second" at=${times} show=${rate} lines=${[
          { label: "All", values: series("requests"), colour: 1, area: true },
          { label: "Refused", values: series("refused"), colour: 3 },
          { label: "Errors", values: series("errors"), colour: 4 },
        ]} /><//></div>
        <div class="w6"><${Card} title="Latency"><${Chart} none=${none} label="Latency" at=${times} show=${seconds} lines=${[
          { label: "p50", values: series("p50"), colour: 1 },
          { label: "p95", values: series("p95"), colour: 2 },
          { label: "p99", values: series("p99"), colour: 3 },
        ]} /><//></div>
        <div class="w6"><${Card} title="Under way"><${Chart} none=${none} height=${130} label="Under way" at=${times} show=${short} lines=${[
          { label: "Under way", values: series("in_flight"), colour: 1, area: true },
          { label: "Waiting", values: series("waiting"), colour: 3 },
        ]} /><//></div>
        <div class="w6"><${Card} title="Tokens per second"><${Chart} none=${none} height=${130} label="Tokens per second" at=${times} show=${rate} lines=${[{ label: "Tokens", values: series("tokens"), colour: 2, area: true }]} /><//></div>
      </div>
    </div>
  `;
}

/** @param {{name: string, listed: any, registered: boolean, roll: (version: number) => void}} props */
function Versions({ name, listed, registered, roll }) {
  const query = useQuery(registered ? `${at("admin", "models", name)}/versions` : null, { every: 5 });
  const [shown, setShown] = useState(0);
  const here = new Map((listed?.versions ?? []).map((/** @type {any} */ each) => [each.version, each]));
  const stateOf = (/** @type {any} */ version) => {
    const each = /** @type {any} */ (here.get(String(version)));
    return each ? html`<span title=${each.reason}><${Status} tone=${each.state === "READY" ? "ok" : each.state === "LOADING" ? "busy" : each.reason && each.reason !== "unloaded" ? "bad" : "idle"}>${each.state === "READY" ? "Ready" : each.state === "LOADING" ? "Loading" : each.reason && each.reason !== "unloaded" ? "Failed" : "Unloaded"}<//></span>` : html`<span class="faint">not loaded</span>`;
  };
  if (!registered) {
    /** @type {import("../parts/table.js").Column<any>[]} */
    const columns = [
      { id: "version", label: "Version", by: (each) => Number(each.version), show: (each) => each.version },
      { id: "state", label: "Here", show: (each) => stateOf(each.version) },
      { id: "reason", label: "Why", class: "wraps", show: (each) => each.reason },
    ];
    return html`<${Card} title="In this server's folders" footer="It is not in the registry: it has no digest, no provenance and no rollouts." flush><${Table} label="Versions" columns=${columns} rows=${listed?.versions ?? null} rowHeight=${0} empty=${html`<${Empty} title="No version is loaded" />`} /><//>`;
  }
  /** @type {import("../parts/table.js").Column<any>[]} */
  const columns = [
    { id: "version", label: "Version", by: (each) => each.version, show: (each) => html`<button type="button" class="link" onClick=${() => setShown(each.version)}>${name}@${each.version}</button>` },
    { id: "stage", label: "Stage", by: (each) => each.stage, show: (each) => html`<span title=${each.reason}><${Badge} tone=${STAGES[each.stage] ?? ""}>${each.stage}<//></span>` },
    { id: "aliases", label: "Aliases", show: (each) => html`<span class="row">${each.aliases.map((/** @type {string} */ alias) => html`<${Badge} key=${alias} tone="accent">${alias}<//>`)}</span>` },
    { id: "here", label: "Here", show: (each) => stateOf(each.version) },
    { id: "digest", label: "Digest", show: (each) => html`<${Copyable} text=${each.digest} shown=${digest(each.digest)} />` },
    { id: "backend", label: "Backend", by: (each) => each.backend, show: (each) => each.backend },
    { id: "bytes", label: "Size", num: true, by: (each) => each.bytes, show: (each) => bytes(each.bytes) },
    { id: "created", label: "Added", num: true, by: (each) => each.created, show: (each) => html`<span title=${`${date(each.created)} by ${each.provenance.who}`}>${ago(each.created)}</span>` },
    { id: "act", label: "", num: true, show: (each) => (["staged", "validated"].includes(each.stage) && has("rollouts") ? html`<${Button} onClick=${() => roll(each.version)} label=${`Roll out ${name}@${each.version}`}>Roll out<//>` : null) },
  ];
  return html`
    <${Card} title="Versions in the registry" flush><${Loaded} query=${query}>${(/** @type {any} */ data) => html`<${Table} label="Versions" columns=${columns} rows=${data.versions} rowKey=${(/** @type {any} */ each) => each.version} />`}<//><//>
    <${Dialog} open=${shown > 0} wide title=${`${name}@${shown}`} onClose=${() => setShown(0)}><${Whole} name=${name} version=${shown} /><footer><${Button} onClick=${() => setShown(0)}>Close<//></footer><//>
  `;
}

/** @param {{name: string, version: number}} props */
function Whole({ name, version }) {
  const query = useQuery(at("admin", "models", name, "versions", version));
  return html`<${Loaded} query=${query}>${(/** @type {any} */ each) => {
    const came = each.provenance;
    return html`
      <div class="stack">
        <${Facts} rows=${[
          ["Stage", html`<${Badge} tone=${STAGES[each.stage] ?? ""}>${each.stage}<//> <span class="muted">${each.reason}</span>`],
          ["Digest", html`<${Copyable} text=${each.digest} />`],
          ["Signed by", each.signed_by ? html`<${Status} tone="ok">${each.signed_by}<//>` : html`<span class="muted">nobody</span>`],
          ["Added", `${date(each.created)} by ${came.who}`],
          ["Source", came.source],
          ["Parent", came.parent],
          ["Git commit", came.git_commit ? html`<${Copyable} text=${came.git_commit} />` : undefined],
          ["Licence", came.licence],
          ["Framework", came.framework],
          ["Notes", came.notes],
          ["Metrics", came.metrics && Object.entries(came.metrics).map(([key, value]) => html`<${Badge} key=${key}>${key} ${number(value, 4)}<//> `)],
          ["Tags", Object.keys(each.tags).length ? Object.entries(each.tags).map(([key, value]) => html`<${Badge} key=${key}>${key}=${String(value)}<//> `) : undefined],
        ]} />
        <h3>Gates</h3>
        ${each.gates.length ? html`<${Table} label="Gates" rowHeight=${0} rows=${each.gates} columns=${[
          { id: "gate", label: "Gate", show: (/** @type {any} */ gate) => gate.gate },
          { id: "outcome", label: "Outcome", show: (/** @type {any} */ gate) => html`<${Status} tone=${gate.outcome === "passed" ? "ok" : gate.outcome === "failed" ? "bad" : "idle"}>${gate.outcome}<//>` },
          { id: "said", label: "What it found", class: "wraps", show: (/** @type {any} */ gate) => gate.details?.message ?? "" },
          { id: "seconds", label: "Took", num: true, show: (/** @type {any} */ gate) => seconds(gate.seconds) },
        ]} />` : html`<p class="muted">None ran yet.</p>`}
        <h3>Files</h3>
        <${Table} label="Files" height=${200} rows=${each.files} columns=${[
          { id: "path", label: "Path", by: (/** @type {any} */ file) => file.path, show: (/** @type {any} */ file) => html`<span class="mono">${file.path}</span>` },
          { id: "bytes", label: "Size", num: true, by: (/** @type {any} */ file) => file.bytes, show: (/** @type {any} */ file) => bytes(file.bytes) },
          { id: "sha256", label: "SHA-256", show: (/** @type {any} */ file) => html`<span class="mono" title=${file.sha256}>${digest(file.sha256)}</span>` },
        ]} />
        <h3>Spec</h3>
        <${Code} label="Spec" text=${each.spec} />
      </div>
    `;
  }}<//>`;
}

/** @param {{name: string}} props */
function Events({ name }) {
  const query = useQuery(`${at("admin", "models", name)}/events`, { query: { limit: 100 }, every: 10 });
  /** @type {import("../parts/table.js").Column<any>[]} */
  const columns = [
    { id: "time", label: "When", width: "130px", show: (each) => html`<span title=${date(each.time)}>${ago(each.time)}</span>` },
    { id: "action", label: "What", show: (each) => html`<span class="mono">${each.action}</span>` },
    { id: "subject", label: "Of", show: (each) => each.subject },
    { id: "actor", label: "Who", show: (each) => each.actor },
    { id: "reason", label: "Why", class: "wraps", show: (each) => each.details?.reason ?? "" },
  ];
  return html`<${Card} title="Events" flush><${Loaded} query=${query}>${(/** @type {any} */ data) => html`<${Table} label="Events" columns=${columns} rows=${data.entries} rowHeight=${0} empty=${html`<${Empty} icon="scroll" title="Nothing happened yet" />`} />`}<//><//>`;
}
