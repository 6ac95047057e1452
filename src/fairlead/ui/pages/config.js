// @ts-check
import { post, send } from "../lib/api.js";
import { problemOf } from "../lib/api.js";
import { ago, date } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { Button, Card, Code, Dialog, Empty, Field, Loaded, Notice, Page, Status, Table, confirm } from "../parts/index.js";

export default function Config() {
  const query = useQuery("/admin/config", { every: 15 });
  const [editing, setEditing] = useState(false);
  const act = async (/** @type {import("../parts/dialogs.js").Question} */ question) => {
    if (await confirm(question)) query.refresh();
  };
  const reload = () => act({ title: "Read fairlead.yaml again?", body: "Its section gateway replaces the policies at once. If anything in it is wrong, nothing changes.", action: "Reload", act: () => post("/admin/config/reload") });
  const rollback = () => act({ title: "Back to the version before?", body: "The policies of the version before are in force again, at once. fairlead.yaml is not changed.", action: "Roll back", danger: true, act: () => post("/admin/config/rollback") });
  const versions = query.data?.versions ?? [];
  const actions = html`
    <${Button} icon="refresh" disabled=${!query.data} onClick=${reload}>Reload<//>
    <${Button} icon="undo" disabled=${!versions.length} onClick=${rollback}>Roll back<//>
    <${Button} icon="gear" disabled=${!query.data} onClick=${() => setEditing(true)}>Change<//>
  `;
  const columns = [
    { id: "version", label: "Version", num: true, by: (/** @type {any} */ each) => each.version, show: (/** @type {any} */ each) => each.version },
    { id: "active", label: "State", show: (/** @type {any} */ each) => (each.active ? html`<${Status} tone="ok">in force<//>` : html`<${Status} tone="idle">before<//>`) },
    { id: "time", label: "Since", by: (/** @type {any} */ each) => each.time, show: (/** @type {any} */ each) => html`<span title=${date(each.time)}>${ago(each.time)}</span>` },
    { id: "actor", label: "By", show: (/** @type {any} */ each) => html`<span class="mono">${each.actor}</span>` },
  ];
  return html`
    <${Page} title="Configuration" note="The policies of the gateway: limits, routing, filters, caches, classes" actions=${actions}>
      <${Loaded} query=${query} height=${400}>${(/** @type {any} */ data) => html`
        <div class="grid">
          <div class="w8"><${Card} title=${`In force: version ${data.version}`}>${data.text.trim() ? html`<${Code} text=${data.text} label="Policies, as YAML" />` : html`<${Empty} icon="gear" title="Nothing is said">Every policy is as it comes.<//>`}<//></div>
          <div class="w4"><${Card} flush title="Versions"><${Table} label="Versions" columns=${columns} rows=${data.versions} rowKey=${(/** @type {any} */ each) => each.version} empty=${html`<${Empty} icon="clock" title="No versions yet">The first change makes one.<//>`} /><//></div>
        </div>
        <${Dialog} open=${editing} onClose=${() => setEditing(false)} title="Change the policies" wide>
          ${editing && html`<${Editing} text=${data.text} onClose=${() => (setEditing(false), query.refresh())} />`}
        <//>
      `}<//>
    <//>
  `;
}

/** @param {{text: string, onClose: () => void}} props */
function Editing({ text, onClose }) {
  const [now, setNow] = useState(text);
  const [failed, setFailed] = useState("");
  const [busy, setBusy] = useState(false);
  const change = async (/** @type {any} */ event) => {
    event.preventDefault();
    setBusy(true);
    setFailed("");
    try {
      const answer = await send("PUT", "/admin/config", { body: new Blob([now], { type: "application/yaml" }) });
      if (!answer.ok) throw await problemOf(answer);
      onClose();
    } catch (error) {
      setFailed(/** @type {Error} */ (error).message);
      setBusy(false);
    }
  };
  return html`
    <form class="stack" onSubmit=${change}>
      <${Field} label="Policies, as YAML" hint="Checked first: if anything is wrong, nothing changes. fairlead.yaml stays as it is.">${(/** @type {string} */ id) => html`<textarea class="input mono config-text" id=${id} rows="20" spellcheck=${false} value=${now} onInput=${(/** @type {any} */ event) => setNow(event.currentTarget.value)}></textarea>`}<//>
      ${failed && html`<${Notice} tone="bad">${failed}<//>`}
      <footer><${Button} onClick=${onClose}>Cancel<//><${Button} type="submit" kind="primary" busy=${busy} disabled=${now === text}>Change them<//></footer>
    </form>
  `;
}
