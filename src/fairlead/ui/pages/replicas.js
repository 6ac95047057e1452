// @ts-check
import { html } from "../lib/html.js";
import { at } from "../lib/api.js";
import { NONE, bytes, duration, number, percent, plural, seconds } from "../lib/format.js";
import { live } from "../lib/live.js";
import { useQuery } from "../lib/query.js";
import { Badge, Card, Empty, Facts, Loaded, Meter, Page, Stat, Stats, Status, Table } from "../parts/index.js";

const STATES = /** @type {Record<string, [any, string]>} */ ({ ready: ["ok", "Ready"], starting: ["busy", "Starting"], failed: ["bad", "Failed"], asleep: ["idle", "Asleep"] });

export default function Replicas() {
  const query = useQuery("/admin/replicas", { every: 2 });
  return html`
    <${Page} title="Replicas" note="The processes and devices that compute">
      <${Loaded} query=${query} height=${420}>${(/** @type {any} */ data) => html`<${All} replicas=${data.replicas} devices=${data.devices} own=${data.process} />`}<//>
    <//>
  `;
}

/** @param {{replicas: any[], devices: any[], own: any}} props */
function All({ replicas, devices, own }) {
  const cpus = live.value?.server.cpus;
  const sum = (/** @type {string} */ field) => replicas.reduce((total, each) => total + (each[field] ?? 0), 0);
  const restarts = sum("restarts");
  const broken = replicas.filter((each) => each.state === "failed").length;
  const engines = replicas.filter((each) => each.kv_blocks > 0);
  /** @type {import("../parts/table.js").Column<any>[]} */
  const columns = [
    { id: "model", label: "Model", by: (each) => each.model, show: (each) => html`<a href=${at("ui", "models", each.model)}>${each.model}</a>` },
    { id: "version", label: "Version", num: true, by: (each) => Number(each.version), show: (each) => each.version },
    { id: "instance", label: "Replica", num: true, by: (each) => each.instance, show: (each) => number(each.instance) },
    { id: "state", label: "State", by: (each) => each.state, show: (each) => html`<span title=${each.reason}><${Status} tone=${STATES[each.state]?.[0] ?? "idle"}>${STATES[each.state]?.[1] ?? each.state}<//></span>` },
    { id: "kind", label: "Runs in", by: (each) => each.kind, show: (each) => (each.pid ? html`process <span class="mono">${each.pid}</span>` : html`<span class="muted">${each.kind === "process" ? NONE : "the server"}</span>`) },
    { id: "device", label: "Device", by: (each) => each.device, show: (each) => html`<${Badge}>${each.device}<//>` },
    { id: "in_flight", label: "Under way", num: true, by: (each) => each.in_flight, show: (each) => number(each.in_flight) },
    { id: "cpu", label: "Cores", num: true, by: (each) => each.cpu_percent, show: (each) => (each.pid ? (each.cpu_percent / 100).toFixed(2) : NONE) },
    { id: "rss", label: "Memory", num: true, by: (each) => each.rss_bytes, show: (each) => (each.pid ? bytes(each.rss_bytes) : NONE) },
    { id: "restarts", label: "Restarts", num: true, by: (each) => each.restarts, show: (each) => html`<span class=${each.restarts ? "warn strong" : ""}>${number(each.restarts)}</span>` },
  ];
  return html`
    <div class="stack">
      <${Stats} label="Replicas now">
        <${Stat} label="Replicas" value=${number(replicas.length)} note=${broken ? `${broken} failed` : "all ready"} tone=${broken ? "bad" : ""} />
        <${Stat} label="Restarts" value=${number(restarts)} note="since they were loaded" tone=${restarts ? "warn" : ""} />
        <${Stat} label="Under way" value=${number(sum("in_flight"))} />
        <${Stat} label="Replicas' memory" value=${bytes(sum("rss_bytes"))} note=${`${(sum("cpu_percent") / 100).toFixed(2)} cores`} />
        <${Stat} label="Server's memory" value=${bytes(own?.rss_bytes)} note=${own ? `${(own.cpu_percent / 100).toFixed(2)} cores${cpus ? ` of ${cpus}` : ""}` : ""} />
        <${Stat} label="Event loop late by" value=${seconds(own?.loop_lag_seconds)} note=${own ? `process ${own.pid}, up ${duration(own.uptime_seconds)}` : ""} tone=${own?.loop_lag_seconds > 0.05 ? "warn" : ""} />
      <//>
      ${engines.length > 0 && html`<${Card} title="KV memory"><div class="stack">${engines.map((each) => html`<${KvMap} key=${`${each.model}/${each.version}/${each.instance}`} replica=${each} />`)}</div><//>`}
      <${Card} title="Devices">
        ${devices.length === 0 ? html`<${Empty} icon="chip" title="No accelerator">This server computes on the processor, or its devices do not tell of themselves (NVML).<//>` : html`<div class="grid">${devices.map((each) => html`<div class="w4" key=${each.index}><${Device} device=${each} /></div>`)}</div>`}
      <//>
      <${Card} title="All replicas" flush>
        <${Table} label="Replicas" columns=${columns} rows=${replicas} rowKey=${(/** @type {any} */ each) => `${each.model}/${each.version}/${each.instance}`} sort="model" empty=${html`<${Empty} icon="chip" title="Nothing is loaded">Replicas are there as soon as a model is.<//>`} />
      <//>
    </div>
  `;
}

const CELLS = 240;

/** Blocks of KV memory, some to a cell: used, and free or only cached. @param {{replica: any}} props */
function KvMap({ replica }) {
  const total = replica.kv_blocks;
  const used = total - replica.kv_free;
  const cells = Math.min(total, CELLS);
  const filled = used ? Math.max(1, Math.round((used / total) * cells)) : 0;
  const share = used / total;
  const name = `${replica.model}@${replica.version}, replica ${replica.instance}`;
  const tokens = replica.block_size ? ` \u00b7 ${plural(replica.block_size, "token")} each` : "";
  return html`
    <div class="stack tight">
      <div class="row between wrap"><span class="strong clip">${name}</span><span class="muted num">${percent(share)} used \u00b7 ${number(used)} of ${number(total)} blocks${tokens} \u00b7 ${number(replica.running)} running, ${number(replica.waiting)} waiting</span></div>
      <div class=${`kv ${share > 0.95 ? "bad" : share > 0.8 ? "warn" : ""}`} role="img" aria-label=${`KV memory of ${name}: ${percent(share)} used`}>
        ${Array.from({ length: cells }, (_, i) => html`<i key=${i} class=${i < filled ? "used" : ""}></i>`)}
      </div>
    </div>
  `;
}

/** @param {{device: any}} props */
const Device = ({ device }) => html`
  <div class="stack tight">
    <div class="row between"><span class="strong clip">${device.index}: ${device.name}</span><span class="num">${percent(device.utilisation, 0)}</span></div>
    <${Meter} value=${device.utilisation} label=${`Utilisation of device ${device.index}`} />
    <${Facts} rows=${[
      ["Memory", html`${bytes(device.memory_used_bytes)} of ${bytes(device.memory_total_bytes)}`],
      ["Power", device.power_watts === null || device.power_watts === undefined ? undefined : `${number(device.power_watts)} W`],
    ]} />
    <${Meter} value=${device.memory_total_bytes ? device.memory_used_bytes / device.memory_total_bytes : null} label=${`Memory of device ${device.index}`} />
  </div>
`;
