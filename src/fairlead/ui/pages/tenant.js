// @ts-check
import { at, del, patch } from "../lib/api.js";
import { date, money, number } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { go } from "../lib/router.js";
import { Badge, Button, Card, Dialog, Empty, Facts, Field, Loaded, Meter, Notice, Page, Status, Table, confirm } from "../parts/index.js";
import { Keys, NewKey } from "./keys.js";

/** @type {Record<string, string[]>} what of a sum counts for a unit */
const UNITS = { requests: ["requests"], tokens: ["input_tokens", "output_tokens"], input_tokens: ["input_tokens"], output_tokens: ["output_tokens"], rows: ["rows"], megapixels: ["megapixels"], compute_seconds: ["compute_seconds"], money: ["cost"] };

const today = () => new Date().toISOString().slice(0, 10);
const month = () => new Date().toISOString().slice(0, 8) + "01";

/** @param {{params: Record<string, string>}} props */
export default function Tenant({ params }) {
  const name = params.tenant ?? "";
  const path = at("admin", "tenants", name);
  const query = useQuery(path, { every: 10 });
  const [dialog, setDialog] = useState("");
  const toggle = async () => {
    const on = query.data?.disabled;
    const done = await confirm({
      title: on ? `Let ${name} ask again?` : `Disable ${name}?`,
      body: on ? "Its keys work again." : "All of its keys are refused until it is enabled again.",
      action: on ? "Enable" : "Disable",
      danger: !on,
      act: () => patch(path, { disabled: !on }),
    });
    if (done) query.refresh();
  };
  const remove = async () => {
    const done = await confirm({ title: `Delete ${name}?`, body: "Its projects and keys go with it; its usage stays. This is refused while one of its keys works.", action: "Delete", danger: true, type: name, act: () => del(path) });
    if (done) go("/ui/tenants");
  };
  const actions = html`
    <${Button} icon="key" onClick=${() => setDialog("key")}>New key<//>
    <${Button} icon="gear" disabled=${!query.data} onClick=${() => setDialog("limits")}>Change limits<//>
    ${name !== "default" && html`<${Button} disabled=${!query.data} onClick=${toggle}>${query.data?.disabled ? "Enable" : "Disable"}<//><${Button} kind="danger" icon="trash" label="Delete this tenant" onClick=${remove} />`}
  `;
  return html`
    <${Page} title=${name} crumbs=${[{ href: "/ui/tenants", text: "Tenants" }]} actions=${actions}>
      <${Loaded} query=${query}>${(/** @type {any} */ tenant) => html`
        <div class="grid">
          <div class="w5"><${About} tenant=${tenant} /></div>
          <div class="w7"><${Limits} tenant=${tenant} /></div>
          <div><${ByModel} name=${name} /></div>
        </div>
        <${Keys} tenant=${name} made=${dialog} />
        <${NewKey} open=${dialog === "key"} onClose=${() => setDialog("")} tenant=${name} />
        <${ChangeLimits} open=${dialog === "limits"} onClose=${() => (setDialog(""), query.refresh())} tenant=${tenant} />
      `}<//>
    <//>
  `;
}

/** @param {{tenant: any}} props */
const About = ({ tenant }) => html`
  <${Card} title="What it may">
    <${Facts} rows=${[
      ["State", tenant.disabled ? html`<${Status} tone="bad">disabled<//>` : html`<${Status} tone="ok">may ask<//>`],
      ["Policy", tenant.policy ? "its own" : html`<${Badge}>from fairlead.yaml<//>`],
      ["Class", tenant.policy?.class ?? null],
      ["May ask for", tenant.policy?.classes?.length ? tenant.policy.classes.join(", ") : null],
      ["Models", tenant.policy?.models?.join(", ") ?? null],
      ["Weight", tenant.policy?.weight ?? null],
      ["Signatures", tenant.policy?.require_signature ? "required" : null],
      ["Filters", tenant.policy?.filters ? "its own" : null],
      ["Made", date(tenant.created)],
    ]} />
  <//>
`;

/** Each limit, with how much of it is used where its window is a day's or a month's. @param {{tenant: any}} props */
function Limits({ tenant }) {
  const ofDay = useQuery("/admin/usage", { query: { tenant: tenant.name, by: "tenant", from: today() }, every: 15 });
  const ofMonth = useQuery("/admin/usage", { query: { tenant: tenant.name, by: "tenant", from: month() }, every: 30 });
  const limits = Object.entries(tenant.policy?.limits ?? {});
  /** @param {string} limit @returns {number | null} */
  const usedOf = (limit) => {
    const [, unit = "", window = ""] = /^(.+)_per_(\w+)$/.exec(limit) ?? [];
    const sums = window === "day" ? ofDay.data : window === "month" ? ofMonth.data : null;
    const group = sums?.groups[0];
    return sums ? (UNITS[unit] ?? []).reduce((sum, field) => sum + (group?.[field] ?? 0), 0) : null;
  };
  if (!limits.length) return html`<${Card} title="Limits"><${Empty} icon="gear" title="No limits of its own">${tenant.policy ? "It may ask as much as the models allow." : "What fairlead.yaml says of it, or of default there, holds."}<//><//>`;
  return html`
    <${Card} title="Limits">
      <ul class="stack tight">
        ${limits.map(([limit, amount]) => {
          const used = usedOf(limit);
          const part = used === null ? null : used / Math.max(Number(amount), 1e-9);
          return html`
            <li key=${limit} class="limit">
              <span class="mono break">${limit}</span>
              <span class="num right">${used === null ? "" : `${limit.startsWith("money") ? money(used) : number(used)} of `}${number(Number(amount), 4)}</span>
              ${part === null ? html`<span class="small muted">refills all the time</span>` : html`<${Meter} value=${part} tone=${part >= 1 ? "bad" : part >= 0.8 ? "warn" : ""} label=${`Used of ${limit}`} />`}
            </li>
          `;
        })}
      </ul>
    <//>
  `;
}

