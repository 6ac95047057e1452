// @ts-check
import { get } from "../lib/api.js";
import { date } from "../lib/format.js";
import { html, useEffect, useState } from "../lib/html.js";
import { useQuery } from "../lib/query.js";
import { setQuery } from "../lib/router.js";
import { Badge, Button, Card, Empty, Field, Page, Table, attempt } from "../parts/index.js";

/** @param {{query: URLSearchParams}} props */
export default function Audit({ query }) {
  const wanted = { action: query.get("action") ?? "", subject: query.get("subject") ?? "", actor: query.get("actor") ?? "", from: query.get("from") ?? "" };
  const first = useQuery("/admin/audit", { query: { ...wanted, limit: 100 }, every: 15 });
  const [more, setMore] = useState(/** @type {{entries: any[], next: string | null} | null} */ (null));
  useEffect(() => setMore(null), [wanted.action, wanted.subject, wanted.actor, wanted.from]);
  const rows = first.data && [...first.data.entries, ...(more?.entries ?? [])];
  const next = more ? more.next : first.data?.next;
  const older = () => attempt(async () => {
    const page = await get("/admin/audit", { ...wanted, limit: 100, cursor: next });
    setMore({ entries: [...(more?.entries ?? []), ...page.entries], next: page.next });
  });
  const columns = [
    { id: "time", label: "When", width: "150px", show: (/** @type {any} */ each) => html`<time class="num">${date(each.time)}</time>` },
    { id: "actor", label: "Who", show: (/** @type {any} */ each) => html`<span class="mono">${each.actor}</span>` },
    { id: "action", label: "Did", show: (/** @type {any} */ each) => html`<${Badge}>${each.action}<//>` },
    { id: "subject", label: "To what", class: "wraps", show: (/** @type {any} */ each) => html`<span class="strong">${each.subject}</span>` },
    { id: "details", label: "How", class: "wraps", show: (/** @type {any} */ each) => html`<span class="mono small">${said(each.details)}</span>` },
    { id: "address", label: "From", show: (/** @type {any} */ each) => html`<span class="mono">${each.address || "\u2013"}</span>` },
  ];
  const filter = (/** @type {keyof typeof wanted} */ name, /** @type {string} */ label, /** @type {Record<string, any>} */ rest = {}) => html`
    <div class="filter"><${Field} label=${label} value=${wanted[name]} placeholder="any" spellcheck=${false} onInput=${(/** @type {string} */ value) => setQuery({ [name]: value })} ...${rest} /></div>
  `;
  return html`
    <${Page} title="Audit" note="Who did what to what">
      <div class="row wrap">${filter("action", "Action")}${filter("subject", "Subject")}${filter("actor", "Actor")}${filter("from", "From", { type: "date" })}</div>
      <${Card} flush label="Audit log" footer=${next && html`<${Button} icon="down" onClick=${older}>Older entries<//>`}>
        <${Table} label="Audit log" columns=${columns} rows=${rows} rowHeight=${0} loading=${first.loading} error=${first.error} retry=${first.refresh} empty=${Object.values(wanted).some(Boolean) ? html`<${Empty} icon="search" title="No such entries" />` : html`<${Empty} icon="scroll" title="Nothing was changed yet" />`} />
      <//>
    <//>
  `;
}

/** @param {Record<string, any>} details */
const said = (details) =>
  Object.entries(details ?? {})
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`)
    .join("  ");
