// @ts-check
import { at, post } from "../lib/api.js";
import { ago, money, number } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { go, setQuery } from "../lib/router.js";
import { Badge, Button, Card, Dialog, Empty, Field, Notice, Page, Status, Table, Tabs } from "../parts/index.js";
import { Keys, NewKey } from "./keys.js";

/** The first day of this month. */
const monthBegan = () => new Date().toISOString().slice(0, 8) + "01";

/** @param {{query: URLSearchParams}} props */
export default function Tenants({ query }) {
  const tab = query.get("tab") ?? "tenants";
  const [making, setMaking] = useState("");
  return html`
    <${Page} title="Tenants" note="Who may use this server, what they used, and the keys they show" actions=${tab === "keys" ? html`<${Button} kind="primary" icon="key" onClick=${() => setMaking("key")}>New key<//>` : html`<${Button} kind="primary" icon="plus" onClick=${() => setMaking("tenant")}>New tenant<//>`}>
      <div>
        <${Tabs} label="Tenants or keys" tabs=${[{ id: "tenants", text: "Tenants" }, { id: "keys", text: "Keys" }]} chosen=${tab} onChoose=${(/** @type {string} */ id) => setQuery({ tab: id === "tenants" ? null : id })} />
        <div role="tabpanel" aria-label=${tab === "keys" ? "Keys" : "Tenants"}>${tab === "keys" ? html`<${Keys} made=${making} />` : html`<${List} />`}</div>
      </div>
      <${NewTenant} open=${making === "tenant"} onClose=${() => setMaking("")} />
      <${NewKey} open=${making === "key"} onClose=${() => setMaking("")} />
    <//>
  `;
}

function List() {
  const tenants = useQuery("/admin/tenants", { every: 10 });
  const usage = useQuery("/admin/usage", { query: { by: "tenant", from: monthBegan() }, every: 30 });
  const abuse = useQuery("/admin/abuse", { every: 10 });
  const used = new Map((usage.data?.groups ?? []).map((/** @type {any} */ each) => [each.tenant, each]));
  const acted = new Map((abuse.data?.actions ?? []).map((/** @type {any} */ each) => [each.tenant, each]));
  const of = (/** @type {any} */ tenant, /** @type {string} */ name) => used.get(tenant.name)?.[name] ?? (usage.data ? 0 : null);
  const columns = [
    { id: "name", label: "Name", by: (/** @type {any} */ each) => each.name, show: (/** @type {any} */ each) => html`<a href=${at("ui", "tenants", each.name)}>${each.name}</a>` },
    { id: "state", label: "State", show: (/** @type {any} */ each) => each.disabled ? html`<${Status} tone="bad">disabled<//>` : acted.has(each.name) ? html`<${Status} tone="warn">${acted.get(each.name).action}<//>` : html`<${Status} tone="ok">may ask<//>` },
    { id: "class", label: "Class", show: (/** @type {any} */ each) => each.policy?.class ?? "standard" },
    { id: "limits", label: "Limits", show: (/** @type {any} */ each) => each.policy ? number(Object.keys(each.policy.limits ?? {}).length) : html`<${Badge} title="What fairlead.yaml says of it, or of default">from the file<//>` },
    { id: "requests", label: "Requests this month", num: true, by: (/** @type {any} */ each) => of(each, "requests"), show: (/** @type {any} */ each) => number(of(each, "requests")) },
    { id: "tokens", label: "Tokens", num: true, by: (/** @type {any} */ each) => of(each, "input_tokens") + of(each, "output_tokens"), show: (/** @type {any} */ each) => number(usage.data ? of(each, "input_tokens") + of(each, "output_tokens") : null) },
    { id: "cost", label: "Cost", num: true, by: (/** @type {any} */ each) => of(each, "cost"), show: (/** @type {any} */ each) => money(of(each, "cost")) },
    { id: "created", label: "Made", by: (/** @type {any} */ each) => each.created, show: (/** @type {any} */ each) => ago(each.created) },
  ];
  return html`
    <div class="stack">
      ${usage.error && html`<${Notice} tone="warn">What they used is not known: ${usage.error.message}<//>`}
      <${Card} flush label="Tenants">
        <${Table} label="Tenants" columns=${columns} rows=${tenants.data?.tenants ?? null} loading=${tenants.loading} error=${tenants.error} retry=${tenants.refresh} rowKey=${(/** @type {any} */ each) => each.name} height=${680} empty=${html`<${Empty} icon="users" title="No tenants" />`} />
      <//>
    </div>
  `;
}

/** @param {{open: boolean, onClose: () => void}} props */
function NewTenant({ open, onClose }) {
  const [name, setName] = useState("");
  const [failed, setFailed] = useState("");
  const make = async (/** @type {any} */ event) => {
    event.preventDefault();
    try {
      await post("/admin/tenants", { name: name.trim() });
      onClose();
      go(at("ui", "tenants", name.trim()));
    } catch (error) {
      setFailed(/** @type {Error} */ (error).message);
    }
  };
  return html`
    <${Dialog} open=${open} onClose=${onClose} title="A new tenant">
      <form class="stack" onSubmit=${make}>
        <${Field} label="Name" hint="Letters, digits and ._@:+-" required spellcheck=${false} autofocus value=${name} error=${failed} onInput=${setName} />
        <p class="muted small">It may what fairlead.yaml says of it, or of <code>default</code> there, until its own limits are set.</p>
        <footer><${Button} onClick=${onClose}>Cancel<//><${Button} type="submit" kind="primary" disabled=${!name.trim()}>Make it<//></footer>
      </form>
    <//>
  `;
}
