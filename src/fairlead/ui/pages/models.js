// @ts-check
import { html, useEffect, useState } from "../lib/html.js";
import { at, has } from "../lib/api.js";
import { NONE, number, percent, plural, rate, seconds } from "../lib/format.js";
import { usePages } from "../lib/query.js";
import { setQuery } from "../lib/router.js";
import { Badge, Card, Empty, Page, Search, Segments, Status, Table } from "../parts/index.js";
import { STATES, load, unload } from "./model-acts.js";

const FILTERS = ["", "ready", "loading", "failed", "unloaded"];

/** @param {{query: URLSearchParams}} props */
export default function Models({ query }) {
  const [search, setSearch] = useState(query.get("search") ?? "");
  const [settled, setSettled] = useState(search);
  const state = query.get("state") ?? "";
  const sort = query.get("sort") ?? "name";
  const descending = query.get("down") === "1";
  useEffect(() => {
    const timer = setTimeout(() => {
      setSettled(search);
      if (search !== (new URLSearchParams(location.search).get("search") ?? "")) setQuery({ search: search || null });
    }, 150);
    return () => clearTimeout(timer);
  }, [search]);
  const wanted = { search: settled, state };
  const pages = usePages("/ui/models.json", "models", { query: { ...wanted, sort, descending }, every: 5 });
  const counts = pages.head?.counts;
  const all = counts ? Object.values(counts).reduce((/** @type {number} */ sum, /** @type {any} */ each) => sum + each, 0) : null;
  /** @type {import("../parts/table.js").Column<any>[]} */
  const columns = [
    { id: "name", label: "Model", by: () => "", show: (each) => html`<a href=${at("ui", "models", each.name)}>${each.name}</a>`, width: "30%" },
    { id: "state", label: "State", by: () => "", show: (each) => html`<span title=${each.reason}><${Status} tone=${STATES[each.state]?.[0]}>${STATES[each.state]?.[1]}<//></span>` },
    { id: "versions", label: "Versions", show: (each) => html`<span class="row">${versionsOf(each)}</span>` },
    { id: "requests", label: "Req/s", num: true, by: () => 0, show: (each) => (each.now.requests ? rate(each.now.requests) : NONE) },
    { id: "errors", label: "Errors", num: true, by: () => 0, show: (each) => html`<span class=${each.now.errors ? "bad" : "faint"}>${each.now.requests ? percent(each.now.errors / each.now.requests) : "\u2013"}</span>` },
    { id: "p99", label: "p99", num: true, by: () => 0, show: (each) => seconds(each.now.p99) },
    { id: "acts", label: "", num: true, width: "96px", show: (each) => acts(each) },
  ];
  return html`
    <${Page} title="Models" note=${all === null ? "\u00a0" : `${plural(all, "model")}${settled ? ` with \u201c${settled}\u201d` : ""}`}>
      <div class="row wrap">
        <${Search} value=${search} onInput=${setSearch} label="Search models" placeholder="Search by name" />
        <${Segments} label="State" value=${state} onChange=${(/** @type {string} */ value) => setQuery({ state: value || null })}
          options=${FILTERS.map((each) => ({ value: each, text: html`${each ? STATES[each]?.[1] : "All"} <span class="faint num">${number(each ? counts?.[each] : all)}</span>` }))} />
      </div>
      <${Card} flush label="Models">
        <${Table} label="Models" columns=${columns} total=${pages.total} rowAt=${pages.rowAt} load=${pages.load} loading=${pages.loading} error=${pages.error} height=${640}
          sort=${sort} descending=${descending} onSort=${(/** @type {string} */ id, /** @type {boolean} */ down) => setQuery({ sort: id, down: down ? 1 : null })}
          empty=${settled || state ? html`<${Empty} icon="search" title="No model fits">Nothing has that name and state.<//>` : html`<${Empty} title="No models">Start the server with a folder of models, or add one: <code>fairlead models add</code>.<//>`} />
      <//>
    <//>
  `;
}

/** @param {any} each */
function versionsOf(each) {
  const loaded = each.versions.filter((/** @type {any} */ one) => one.state === "READY").map((/** @type {any} */ one) => one.version);
  if (each.remote && !loaded.length) return html`<${Badge}>upstream<//>`;
  const shown = loaded.slice(0, 3).map((/** @type {string} */ one) => html`<${Badge} key=${one} tone="ok">${one}<//>`);
  const champion = each.aliases.champion;
  return html`${shown}${loaded.length > 3 ? html`<span class="faint">+${loaded.length - 3}</span>` : ""}${champion && html`<span class="muted small">champion ${champion}</span>`}${!loaded.length && each.registered.length ? html`<span class="faint">${each.registered.length} registered</span>` : ""}`;
}

/** @param {any} each */
function acts(each) {
  if (!has("load") || each.remote || each.registered.length) return null;
  return each.state === "ready" ? unload(each.name) : each.state === "loading" ? null : load(each.name);
}
