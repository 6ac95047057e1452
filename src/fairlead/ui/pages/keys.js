// @ts-check
/** Keys: a list, a new one, and never again. */
import { at, post } from "../lib/api.js";
import { ago, date } from "../lib/format.js";
import { html, useEffect, useState } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { Badge, Button, Card, Check, Code, Dialog, Empty, Field, Notice, Status, Table, confirm } from "../parts/index.js";

/** @type {Record<string, "ok" | "warn" | "bad" | "idle">} */
const TONES = { live: "ok", expired: "idle", revoked: "bad" };
const SCOPES = [
  { name: "infer", text: "infer: ask models" },
  { name: "repository", text: "repository: load and unload models" },
  { name: "admin", text: "admin: everything under /admin, and this dashboard" },
];

/** @param {{tenant?: string, made?: any}} props  `made`: another value reads the list again. */
export function Keys({ tenant, made }) {
  const query = useQuery("/admin/keys", { query: { tenant }, every: 10 });
  useEffect(() => void (made === "" && query.refresh()), [made]);
  const revoke = async (/** @type {any} */ key) => {
    const done = await confirm({
      title: `Revoke the key ${key.name || key.prefix}?`,
      body: "Whoever shows it is refused from the next request on. It cannot be taken back.",
      action: "Revoke",
      danger: true,
      type: key.scopes.includes("admin") ? key.prefix : undefined,
      act: () => post(at("admin", "keys", key.id, "revoke"), {}),
    });
    if (done) query.refresh();
  };
  const columns = [
    { id: "name", label: "Name", by: (/** @type {any} */ each) => each.name, show: (/** @type {any} */ each) => html`<span class="strong">${each.name || "\u2013"}</span>` },
    { id: "prefix", label: "Begins", show: (/** @type {any} */ each) => html`<span class="mono">${each.prefix}…</span>` },
    { id: "state", label: "State", by: (/** @type {any} */ each) => each.state, show: (/** @type {any} */ each) => html`<${Status} tone=${TONES[each.state] ?? "idle"}>${each.state}<//>` },
    ...(tenant ? [] : [{ id: "tenant", label: "Tenant", by: (/** @type {any} */ each) => each.tenant, show: (/** @type {any} */ each) => html`<a href=${at("ui", "tenants", each.tenant)}>${each.tenant}</a>` }]),
    { id: "project", label: "Project", by: (/** @type {any} */ each) => each.project, show: (/** @type {any} */ each) => each.project },
    { id: "scopes", label: "May", show: (/** @type {any} */ each) => html`<span class="row">${each.scopes.map((/** @type {string} */ scope) => html`<${Badge} key=${scope} tone=${scope === "admin" ? "accent" : ""}>${scope}<//>`)}</span>` },
    { id: "models", label: "Models", show: (/** @type {any} */ each) => each.models?.join(", ") ?? "all of the tenant's" },
    { id: "created", label: "Made", by: (/** @type {any} */ each) => each.created, show: (/** @type {any} */ each) => html`<span title=${`by ${each.created_by}`}>${ago(each.created)}</span>` },
    { id: "expires", label: "Expires", by: (/** @type {any} */ each) => each.expires, show: (/** @type {any} */ each) => (each.expires ? date(each.expires) : "never") },
    { id: "act", label: "", show: (/** @type {any} */ each) => each.state === "live" && html`<${Button} kind="quiet" icon="trash" label=${`Revoke ${each.name || each.prefix}`} onClick=${() => revoke(each)} />` },
  ];
  return html`
    <${Card} flush label="Keys">
      <${Table} label="Keys" columns=${columns} rows=${query.data?.keys ?? null} loading=${query.loading} error=${query.error} retry=${query.refresh} rowKey=${(/** @type {any} */ each) => each.id} height=${560}
        empty=${html`<${Empty} icon="key" title="No keys">Programs show one as <code>Authorization: Bearer fl_...</code><//>`} />
    <//>
  `;
}

/** @param {{open: boolean, onClose: () => void, tenant?: string}} props */
export function NewKey({ open, onClose, tenant = "default" }) {
  return html`<${Dialog} open=${open} onClose=${onClose} title="A new key">${open && html`<${Making} onClose=${onClose} tenant=${tenant} />`}<//>`;
}

/** @param {{onClose: () => void, tenant: string}} props */
function Making({ onClose, tenant }) {
  const [values, setValues] = useState({ tenant, project: "default", name: "", models: "", days: "" });
  const [scopes, setScopes] = useState(["infer"]);
  const [secret, setSecret] = useState("");
  const [failed, setFailed] = useState(/** @type {any} */ (null));
  const set = (/** @type {string} */ name) => (/** @type {string} */ value) => setValues({ ...values, [name]: value });
  const of = (/** @type {string} */ name) => failed?.errors?.find((/** @type {any} */ each) => each.field.split(".")[0] === name)?.detail ?? "";
  const make = async (/** @type {any} */ event) => {
    event.preventDefault();
    const models = values.models.split(/[\s,]+/).filter(Boolean);
    const expires = Number(values.days) > 0 ? new Date(Date.now() + Number(values.days) * 86400e3).toISOString() : null;
    try {
      const made = await post("/admin/keys", { tenant: values.tenant, project: values.project, name: values.name, scopes, models: models.length ? models : null, expires });
      setSecret(made.secret);
    } catch (error) {
      setFailed(error);
    }
  };
  if (secret) {
    return html`
      <${Notice} tone="warn">This is the only time that the key is shown. Keep it where programs find it.<//>
      <${Code} text=${secret} label="The new key" />
      <footer><${Button} kind="primary" onClick=${onClose}>I have it<//></footer>
    `;
  }
  return html`
    <form class="stack" onSubmit=${make}>
      <${Field} label="Name" hint="For people to know it by" autofocus maxlength="200" value=${values.name} error=${of("name")} onInput=${set("name")} />
      <div class="grid">
        <div class="w6"><${Field} label="Tenant" required value=${values.tenant} error=${of("tenant")} onInput=${set("tenant")} /></div>
        <div class="w6"><${Field} label="Project" required value=${values.project} error=${of("project")} onInput=${set("project")} /></div>
      </div>
      <fieldset class="plain stack tight"><legend class="small muted">It may</legend>${SCOPES.map(({ name, text }) => html`<${Check} key=${name} checked=${scopes.includes(name)} onChange=${(/** @type {boolean} */ on) => setScopes(on ? [...scopes, name] : scopes.filter((each) => each !== name))}>${text}<//>`)}</fieldset>
      <div class="grid">
        <div class="w6"><${Field} label="Models" hint="Patterns, with commas; empty: all that the tenant may" spellcheck=${false} value=${values.models} error=${of("models")} onInput=${set("models")} /></div>
        <div class="w6"><${Field} label="Days" hint="Empty: it never expires" type="number" min="1" step="1" value=${values.days} error=${of("expires")} onInput=${set("days")} /></div>
      </div>
      ${failed && !failed.errors?.length && html`<${Notice} tone="bad">${failed.message}<//>`}
      <footer><${Button} onClick=${onClose}>Cancel<//><${Button} type="submit" kind="primary" disabled=${!scopes.length}>Make it<//></footer>
    </form>
  `;
}
