// @ts-check
import { html, useState } from "../lib/html.js";
import { at, del } from "../lib/api.js";
import { ago, date, number, percent } from "../lib/format.js";
import { useQuery } from "../lib/query.js";
import { Badge, Button, Card, Empty, Loaded, Notice, Page, Status, Table, confirm } from "../parts/index.js";
import { StartRollout } from "./rollout-start.js";
import { Phase, RolloutPanel, isRunning, namesOf } from "./rollout-panel.js";

export default function Rollouts() {
  const query = useQuery("/admin/rollouts", { query: { limit: 100 }, every: 2 });
  const deployments = useQuery("/admin/deployments", { every: 5 });
  const [starting, setStarting] = useState(false);
  return html`
    <${Page} title="Rollouts" note="From a new version to all traffic, and back as soon as it is worse"
      actions=${html`<${Button} kind="primary" icon="plus" onClick=${() => setStarting(true)}>Start a rollout<//>`}>
      ${deployments.data?.store_error && html`<${Notice} tone="bad">The store does not answer: traffic stays as it is. ${deployments.data.store_error}<//>`}
      <${StartRollout} open=${starting} onClose=${() => setStarting(false)} then=${query.refresh} />
      <${Loaded} query=${query} height=${320}>${(/** @type {any} */ data) => html`<${Lists} rollouts=${data.rollouts} refresh=${query.refresh} />`}<//>
      <${Card} title="Deployed" flush><${Deployed} query=${deployments} /><//>
    <//>
  `;
}

/** @param {{rollouts: any[], refresh: () => void}} props */
function Lists({ rollouts, refresh }) {
  const running = rollouts.filter(isRunning);
  const ended = rollouts.filter((each) => !isRunning(each));
  /** @type {import("../parts/table.js").Column<any>[]} */
  const columns = [
    { id: "names", label: "Candidate", by: namesOf, show: (each) => html`<a href=${at("ui", "rollouts", each.id)}>${namesOf(each)}</a>` },
    { id: "kind", label: "Kind", by: (each) => each.kind, show: (each) => html`<${Badge}>${each.kind}<//>` },
    { id: "phase", label: "Outcome", by: (each) => each.phase, show: Phase },
    { id: "reason", label: "Why", show: (each) => html`<span title=${each.reason}>${each.reason}</span>` },
    { id: "exposure", label: "Exposed", num: true, by: (each) => each.exposure, show: (each) => percent(each.exposure) },
    { id: "ended", label: "Ended", num: true, by: (each) => each.ended, show: (each) => html`<span title=${date(each.ended)}>${ago(each.ended)}</span>` },
  ];
  return html`
    ${running.map((each) => html`<${RolloutPanel} key=${each.id} rollout=${each} refresh=${refresh} linked />`)}
    ${running.length === 0 && html`<${Card}><${Empty} icon="branch" title="No rollout is under way">Start one here, or with <code>fairlead rollout start NAME@VERSION</code>.<//><//>`}
    <${Card} title="Ended" flush><${Table} label="Rollouts that ended" columns=${columns} rows=${ended} rowKey=${(/** @type {any} */ each) => each.id} height=${420} empty=${html`<${Empty} icon="clock" title="None ended yet" />`} /><//>
  `;
}

/** @param {{query: any}} props */
function Deployed({ query }) {
  /** @type {import("../parts/table.js").Column<any>[]} */
  const columns = [
    { id: "model", label: "Model", by: (each) => each.model, show: (each) => html`<a href=${at("ui", "models", each.model)}>${each.model}</a>` },
    { id: "champion", label: "Champion", num: true, by: (each) => each.wanted.champion, show: (each) => number(each.wanted.champion || null) },
    { id: "candidate", label: "Candidate", num: true, by: (each) => each.wanted.candidate, show: (each) => number(each.wanted.candidate || null) },
    { id: "share", label: "Its share", num: true, by: (each) => each.wanted.share, show: (each) => (each.wanted.share ? percent(each.wanted.share) : number(null)) },
    { id: "servers", label: "Servers", show: (each) => html`<span class="row">${standing(each.servers)}</span>` },
    { id: "updated", label: "Changed", num: true, by: (each) => each.updated, show: (each) => html`<span title=${each.reason}>${ago(each.updated)}</span>` },
    { id: "act", label: "", num: true, show: (each) => html`<${Button} onClick=${() => undeploy(each.model, query.refresh)} label=${`Undeploy ${each.model}`}>Undeploy<//>` },
  ];
  return html`<${Loaded} query=${query}>${(/** @type {any} */ data) => html`<${Table} label="Deployed" columns=${columns} rows=${data.deployments} rowKey=${(/** @type {any} */ each) => each.model} height=${420} empty=${html`<${Empty} icon="branch" title="Nothing is deployed">Models in folders serve without it.<//>`} />`}<//>`;
}

/** @param {string} model @param {() => void} then */
function undeploy(model, then) {
  confirm({
    title: `Undeploy ${model}?`,
    body: `No version of ${model} serves any more, on any server. Requests for it are told that there is no such model, until a rollout deploys one again.`,
    action: "Undeploy",
    danger: true,
    type: model,
    act: () => del(at("admin", "deployments", model)),
  }).then(then);
}

/** How many servers have all that is wanted ready. @param {Record<string, Record<string, {state: string, reason?: string}>>} servers */
function standing(servers) {
  const all = Object.values(servers);
  const ready = all.filter((each) => Object.values(each).every((version) => version.state === "ready")).length;
  return html`<${Status} tone=${ready === all.length ? "ok" : "warn"}>${ready} of ${all.length} ready<//>`;
}