/** @param {{name: string}} props */
function ByModel({ name }) {
  const usage = useQuery("/admin/usage", { query: { tenant: name, by: "model", from: month() }, every: 30 });
  const columns = [
    { id: "model", label: "Model", by: (/** @type {any} */ each) => each.model, show: (/** @type {any} */ each) => each.model },
    ...[["requests", "Requests"], ["input_tokens", "Tokens in"], ["output_tokens", "Tokens out"], ["rows", "Rows"], ["megapixels", "Megapixels"]].map(([id = "", label = ""]) => ({ id, label, num: true, by: (/** @type {any} */ each) => each[id], show: (/** @type {any} */ each) => number(each[id], 2) })),
    { id: "cost", label: "Cost", num: true, by: (/** @type {any} */ each) => each.cost, show: (/** @type {any} */ each) => money(each.cost) },
  ];
  return html`<${Card} flush title="Used this month"><${Table} label="Used this month" columns=${columns} rows=${usage.data?.groups ?? null} loading=${usage.loading} error=${usage.error} retry=${usage.refresh} rowKey=${(/** @type {any} */ each) => each.model} sort="cost" descending empty=${html`<${Empty} icon="coin" title="Nothing was used this month" />`} /><//>`;
}

/** @param {{open: boolean, onClose: () => void, tenant: any}} props */
const ChangeLimits = ({ open, onClose, tenant }) => html`<${Dialog} open=${open} onClose=${onClose} title=${`Limits of ${tenant.name}`}>${open && html`<${Changing} onClose=${onClose} tenant=${tenant} />`}<//>`;

/** @param {{onClose: () => void, tenant: any}} props */
function Changing({ onClose, tenant }) {
  const before = tenant.policy?.limits ?? {};
  const [text, setText] = useState(Object.entries(before).map(([name, amount]) => `${name}: ${amount}`).join("\n"));
  const [failed, setFailed] = useState("");
  const change = async (/** @type {any} */ event) => {
    event.preventDefault();
    /** @type {Record<string, number | null>} */
    const limits = Object.fromEntries(Object.keys(before).map((name) => [name, null]));
    for (const line of text.split("\n").map((each) => each.trim()).filter(Boolean)) {
      const [name = "", amount = ""] = line.split(/\s*[:=]\s*/);
      if (!amount || !Number.isFinite(Number(amount))) return setFailed(`${line}: write UNIT_per_WINDOW: AMOUNT`);
      limits[name] = Number(amount);
    }
    try {
      await patch(at("admin", "tenants", tenant.name), { policy: { limits } });
      onClose();
    } catch (error) {
      setFailed(/** @type {Error} */ (error).message);
    }
  };
  return html`
    <form class="stack" onSubmit=${change}>
      ${!tenant.policy && html`<${Notice} tone="warn">It has no policy of its own yet. With this it gets one, and what fairlead.yaml says of it counts no more.<//>`}
      <${Field} label="One limit a line" hint="tokens_per_minute: 90000, money_per_month: 50, concurrent: 4" error=${failed}>${(/** @type {string} */ id) => html`<textarea class="input mono" id=${id} rows="8" spellcheck=${false} value=${text} onInput=${(/** @type {any} */ event) => setText(event.currentTarget.value)}></textarea>`}<//>
      <footer><${Button} onClick=${onClose}>Cancel<//><${Button} type="submit" kind="primary">Change them<//></footer>
    </form>
  `;
}
